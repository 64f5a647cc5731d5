"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024): text-conditional, one adaLN shared by all blocks.

The modulation of a block is its own `scale_shift_table` plus the output of one linear that all blocks share
(`adaln_single`). No block can fold a scale into that linear without changing the others, so the inputs of
self-attention and feed-forward stay online. Cross-attention reads its queries from the unnormalised residual stream
and its keys and values from the projected caption, one input for all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import Tensor, nn

from ._inputs import Conditions, built, compute_dtype, first_channels, moved
from ._table import Table, listed
from .base import Layout

CLASSES = ("PixArtTransformer2DModel",)

CAPTION_TOKENS = 120  # what PixArt-alpha was trained with; Sigma takes up to 300
VAE_FACTOR = 8  # pixels per latent pixel, for the resolution condition


def layout(model: nn.Module) -> Layout:
    """The sites and axes of a PixArt model."""
    table = Table(model)
    blocks = listed(model, "transformer_blocks")
    for part in ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder"):
        table.two_layers(f"adaln_single.emb.{part}", "time_embedding")
    table.site("adaln_single.linear", "modulation")
    caption = ""
    if table.has("caption_projection.linear_1"):
        table.two_layers("caption_projection", "embedding")
        # A scale could fold into the projection, but only one for all blocks at once; blocks are compressed one by
        # one, so the axis is declared for its statistics and stays online.
        caption = table.axis("caption_projection.out", table.rows("caption_projection.linear_2"), "channel")
    for block in blocks:
        _block(table, block, caption)
    table.site("proj_out", "head")
    return table.finish(blocks)


def _block(table: Table, block: str, caption: str) -> None:
    attention = table.axis(f"{block}.norm1.out", table.columns(f"{block}.attn1.to_q"), "channel")
    table.attention(f"{block}.attn1", attention, block)
    if table.has(f"{block}.attn2.to_q"):
        context = caption or table.axis(f"{block}.caption", table.columns(f"{block}.attn2.to_k"), "channel")
        table.attention(f"{block}.attn2", "", block, context=context)
    hidden = ""  # experts read their layer's own input
    if not table.is_moe(f"{block}.ff"):
        hidden = table.axis(f"{block}.norm2.out", table.columns(f"{block}.ff.net.0.proj"), "channel")
    table.feed_forward(f"{block}.ff", hidden, block)


def latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, height, width) of one latent image."""
    return int(config["in_channels"]), int(config["sample_size"]), int(config["sample_size"])


def default_scheduler(config: Mapping[str, Any]) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order over the linear schedule, as the family's pipelines ship."""
    return DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def _caption_channels(config: Mapping[str, Any]) -> int:
    return int(config.get("caption_channels") or config["cross_attention_dim"])


def random_conditions(config: Mapping[str, Any], count: int, generator: torch.Generator) -> Conditions:
    """Normal caption embeddings (count, tokens, channels) and a mask (count, tokens) of random caption lengths."""
    shape = (count, CAPTION_TOKENS, _caption_channels(config))
    lengths = torch.randint(8, CAPTION_TOKENS + 1, (count, 1), generator=generator)
    return {
        "encoder_hidden_states": torch.randn(shape, generator=generator),
        "encoder_attention_mask": (torch.arange(CAPTION_TOKENS) < lengths).long(),
    }


def null_conditions(config: Mapping[str, Any], cond: Mapping[str, Tensor]) -> Conditions:
    """An empty caption: one token of zeros. Used only where no text encoder gives the real one."""
    mask = torch.zeros_like(cond["encoder_attention_mask"])
    mask[:, 0] = 1
    return {
        **cond,
        "encoder_hidden_states": torch.zeros_like(cond["encoder_hidden_states"]),
        "encoder_attention_mask": mask,
    }


def default_guidance(config: Mapping[str, Any]) -> float:
    """Guidance scale of the family's pipeline."""
    return 4.5


def _size_conditions(model: nn.Module, latents: Tensor) -> Conditions:
    """Resolution (batch, 2) in pixels and aspect ratio (batch, 1) of the image, for models trained with them."""
    height, width = (VAE_FACTOR * side for side in latents.shape[-2:])
    resolution = latents.new_tensor([[height, width]]).expand(len(latents), 2)
    ratio = latents.new_tensor([[height / width]]).expand(len(latents), 1)
    dtype = compute_dtype(model)
    return {"resolution": resolution.to(dtype), "aspect_ratio": ratio.to(dtype)}


def predict(model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predicted noise, shape and dtype of `latents` (batch, channels, height, width); `timestep` is (batch,)."""
    dtype = compute_dtype(model)
    kwargs: dict[str, Any] = dict(moved(cond, latents.device, dtype))
    if getattr(model, "use_additional_conditions", False):
        kwargs["added_cond_kwargs"] = _size_conditions(model, latents)
    output = model(latents.to(dtype), timestep=timestep.to(latents.device), return_dict=False, **kwargs)[0]
    return first_channels(output, latents)


def tiny(seed: int = 0) -> nn.Module:
    """A random PixArt-alpha of two blocks, width 96, with the size conditions of its 1024-pixel model."""
    config = {
        "num_attention_heads": 6,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 96,
        "sample_size": 8,
        "caption_channels": 48,
        "use_additional_conditions": True,
    }
    return built(PixArtTransformer2DModel, config, seed)
