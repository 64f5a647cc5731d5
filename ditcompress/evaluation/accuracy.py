"""T4 for class-conditional models: does a sample still carry the class that was asked for?

Label faults are invisible to every distribution metric, so this is measured whenever a classifier is at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DitcompressError
from ..result import Measurement
from .extractors import Extractor
from .images import ImageSet
from .intervals import mean_interval, paired_proportion, rare_rate
from .subject import Subject

Classifier = Callable[[Tensor], Tensor]  # images (n, channels, height, width) to logits (n, classes)


def find_classifier(subject: Subject, extractor: Extractor | None) -> tuple[Classifier, str] | None:
    """The classifier that was asked for, else the extractor's own; None where there is none. E203 for a name that
    cannot be imported."""
    name = subject.settings.classifier
    if name == "none":
        return None
    if name == "auto":
        return None if extractor is None or extractor.logits is None else (extractor.logits, extractor.title)
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute), name
    except (ImportError, AttributeError, ValueError) as error:
        raise DitcompressError(
            "E203", f"--classifier {name}", f"cannot be imported ({error})", "give module:function"
        ) from None


@dataclass(frozen=True)
class Judged:
    """Guessed classes (n,) of both models' images, the asked-for labels, and the cosine of the pairs' features."""

    original: np.ndarray
    compressed: np.ndarray
    labels: np.ndarray
    cosine: np.ndarray | None
    identical: bool


def judge(subject: Subject, sets: dict[str, ImageSet], classifier: Classifier) -> Judged:
    """Classify every pair, a chunk at a time. E336 where the classifier knows fewer classes than were asked for."""
    labels = subject.conditions.labels
    assert labels is not None
    labels = labels[: len(sets["original"])]
    extract = getattr(classifier, "features", None)
    first, second, cosine, identical = [], [], [], True
    for a, b in _pairs(sets):
        scores = _scores(classifier, a, int(labels.max()) + 1)
        first.append(scores.argmax(1))
        second.append(_scores(classifier, b, 0).argmax(1))
        identical &= bool(torch.equal(a, b))
        if extract is not None:
            cosine.append(_cosine(extract, a, b))
    return Judged(
        torch.cat(first).numpy(), torch.cat(second).numpy(), labels.numpy(),
        torch.cat(cosine).numpy() if cosine else None, identical,
    )  # fmt: skip


def _pairs(sets: dict[str, ImageSet]) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(sets["original"].chunks(), sets["compressed"].chunks(), strict=True)


def _scores(classifier: Classifier, images: Tensor, least: int) -> Tensor:
    with torch.no_grad():
        scores = classifier(images.clamp(-1, 1))
    if scores.ndim != 2 or scores.shape[1] < least:
        raise DitcompressError(
            "E336", "classifier", f"gives {tuple(scores.shape)}, the model was asked for {least} classes",
            "give a classifier of the model's classes",
        )  # fmt: skip
    return scores


def _cosine(extract: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        x, y = extract(a.clamp(-1, 1)).double(), extract(b.clamp(-1, 1)).double()
    return torch.nn.functional.cosine_similarity(x, y)


def measurements(found: Judged, name: str) -> list[Measurement]:
    """Class accuracy of both models with the paired interval of the difference, and the rate of changed labels."""
    n = len(found.labels)
    right, still = found.original == found.labels, found.compressed == found.labels
    low, high = paired_proportion(right, still)
    flips = int((found.original != found.compressed).sum())
    flip_low, flip_high = rare_rate(flips, n)
    rows: list[Measurement] = []
    if found.cosine is not None:
        a, b = mean_interval(found.cosine)
        mean = float(found.cosine.mean())
        label = "cosine of classifier features"
        rows.append(Measurement("feature_cosine", label, "T3", "", True, mean, a, b, n=n, identical=found.identical))
    return [
        *rows,
        Measurement("class_accuracy", "class accuracy, difference", "T4", "pp", True,
                    100 * float(still.mean() - right.mean()), 100 * low, 100 * high, n=n,
                    original=100 * float(right.mean()), compressed=100 * float(still.mean()),
                    identical=found.identical, note=name),
        Measurement("label_flips", "samples whose class changed", "T3", "%", False, 100 * flips / n, 100 * flip_low,
                    100 * flip_high, n=n, identical=found.identical),
    ]  # fmt: skip


def per_class(found: Judged) -> list[dict[str, Any]]:
    """Accuracy of both models for each class that was asked for."""
    return [
        {"label": int(c), "n": int((found.labels == c).sum()),
         "original": float((found.original[found.labels == c] == c).mean()),
         "compressed": float((found.compressed[found.labels == c] == c).mean())}
        for c in np.unique(found.labels)
    ]  # fmt: skip
