"""Per-image scores of both models, and the rows of the table that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...result import Measurement
from ..intervals import mean_interval
from ..local_weights import Unavailable
from ..pixels import batches
from .base import Samples, enough

BATCH = 16


@dataclass(frozen=True)
class Scores:
    """One score for each image, float64 (n,); `identical` where every image of one model equals the other's."""

    original: np.ndarray
    compressed: np.ndarray
    identical: bool


def pairs(samples: Samples, size: int = BATCH) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Place in the set, and RGB images of both models (n, 3, height, width), a batch at a time."""
    start = 0
    for first, second in zip(batches(samples.original, size), batches(samples.compressed, size), strict=True):
        if first.shape != second.shape:
            raise Unavailable(f"images of the models differ in shape: {tuple(first.shape)}, {tuple(second.shape)}")
        yield slice(start, start + len(first)), first, second
        start += len(first)


def scores(samples: Samples, score: Callable[[slice, Tensor], np.ndarray], size: int = BATCH) -> Scores:
    """`score(place, images) -> (n,)` of every image of both models. Equal batches are scored once."""
    enough(samples, 2)
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    identical = True
    with torch.no_grad():
        for place, first, second in pairs(samples, size):
            same = torch.equal(first, second)
            identical &= same
            value = np.asarray(score(place, first), np.float64)
            found[0].append(value)
            found[1].append(value if same else np.asarray(score(place, second), np.float64))
    return Scores(np.concatenate(found[0]), np.concatenate(found[1]), identical)


def difference(name: str, label: str, found: Scores, note: str, *, unit: str = "", higher: bool = True) -> Measurement:
    """Mean paired difference compressed minus original with its t interval; Unavailable for scores not finite."""
    delta = found.compressed - found.original
    if not np.isfinite(delta).all():
        raise Unavailable("some scores are not finite")
    low, high = mean_interval(delta)
    return Measurement(
        name, f"{label}, difference", "T5", unit, higher, float(delta.mean()), low, high, n=len(delta),
        original=float(found.original.mean()), compressed=float(found.compressed.mean()),
        identical=found.identical, note=note,
    )  # fmt: skip
