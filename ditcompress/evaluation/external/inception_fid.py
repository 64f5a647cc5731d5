"""Fréchet and kernel inception distances and the inception score, in torch-fidelity's port of the TensorFlow Inception.

FID (Heusel et al. 2017), KID (Binkowski et al. 2018) and IS (Salimans et al. 2016) on the 2048 pooled features and the
logits without bias. Images are rounded to 8 bits, as everywhere these scores are published. FID and KID need a
reference; the distance to the original's own samples does not. Features are kept, 12 kB an image; images are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...result import Measurement
from ..local_weights import Pinned, library, pinned, plain_pickle
from ..pixels import Images, batches, to_bytes
from ._distances import (
    GROUPS,
    frechet,
    frechet_difference,
    mmd_difference,
    polynomial,
    score_difference,
)
from ._rows import BATCH
from .base import Samples, enough

LABEL = "Inception FID, KID and score"
EXTRA = "fidelity"
WEIGHTS = ("inception/weights-inception-2015-12-05-6726825d.pth",)

LAYERS = ("2048", "logits_unbiased")
LEAST = 2 * GROUPS  # two pairs in every group of the jackknife


def measure(samples: Samples) -> list[Measurement]:
    n = enough(samples, LEAST)
    if samples.reference is not None and len(samples.reference) < 2:
        samples = Samples(**{**vars(samples), "reference": None})
    weights = pinned(samples, WEIGHTS[0])
    extractor = load_inception(weights, samples.device)
    features, logits = _features(extractor, samples.original, samples.device)
    others, other_logits = _features(extractor, samples.compressed, samples.device)
    identical = bool(np.array_equal(features, others))
    note = weights.note
    rows = [
        Measurement("inception_fd_original", "Fréchet inception distance to the original", "T5", "", False,
                    frechet(features, others), n=n, identical=identical, note=_biased(n, note)),
        _row("inception_score", "inception score", score_difference(logits, other_logits, samples.seed), n,
             identical, _biased(n, note), higher=True),
    ]  # fmt: skip
    if samples.reference is not None:
        real, _ = _features(extractor, samples.reference, samples.device)
        against = f"{len(real)} reference images"
        fid = frechet_difference(features, others, real, samples.seed)
        kid = mmd_difference(features.astype(np.float64), others.astype(np.float64), real.astype(np.float64),
                             polynomial, samples.seed)  # fmt: skip
        rows += [
            _row("inception_fid", "FID", fid, n, identical, f"{_biased(n, note)}; {against}"),
            _row("inception_kid", "KID", kid, n, identical, f"{note}; {against}"),
        ]
    return rows


def _row(
    name: str, label: str, found: tuple[float, float, tuple[float, float]], n: int, identical: bool, note: str,
    *, higher: bool = False,
) -> Measurement:  # fmt: skip
    first, second, (low, high) = found
    return Measurement(name, f"{label}, difference", "T5", "", higher, second - first, low, high, n=n, original=first,
                       compressed=second, identical=identical, note=note)  # fmt: skip


def _biased(n: int, note: str) -> str:
    few = f" (under 10 images a dimension: {n} of 20480)" if n < 20480 else ""
    return f"biased, compare only at the same N{few}; {note}"


def load_inception(weights: Pinned, device: str) -> Any:
    """torch-fidelity reads its weights file with weights_only=False, so the file is read by us first: one that holds
    only tensors has no code to run whichever way it is read."""
    plain_pickle(weights.path)
    inception = library("torch_fidelity.feature_extractor_inceptionv3", f"ditcompress[{EXTRA}]")
    name = "inception-v3-compat"
    extractor = inception.FeatureExtractorInceptionV3(
        name, list(LAYERS), feature_extractor_weights_path=str(weights.path)
    )
    return extractor.eval().to(device)


@torch.no_grad()
def _features(extractor: Any, images: Images, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features (n, 2048) and logits (n, 1008) of every image, float32."""
    found = [extractor(to_bytes(batch).to(device)) for batch in batches(images, BATCH)]
    first, second = (torch.cat([part[i].float().cpu() for part in found]).numpy() for i in (0, 1))
    return first, second
