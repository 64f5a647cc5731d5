"""Sampling for evaluation: any adapter, any diffusers scheduler, guided, batched, resumable, the same image for the
same index whatever the batch size."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..console import Reporter
from .images import ImageSet
from .subject import Subject

FRESH = 7_919  # added to the seed for images of the original from other noise


def image_sets(subject: Subject, folder: Path, pairs: int, fresh: bool, reporter: Reporter) -> dict[str, ImageSet]:
    """`pairs` images of both models from the same noise, and with `fresh` of the original from other noise."""
    seed = subject.settings.seed
    wanted: list[tuple[str, nn.Module, int]] = [
        ("original", subject.original, seed),
        ("compressed", subject.compressed, seed),
    ]
    wanted += [("fresh", subject.original, seed + FRESH)] if fresh else []
    sets = {}
    with reporter.task("samples of both models", len(wanted) * pairs) as advance:
        for name, model, its_seed in wanted:

            def draw(indices: list[int], model: nn.Module = model, its_seed: int = its_seed) -> Tensor:
                return subject.images(model, indices, seed=its_seed)

            sets[name] = ImageSet(folder, name, pairs).fill(draw, advance)
    return sets


def sample_set(subject: Subject, folder: Path, count: int, reporter: Reporter) -> ImageSet:
    """`count` images of one model, resumable."""
    with reporter.task("samples", count) as advance:
        return ImageSet(folder, "sample", count).fill(
            lambda indices: subject.images(subject.original, indices), advance
        )
