"""MMD in CLIP's image features, after CMMD (Jayasumana et al. 2024): Gaussian kernel of width 10, times 1000.

Two departures, both said in the table: the unbiased estimator (CMMD's own is biased), which between same-noise sets
leaves out the correlated pairs; and the model is the one in the folder (CMMD's is clip-vit-large-patch14-336).
"""

from __future__ import annotations

import numpy as np
import torch

from ...result import Measurement
from ..clip import Clip, load_clip
from ..pixels import Images, batches
from ._distances import GROUPS, gaussian, mmd_difference, mmd_paired
from ._rows import BATCH
from .base import Samples, enough

LABEL = "CLIP MMD"
EXTRA = ""
WEIGHTS = ("clip",)

SCALE = 1000.0  # as published


def measure(samples: Samples) -> list[Measurement]:
    n = enough(samples, 2 * GROUPS)
    clip = load_clip(samples, WEIGHTS[0], texts=False)
    original, compressed = _features(clip, samples.original), _features(clip, samples.compressed)
    identical = bool(np.array_equal(original, compressed))
    note = f"unbiased, not CMMD's own estimator; {clip.note}"
    rows = [
        Measurement("clip_mmd_original", "CLIP MMD to the original, x1000", "T5", "", False,
                    SCALE * mmd_paired(original, compressed, gaussian), n=n, identical=identical, note=note)
    ]  # fmt: skip
    if samples.reference is not None and len(samples.reference) > 1:
        real = _features(clip, samples.reference)
        first, second, (low, high) = mmd_difference(original, compressed, real, gaussian, samples.seed)
        rows.append(
            Measurement("clip_mmd", "CLIP MMD to the reference, x1000, difference", "T5", "", False,
                        SCALE * (second - first), SCALE * low, SCALE * high, n=n, original=SCALE * first,
                        compressed=SCALE * second, identical=identical,
                        note=f"{note}; {len(real)} reference images")
        )  # fmt: skip
    return rows


def _features(clip: Clip, images: Images) -> np.ndarray:
    """Unit features of every image, float64 (n, dimensions)."""
    return torch.cat([clip.images(batch) for batch in batches(images, BATCH)]).numpy()
