"""Sampling for evaluation: any adapter, any diffusers scheduler, guided, batched, resumable, the same image for the
same index whatever the batch size, or the number of processes: each makes its images of every chunk, the first one
stores them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..console import Reporter
from ..ranks import ALONE, Ranks
from .images import ImageSet
from .subject import Subject

FRESH = 7_919  # added to the seed for images of the original from other noise


def image_sets(
    subject: Subject, folder: Path, pairs: int, fresh: bool, reporter: Reporter, ranks: Ranks = ALONE
) -> dict[str, ImageSet]:
    """`pairs` images of both models from the same noise, and with `fresh` of the original from other noise.

    `folder` is the first process's; the sets of the others hold nothing."""
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
                return _dealt(subject, model, indices, its_seed, ranks)

            sets[name] = ImageSet(folder, name, pairs)
            missing = ranks.lead(sets[name].missing)
            if ranks.first:
                sets[name].fill(draw, advance)
                continue
            for start in missing:
                draw(sets[name].indices(start))
    return sets


def sample_set(subject: Subject, folder: Path, count: int, reporter: Reporter) -> ImageSet:
    """`count` images of one model, resumable."""
    with reporter.task("samples", count) as advance:
        return ImageSet(folder, "sample", count).fill(
            lambda indices: subject.images(subject.original, indices), advance
        )


def _dealt(subject: Subject, model: nn.Module, indices: list[int], seed: int, ranks: Ranks) -> Tensor:
    """Images that all processes make together, in order on the first one."""
    with ranks.together():
        own = ranks.own(indices)
        made = subject.images(model, own, seed=seed) if own else None
    images = ranks.undealt(made)
    return torch.empty(0) if images is None else images
