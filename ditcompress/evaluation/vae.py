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
VIDEO = ("AutoencoderKLQwenImage", "AutoencoderKLWan")  # have an axis of frames


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
    scale, shift = _normal(vae)
    scaled = latents.to(scale.device) * scale + shift
    with torch.no_grad():
        return torch.cat([_still(vae.decode(_frame(vae, x), return_dict=False)[0]) for x in scaled.split(PART)])


def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents (n, ...) float32 on CPU as the sampler has them, from images (n, channels, height, width) in [-1, 1]: the
    means of the encoder, shifted and scaled."""
    if images.shape[1] == 1:
        images = images.expand(-1, int(vae.config.get("in_channels") or 3), -1, -1)
    found = []
    scale, shift = (value.cpu() for value in _normal(vae))
    with torch.no_grad():
        for part in images.split(PART):
            made = vae.encode(_frame(vae, part.to(next(vae.parameters()).device)))
            latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent
            found.append((_still(latents) - shift) / scale)
    return torch.cat(found)


def _normal(vae: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of the sampler's latents to the autoencoder's, (1, channels or 1, 1, 1): one number, or the
    deviation and mean of every channel."""
    config, device = vae.config, next(vae.parameters()).device

    def of(name: str, default: float) -> Tensor:
        value = config.get(name)
        return torch.tensor(value or [default], dtype=torch.float32, device=device).reshape(1, -1, 1, 1)

    scale = of("latents_std", 1.0) / float(config.get("scaling_factor") or 1.0)
    return scale, of("latents_mean", 0.0) + float(config.get("shift_factor") or 0.0)


def _frame(vae: Any, x: Tensor) -> Tensor:
    """Images (n, channels, height, width) as an autoencoder of videos takes them, as one frame each."""
    return x[:, :, None] if type(vae).__name__ in VIDEO else x


def _still(x: Tensor) -> Tensor:
    """Float32 on CPU, of a video the first frame."""
    return (x[:, :, 0] if x.ndim == 5 else x).float().cpu()
