"""What calibration keeps of each input, enough for every later method.

Shapes: B timestep buckets, K input channels, R reservoir rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FIELDS = ("low", "high", "total", "tokens", "gram", "reservoir", "reservoir_bucket", "priority")


@dataclass(frozen=True)
class InputStatistics:
    """One input. `low`, `high` (B, K) float32 channel ranges of every token; `gram` (K, K) float32, of tokens weighted
    as `meta` says; `total` (K,) float64 and `tokens` (1,) float64 the plain sum and number of tokens; `reservoir`
    (R, K) float32 tokens with their bucket (R,) and the random `priority` (R,) that chose them."""

    low: Tensor
    high: Tensor
    total: Tensor
    tokens: Tensor
    gram: Tensor | None
    reservoir: Tensor
    reservoir_bucket: Tensor
    priority: Tensor

    @property
    def absmax(self) -> Tensor:
        """Largest absolute value of each channel in each bucket, (B, K)."""
        return torch.maximum(self.high, -self.low)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel over all tokens, (K,) float64."""
        return self.total / self.tokens.clamp_min(1e-12)

    def to(self, device: torch.device) -> InputStatistics:
        """The same numbers on a device."""
        held = {name: getattr(self, name) for name in FIELDS}
        return replace(self, **{name: tensor.to(device) for name, tensor in held.items() if tensor is not None})


@dataclass
class Statistics:
    """Inputs by input key, per-block cosine similarity of block input and output by bucket (B,), and `meta`: the
    fingerprint, the settings, and the exact timesteps."""

    inputs: dict[str, InputStatistics]
    blocks: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over every number kept."""
        digest = hashlib.sha256()
        for name, tensor in flatten(self).items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def keep_best(reservoir: Tensor, bucket: Tensor, priority: Tensor, quota: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `quota` rows of highest priority in each bucket, ordered by bucket and priority."""
    order = torch.argsort(priority, descending=True, stable=True)
    order = order[torch.argsort(bucket[order], stable=True)]
    sorted_bucket = bucket[order]
    first = torch.searchsorted(sorted_bucket, sorted_bucket, side="left")
    kept = order[torch.arange(len(order)) - first < quota]
    return reservoir[kept], bucket[kept], priority[kept]


def flatten(statistics: Statistics) -> dict[str, Tensor]:
    """Every tensor under one name, sorted."""
    table = {f"{key}|{name}": getattr(value, name) for key, value in statistics.inputs.items() for name in FIELDS}
    table |= {f"{key}|similarity": value for key, value in statistics.blocks.items()}
    return {name: tensor for name, tensor in sorted(table.items()) if tensor is not None}


def unflatten(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> Statistics:
    """The inverse of `flatten`."""
    inputs: dict[str, dict[str, Any]] = {}
    blocks: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key, _, leaf = name.rpartition("|")
        if leaf == "similarity":
            blocks[key] = tensor
        elif leaf in FIELDS:
            inputs.setdefault(key, {"gram": None})[leaf] = tensor
    return Statistics({key: InputStatistics(**fields) for key, fields in inputs.items()}, blocks, meta)
