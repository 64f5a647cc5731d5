"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): two streams that attend jointly, each with its own adaLN.

Variants met here: SD3.5 normalises queries and keys per head; in `dual_attention_layers` the image stream attends a
second time to itself (SD3.5-medium), from the same norm with a third pair of shift and scale; the last block uses
its text stream only as keys and values (`context_pre_only`). That block's `attn.add_q_proj` is computed and thrown
away by diffusers: nothing done to its weight can change an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn

from ._inputs import Conditions, built, compute_dtype, first_channels, moved
from ._table import Table, listed
from .base import Layout

CLASSES = ("SD3Transformer2DModel",)

TEXT_TOKENS = 77


def layout(model: nn.Module) -> Layout:
    """The sites and axes of an SD3 model."""
    table = Table(model)
    blocks = listed(model, "transformer_blocks")
    embedding = joint_embedding(table)
    table.site("context_embedder", "embedding")
    for block in blocks:
        joint_block(table, block, embedding)
    continuous_head(table, embedding)
    return table.finish(blocks)


def joint_embedding(table: Table) -> str:
    """The embedders of time and pooled text; the axis of their sum, which every modulation linear reads."""
    table.two_layers("time_text_embed.timestep_embedder", "time_embedding")
    table.two_layers("time_text_embed.guidance_embedder", "time_embedding")
    table.two_layers("time_text_embed.text_embedder", "embedding")
    size = table.rows("time_text_embed.timestep_embedder.linear_2")
    # An activation stands between the embedders and the readers, so no scale folds.
    return table.axis("time_text_embed.out", size, "channel")


def continuous_head(table: Table, embedding: str) -> None:
    """norm_out (AdaLayerNormContinuous: scale first, then shift) and proj_out."""
    table.site("norm_out.linear", "modulation", (embedding,))
    table.site("proj_out", "head", (table.adaln_input("norm_out.out", "norm_out", shift=1, scale=0, chunks=2),))


def joint_block(table: Table, block: str, embedding: str) -> None:
    """One two-stream block; chunk numbers are those of AdaLayerNormZero and SD35AdaLayerNormZeroX."""
    dim = table.columns(f"{block}.attn.to_q")
    norm, context = f"{block}.norm1", f"{block}.norm1_context"
    chunks = table.rows(f"{norm}.linear") // dim
    straight = table.has(f"{context}.project")  # text_stream.py
    context_only = not straight and table.rows(f"{context}.linear") == 2 * dim
    table.site(f"{norm}.linear", "modulation", (embedding,), ("",), block)
    if straight:
        table.site(f"{context}.project", "ffn_in", block=block)
    else:
        table.site(f"{context}.linear", "modulation", (embedding,), ("",), block)
    image = table.adaln_input(f"{norm}.out", norm, shift=0, scale=1, chunks=chunks)
    if straight:
        text = table.axis(f"{context}.out", table.columns(f"{context}.project"), "channel")
    elif context_only:  # AdaLayerNormContinuous: scale, shift
        text = table.adaln_input(f"{context}.out", context, shift=1, scale=0, chunks=2)
    else:
        text = table.adaln_input(f"{context}.out", context, shift=0, scale=1, chunks=6)
    table.attention(f"{block}.attn", image, block, context_added=text)
    if table.has(f"{block}.attn2.to_q"):
        second = table.adaln_input(f"{norm}.out2", norm, shift=6, scale=7, chunks=chunks)
        table.attention(f"{block}.attn2", second, block)
    hidden = table.adaln_input(f"{block}.norm2.out", norm, shift=3, scale=4, chunks=chunks)
    table.feed_forward(f"{block}.ff", hidden, block)
    if straight and table.has(f"{block}.ff_context"):
        table.site(f"{block}.ff_context", "ffn_in", block=block)
    elif not straight and not context_only:
        hidden = table.adaln_input(f"{block}.norm2_context.out", context, shift=3, scale=4, chunks=6)
        table.feed_forward(f"{block}.ff_context", hidden, block)


def latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, height, width) of one latent image."""
    return int(config["in_channels"]), int(config["sample_size"]), int(config["sample_size"])


def default_scheduler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow with the time shift of 3 that the family's pipelines ship."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def random_conditions(config: Mapping[str, Any], count: int, generator: torch.Generator) -> Conditions:
    """Normal token embeddings (count, tokens, channels) and pooled ones (count, channels)."""
    tokens = (count, TEXT_TOKENS, int(config["joint_attention_dim"]))
    pooled = (count, int(config["pooled_projection_dim"]))
    return {
        "encoder_hidden_states": torch.randn(tokens, generator=generator),
        "pooled_projections": torch.randn(pooled, generator=generator),
    }


def null_conditions(config: Mapping[str, Any], cond: Mapping[str, Tensor]) -> Conditions:
    """Zeros, which the family was trained to take for a missing text. Used where no text encoder is at hand."""
    return {name: torch.zeros_like(value) for name, value in cond.items()}


def default_guidance(config: Mapping[str, Any]) -> float:
    """7 for SD3 (its pipeline's default), 4.5 for SD3.5 (its model cards), told apart by the norm of the queries."""
    return 4.5 if config.get("qk_norm") else 7.0


def predict(model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predicted velocity, shape and dtype of `latents` (batch, channels, height, width); `timestep` (batch,) 0-1000."""
    dtype = compute_dtype(model)
    kwargs = moved(cond, latents.device, dtype)
    output = model(latents.to(dtype), timestep=timestep.to(latents.device), return_dict=False, **kwargs)[0]
    return first_channels(output, latents)


def tiny(seed: int = 0) -> nn.Module:
    """A random SD3.5-medium of two blocks, width 64: the first attends twice, the last is context_pre_only."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return built(SD3Transformer2DModel, config, seed)
