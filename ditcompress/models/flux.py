"""FLUX.1 (Black Forest Labs 2024): two-stream blocks as in SD3, then single-stream blocks with a parallel feed-forward.

A single block concatenates the heads of its attention and the neurons of its feed-forward into one output linear, so
`proj_out` reads two axes. Latents travel as 2 x 2 patches packed into tokens; here they keep the shape of an image,
(channels, height, width), and `predict` packs and unpacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from ._inputs import Conditions, built, compute_dtype, moved
from ._table import Table, listed
from .base import Layout
from .sd3 import continuous_head, joint_block, joint_embedding

CLASSES = ("FluxTransformer2DModel",)

TEXT_TOKENS = 128
SAMPLE_SIZE = 128  # latent side of a 1024-pixel image; the configuration of FLUX names no size
EMBEDDED_GUIDANCE = 3.5  # the pipeline's default for models distilled with a guidance embedding


def layout(model: nn.Module) -> Layout:
    """The sites and axes of a FLUX model."""
    table = Table(model)
    blocks = listed(model, "transformer_blocks", "single_transformer_blocks")
    embedding = joint_embedding(table)
    table.site("context_embedder", "embedding")
    table.site("x_embedder", "embedding")
    for block in blocks:
        if block.startswith("single"):
            _single_block(table, block, embedding)
        else:
            joint_block(table, block, embedding)
    continuous_head(table, embedding)
    return table.finish(blocks)


def _single_block(table: Table, block: str, embedding: str) -> None:
    table.site(f"{block}.norm.linear", "modulation", (embedding,), ("",), block)
    hidden = table.adaln_input(f"{block}.norm.out", f"{block}.norm", shift=0, scale=1, chunks=3)
    heads = table.attention(f"{block}.attn", hidden, block)
    neurons = table.axis(f"{block}.mlp.neurons", table.rows(f"{block}.proj_mlp"), "neuron", cut=True)
    table.site(f"{block}.proj_mlp", "ffn_in", (hidden,), (neurons,), block)
    table.site(f"{block}.proj_out", "ffn_out", (heads, neurons), ("",), block)


def latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, height, width) of one latent image, not packed. A "sample_size" added to the configuration is used."""
    side = int(config.get("sample_size") or SAMPLE_SIZE)
    return int(config["in_channels"]) // 4, side, side


def default_scheduler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow. The guidance-distilled models shift time by the number of image tokens, the others do not.

    The pipeline's exponential shift by mu equals a constant shift of exp(mu), with mu linear between 0.5 at 256
    tokens and 1.15 at 4096.
    """
    if not config.get("guidance_embeds"):
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    _, height, width = latent_shape(config)
    mu = 0.5 + (1.15 - 0.5) * (height * width // 4 - 256) / (4096 - 256)
    return FlowMatchEulerDiscreteScheduler(shift=math.exp(mu))


def sigmas(steps: int) -> list[float]:
    """Noise levels before the shift, as the pipeline gives them: from 1 to 1/steps. The scheduler's own run down to
    1/1000, so its last steps see states that the pipeline never makes."""
    return [1 - index / steps for index in range(steps)]


def random_conditions(config: Mapping[str, Any], count: int, generator: torch.Generator) -> Conditions:
    """Normal token embeddings (count, tokens, channels) and pooled ones (count, channels)."""
    tokens = (count, TEXT_TOKENS, int(config["joint_attention_dim"]))
    pooled = (count, int(config["pooled_projection_dim"]))
    return {
        "encoder_hidden_states": torch.randn(tokens, generator=generator),
        "pooled_projections": torch.randn(pooled, generator=generator),
    }


def null_conditions(config: Mapping[str, Any], cond: Mapping[str, Tensor]) -> None:
    """None: these models are distilled and run without a second branch."""


def default_guidance(config: Mapping[str, Any]) -> float:
    """1: no second branch. The scale that the model takes as an input is EMBEDDED_GUIDANCE."""
    return 1.0


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) to tokens of 2 x 2 pixels, (batch, height/2 * width/2, channels * 4)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of `height` x `width`."""
    patches = tokens.reshape(tokens.shape[0], height // 2, width // 2, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def image_positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height/2 * width/2, 3): zero, row and column of every token."""
    rows = torch.arange(height // 2, device=device, dtype=torch.float32)
    columns = torch.arange(width // 2, device=device, dtype=torch.float32)
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def predict(model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predicted velocity, shape and dtype of `latents` (batch, channels, height, width); `timestep` (batch,) 0-1000.

    `cond` may hold "guidance" (batch,), the embedded scale; a model that takes one gets EMBEDDED_GUIDANCE otherwise.
    """
    dtype, device = compute_dtype(model), latents.device
    kwargs = moved(cond, device, dtype)
    if model.config.guidance_embeds:  # type: ignore[union-attr]
        kwargs.setdefault("guidance", torch.full((len(latents),), EMBEDDED_GUIDANCE, device=device))
    height, width = latents.shape[-2:]
    text = kwargs["encoder_hidden_states"].shape[1]
    output = model(
        pack(latents).to(dtype),
        timestep=timestep.to(device) / 1000,
        img_ids=image_positions(height, width, device),
        txt_ids=torch.zeros(text, 3, device=device),
        return_dict=False,
        **kwargs,
    )[0]
    return unpack(output, height, width).to(latents.dtype)


def tiny(seed: int = 0) -> nn.Module:
    """A random guidance-distilled FLUX with one block of each kind, width 64, for latents of 8 x 8."""
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    model = built(FluxTransformer2DModel, config, seed)
    model.register_to_config(sample_size=8)  # type: ignore[operator]
    return model
