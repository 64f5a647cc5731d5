"""Latents to images and back by the pipeline's own VAE: autoencoder classes of diffusers, local safetensors."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ..checkpoint._folder import read_config
from ..checkpoint.reader import Checkpoint
from ..errors import DitcompressError

PART = 4  # images decoded at a time


def load_vae(source: Checkpoint, device: str) -> Any:
    """The decoder in float32, or None where the pipeline folder has none; E320 where it does not load."""
    folder = source.pipeline / "vae" if source.pipeline else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    name = read_config(folder / "config.json", source.pipeline)["_class_name"]
    cls = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    try:
        if cls is None:
            raise ValueError(f"{name} is no autoencoder of diffusers")
        vae = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)
    except Exception as error:
        raise DitcompressError(
            "E320", folder, f"the VAE does not load ({type(error).__name__})", "restore the folder, or remove it"
        ) from None
    return vae.to(device).eval()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (n, channels, height, width) float32 on CPU, about [-1, 1], from latents as the sampler gives them."""
    config, device = vae.config, next(vae.parameters()).device
    scaled = latents.to(device) / float(config.get("scaling_factor") or 1.0) + float(config.get("shift_factor") or 0.0)
    with torch.no_grad():
        return torch.cat([vae.decode(part, return_dict=False)[0].float().cpu() for part in scaled.split(PART)])


def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents (n, ...) float32 on CPU as the sampler has them, from images (n, channels, height, width) in [-1, 1]: the
    means of the encoder, shifted and scaled."""
    config, device = vae.config, next(vae.parameters()).device
    if images.shape[1] == 1:
        images = images.expand(-1, int(config.get("in_channels") or 3), -1, -1)
    found = []
    with torch.no_grad():
        for part in images.split(PART):
            made = vae.encode(part.to(device))
            latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent
            shifted = latents.float() - float(config.get("shift_factor") or 0.0)
            found.append((shifted * float(config.get("scaling_factor") or 1.0)).cpu())
    return torch.cat(found)
