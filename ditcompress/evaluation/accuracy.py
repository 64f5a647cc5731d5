"""T4 for class-conditional models: does a sample still carry the class that was asked for?

Label faults are invisible to every distribution metric, so this is measured whenever a classifier is at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import DitcompressError
from ..result import Measurement
from .intervals import mean_interval, paired_proportion, rare_rate
from .paired import Pairs
from .subject import Subject

Classifier = Callable[[Tensor], Tensor]  # images (n, channels, height, width) to logits (n, classes)


def find_classifier(subject: Subject) -> tuple[Classifier, str] | None:
    """The asked-for classifier and its name; the embedded one for the embedded model; None where there is none."""
    name = subject.settings.classifier
    if name == "none":
        return None
    if name == "digits" or (name == "auto" and _is_digits(subject)):
        from .digits import load_digit_classifier

        return load_digit_classifier(), "embedded digit classifier"
    if name == "auto":
        return None
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DitcompressError(
            "E203", f"--classifier {name}", f"cannot be imported ({error})", "give module:function"
        ) from None
    return found, name


def _is_digits(subject: Subject) -> bool:
    """Whether the original has the shape of the embedded model: 8x8 grey images and ten classes."""
    config = subject.config
    shape = subject.adapter.latent_shape(config)
    return tuple(shape) == (1, 8, 8) and config.get("num_embeds_ada_norm") == 10


def logits(classifier: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([classifier(part.clamp(-1, 1)) for part in images.split(256)])


def measurements(subject: Subject, pairs: Pairs, classifier: Classifier, name: str) -> list[Measurement]:
    """Class accuracy of both models with the paired interval of the difference, and the rate of changed labels."""
    labels = subject.conditions.labels
    if labels is None:
        return []
    labels, n = labels[: len(pairs.original)], len(pairs.original)
    first, second = logits(classifier, pairs.original).argmax(1), logits(classifier, pairs.compressed).argmax(1)
    right, still = (first == labels).numpy(), (second == labels).numpy()
    low, high = paired_proportion(right, still)
    flips = int((first != second).sum())
    flip_low, flip_high = rare_rate(flips, n)
    identical = bool(torch.equal(pairs.original, pairs.compressed))
    difference = 100 * float(still.mean() - right.mean())
    return [
        *_feature_cosine(pairs, classifier, name),
        Measurement("class_accuracy", "class accuracy, difference", "T4", "pp", True, difference,
                    100 * low, 100 * high, n=n,
                    original=100 * float(right.mean()), compressed=100 * float(still.mean()), identical=identical,
                    note=name),
        Measurement("label_flips", "samples whose class changed", "T3", "%", False, 100 * flips / n, 100 * flip_low,
                    100 * flip_high, n=n, identical=identical, note=name),
    ]  # fmt: skip


def _feature_cosine(pairs: Pairs, classifier: Classifier, name: str) -> list[Measurement]:
    """Mean cosine of the pairs' features, for a classifier that has `features(images) -> (n, dimensions)`."""
    extract = getattr(classifier, "features", None)
    if extract is None:
        return []
    first, second = logits(extract, pairs.original), logits(extract, pairs.compressed)
    values = torch.nn.functional.cosine_similarity(first.double(), second.double()).numpy()
    low, high = mean_interval(values)
    identical = bool(torch.equal(pairs.original, pairs.compressed))
    return [
        Measurement("feature_cosine", "cosine of classifier features", "T3", "", True, float(values.mean()), low, high,
                    n=len(values), identical=identical, note=name)
    ]  # fmt: skip


def per_class(subject: Subject, pairs: Pairs, classifier: Classifier) -> list[dict[str, float]]:
    """Accuracy of both models for each class that was asked for."""
    labels = subject.conditions.labels
    if labels is None:
        return []
    labels = labels[: len(pairs.original)]
    first = (logits(classifier, pairs.original).argmax(1) == labels).numpy()
    second = (logits(classifier, pairs.compressed).argmax(1) == labels).numpy()
    values = labels.numpy()
    return [
        {"label": int(c), "n": int((values == c).sum()), "original": float(first[values == c].mean()),
         "compressed": float(second[values == c].mean())}
        for c in np.unique(values)
    ]  # fmt: skip
