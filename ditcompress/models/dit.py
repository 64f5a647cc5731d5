"""DiT (Peebles and Xie 2023): class-conditional, adaLN-zero in every block, noise prediction with learned variance.

Every block embeds time and label by itself (`norm1.emb`) and turns the embedding into six chunks of rows of
`norm1.linear`: shift, scale, gate of the attention, then of the feed-forward. The head is modulated from the first
block's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from ._inputs import Conditions, built, compute_dtype, first_channels, moved
from ._table import Table, adaln_fold, listed
from .base import Layout

CLASSES = ("DiTTransformer2DModel",)


def layout(model: nn.Module) -> Layout:
    """The sites and axes of a DiT."""
    table = Table(model)
    blocks = listed(model, "transformer_blocks")
    for block in blocks:
        _block(table, block)
    embedding = table.sites[f"{blocks[0]}.norm1.linear"].reads if blocks else ("",)
    dim = table.columns("proj_out_2")
    fold = adaln_fold("proj_out_1", table.modules["proj_out_1"], dim, shift=0, scale=1)
    head = table.axis("norm_out.out", dim, "channel", fold=fold)
    table.site("proj_out_1", "modulation", embedding)
    table.site("proj_out_2", "head", (head,))
    return table.finish(blocks)


def _block(table: Table, block: str) -> None:
    norm = f"{block}.norm1"
    table.two_layers(f"{norm}.emb.timestep_embedder", "time_embedding", block)
    embedding = table.axis(f"{norm}.emb.out", table.columns(f"{norm}.linear"), "channel")
    table.site(f"{norm}.linear", "modulation", (embedding,), ("",), block)
    attention = table.adaln_input(f"{norm}.out", norm, shift=0, scale=1, chunks=6)
    table.attention(f"{block}.attn1", attention, block)
    feed_forward = table.adaln_input(f"{block}.norm3.out", norm, shift=3, scale=4, chunks=6)
    table.feed_forward(f"{block}.ff", feed_forward, block)


def latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, height, width) of one latent image."""
    return int(config["in_channels"]), int(config["sample_size"]), int(config["sample_size"])


def default_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM over the linear schedule that DiT was trained with."""
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def random_conditions(config: Mapping[str, Any], count: int, generator: torch.Generator) -> Conditions:
    """`count` class labels drawn uniformly, shape (count,)."""
    return {"class_labels": torch.randint(0, int(config["num_embeds_ada_norm"]), (count,), generator=generator)}


def null_conditions(config: Mapping[str, Any], cond: Mapping[str, Tensor]) -> Conditions:
    """The label that stands for "no class": one past the last."""
    return {"class_labels": torch.full_like(cond["class_labels"], int(config["num_embeds_ada_norm"]))}


def default_guidance(config: Mapping[str, Any]) -> float:
    """Guidance scale of the family's pipeline."""
    return 4.0


def predict(model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predicted noise, shape and dtype of `latents` (batch, channels, height, width); `timestep` is (batch,)."""
    dtype = compute_dtype(model)
    kwargs = moved(cond, latents.device, dtype)
    output = model(latents.to(dtype), timestep=timestep.to(latents.device), return_dict=False, **kwargs)[0]
    return first_channels(output, latents)


def tiny(seed: int = 0) -> nn.Module:
    """A random DiT of two blocks, width 64."""
    config = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    return built(DiTTransformer2DModel, config, seed)
