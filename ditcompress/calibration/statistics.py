"""What calibration keeps of each input, enough for every later method; statistics of parts merge to the whole.

Shapes: B timestep buckets, K input channels, R reservoir rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DitcompressError

FIELDS = ("low", "high", "total", "tokens", "gram", "reservoir", "reservoir_bucket", "priority")


@dataclass(frozen=True)
class InputStatistics:
    """One input. `low`, `high` (B, K) float32 channel ranges of every token; `gram` (K, K) float32 and `total` (K,)
    float64 over the weighted tokens it was built from, `tokens` (1,) float64 their weight; `reservoir` (R, K) float32
    tokens with their bucket (R,) and the random `priority` (R,) that chose them."""

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
        """Weighted mean of each channel, (K,) float64."""
        return self.total / self.tokens.clamp_min(1e-12)


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


def merge_inputs(a: InputStatistics, b: InputStatistics, quota: int) -> InputStatistics:
    """The statistics of both sets of tokens. Sums are exact up to their rounding, ranges and reservoir exactly."""
    if a.low.shape != b.low.shape or (a.gram is None) != (b.gram is None):
        raise DitcompressError("E331", "statistics", "the two parts have different shapes", "calibrate both alike")
    rows = [
        torch.cat(pair)
        for pair in ((a.reservoir, b.reservoir), (a.reservoir_bucket, b.reservoir_bucket), (a.priority, b.priority))
    ]
    reservoir, bucket, priority = keep_best(rows[0], rows[1], rows[2], quota)
    gram = None if a.gram is None or b.gram is None else a.gram + b.gram
    return InputStatistics(
        torch.minimum(a.low, b.low), torch.maximum(a.high, b.high), a.total + b.total, a.tokens + b.tokens,
        gram, reservoir, bucket, priority,
    )  # fmt: skip


def merge(a: Statistics, b: Statistics, quota: int) -> Statistics:
    """Statistics of two parts of one calibration; block similarities are averaged."""
    if a.inputs.keys() != b.inputs.keys():
        raise DitcompressError("E331", "statistics", "the two parts know different inputs", "calibrate both alike")
    inputs = {key: merge_inputs(a.inputs[key], b.inputs[key], quota) for key in a.inputs}
    blocks = {key: (value + b.blocks[key]) / 2 for key, value in a.blocks.items() if key in b.blocks}
    return Statistics(inputs, blocks, {**a.meta, "merged": True})


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
