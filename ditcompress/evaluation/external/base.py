"""Contract of tier T5: metrics that need other people's weights, from local files, through well-kept libraries.

A metric module exports

    LABEL    what the table calls it
    EXTRA    the extra of ditcompress that brings its library ("" where the required dependencies are enough, or where
             the library cannot be installed beside them and so has no extra)
    WEIGHTS  files and folders that it needs below the weights folder
    measure(samples) -> list[Measurement]

and raises `Unavailable` with one line of reason where it cannot be measured. It never downloads and never gives a zero
in place of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..local_weights import Unavailable
from ..pixels import Images


@dataclass(frozen=True)
class Samples:
    """Same-noise images of both models, in one order, and what a metric may need beside them.

    `prompts` has one text for each image; `reference` are real images of any number; `weights` is the user's
    --weights-dir.
    """

    original: Images
    compressed: Images
    reference: Images | None = None
    prompts: tuple[str, ...] | None = None
    weights: Path | None = None
    device: str = "cpu"
    seed: int = 0


def enough(samples: Samples, least: int) -> int:
    """The number of pairs; Unavailable where there are fewer than `least` or the sets differ in length."""
    n = len(samples.original)
    if len(samples.compressed) != n:
        raise Unavailable(f"{n} original and {len(samples.compressed)} compressed images are not pairs")
    if n < least:
        raise Unavailable(f"{n} images are too few: {least} are needed")
    return n


def prompts_of(samples: Samples) -> tuple[str, ...]:
    """One prompt for each image, or Unavailable."""
    if samples.prompts is None:
        raise Unavailable("the samples have no prompts")
    if len(samples.prompts) != len(samples.original):
        raise Unavailable(f"{len(samples.prompts)} prompts for {len(samples.original)} images")
    return samples.prompts
