"""Qwen-Image (arXiv 2508.02324): blocks of two streams, each with a modulation and a feed-forward of its own.

The table is the one that the structure proves (`_derive`); a family of its own is needed to drive the model. Latents
travel as 2 x 2 patches packed into tokens, as in FLUX, with the sizes of the images beside them; here they keep the
shape of an image, (channels, height, width). The pipeline also gives guided predictions the norm that the conditional
one had; here guidance is plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from torch import Tensor, nn

from ..errors import DitcompressError
from ._derive import derive
from ._inputs import Conditions, built, compute_dtype, moved
from .base import Layout
from .flux import pack, unpack
from .flux import sigmas as sigmas

CLASSES = ("QwenImageTransformer2DModel",)

TEXT_TOKENS = 64
SAMPLE_SIZE = 128  # latent side of a 1024-pixel image; the configuration names no size
EMBEDDED_GUIDANCE = 1.0  # of models that take the scale as an input


def layout(model: nn.Module) -> Layout:
    """The sites and axes that the structure proves."""
    return derive(model)


def latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, height, width) of one latent image, not packed. A "sample_size" added to the configuration is used."""
    side = int(config.get("sample_size") or SAMPLE_SIZE)
    return int(config["in_channels"]) // 4, side, side


def default_scheduler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow that ends at a noise of 0.02, with a time shift that grows with the image: exp(mu), mu linear
    between 0.5 at 256 tokens and 0.9 at 8192, as the scheduler shipped with the model has it."""
    _, height, width = latent_shape(config)
    mu = 0.5 + (0.9 - 0.5) * (height * width // 4 - 256) / (8192 - 256)
    return FlowMatchEulerDiscreteScheduler(shift=math.exp(mu), shift_terminal=0.02)


def random_conditions(config: Mapping[str, Any], count: int, generator: torch.Generator) -> Conditions:
    """Normal token embeddings (count, tokens, channels). E205 for a model that draws layers of an image."""
    if config.get("use_additional_t_cond") or config.get("use_layer3d_rope"):
        what = "draws several layers of an image, which are not driven here"
        raise DitcompressError("E205", str(config.get("_class_name")), what, "it can be quantized without calibration")
    tokens = (count, TEXT_TOKENS, int(config["joint_attention_dim"]))
    return {"encoder_hidden_states": torch.randn(tokens, generator=generator)}


def null_conditions(config: Mapping[str, Any], cond: Mapping[str, Tensor]) -> Conditions:
    """Zeros for the embeddings, masks unchanged. Used where no text encoder is at hand."""
    return {name: torch.zeros_like(value) if value.is_floating_point() else value for name, value in cond.items()}


def default_guidance(config: Mapping[str, Any]) -> float:
    """4, the pipeline's default, or 1 for a model that takes the scale as an input."""
    return 1.0 if config.get("guidance_embeds") else 4.0


def predict(model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predicted velocity, shape and dtype of `latents` (batch, channels, height, width); `timestep` (batch,) 0-1000.

    `cond` may hold the text's mask (batch, tokens); padding is not attended to.
    """
    dtype, device = compute_dtype(model), latents.device
    kwargs: dict[str, Any] = moved(cond, device, dtype)
    if model.config.guidance_embeds:  # type: ignore[union-attr]
        kwargs.setdefault("guidance", torch.full((len(latents),), EMBEDDED_GUIDANCE, device=device))
    height, width = latents.shape[-2:]
    output = model(
        pack(latents).to(dtype),
        timestep=timestep.to(device) / 1000,
        img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
        return_dict=False,
        **kwargs,
    )[0]
    return unpack(output, height, width).to(latents.dtype)


def tiny(seed: int = 0) -> nn.Module:
    """A random model of two blocks, width 64, for latents of 8 x 8."""
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
              "num_attention_heads": 4, "joint_attention_dim": 48, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    model = built(QwenImageTransformer2DModel, config, seed)
    model.register_to_config(sample_size=8)  # type: ignore[operator]
    return model
