"""Feature extractors for T4: one kind a file, registered under its name.

An extractor module exports LABEL and `open_extractor(request) -> Extractor`, which raises E335 for one that is too
weak and E337 for one that cannot be used. Numbers of different extractors are never comparable, so its name and hash
stand beside every number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...console import Reporter, Silent
from ...errors import DitcompressError
from ...registry import Registry
from ..reference import Reference

registry = Registry("ditcompress.evaluation.extractors", "extractor", ("LABEL", "open_extractor"))


@dataclass(frozen=True)
class Request:
    """What an extractor may need: `argument` (behind the colon of --extractor), the image `shape`, the reference, the
    folder of local weights, a folder that keeps trained ones, the least held-out accuracy."""

    argument: str
    shape: tuple[int, int, int]
    reference: Reference | None = None
    weights: Path | None = None
    cache: Path | None = None
    floor: float = 0.9
    seed: int = 0
    device: str = "cpu"
    reporter: Reporter = field(default_factory=Silent)


@dataclass(frozen=True)
class Extractor:
    """`features` maps images (n, channels, height, width) in [-1, 1] to (n, dimensions), `logits` to (n, classes);
    `accuracy` is that on held-out labelled images, `sha256` of the weights."""

    name: str
    sha256: str
    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None
    classes: int | None = None
    accuracy: float | None = None
    weak: bool = False

    @property
    def title(self) -> str:
        """Name, hash and accuracy, as printed beside its numbers."""
        parts = [self.name, self.sha256[:8]]
        parts += [f"{100 * self.accuracy:.1f} % held-out accuracy"] if self.accuracy is not None else []
        return " ".join([*parts, "(weak)"] if self.weak else parts)


def choose(asked: str, request_of: Callable[[str], Request], digits: bool) -> Extractor | None:
    """The extractor of --extractor NAME[:ARGUMENT]. "auto": the embedded classifier for the embedded model; one
    trained on the reference where that has labels; random features for a reference without; else None."""
    if asked == "none":
        return None
    name, _, argument = asked.partition(":")
    if name == "auto":
        reference = request_of("").reference
        if digits:
            name = "digits"
        elif reference is not None:
            name = "trained" if reference.labels is not None else "random"
        else:
            return None
    return registry.get(name).open_extractor(request_of(argument))


def failed(where: object, error: BaseException | str, remedy: str) -> DitcompressError:
    """E337 with the first line of what went wrong."""
    text = str(error) if isinstance(error, str) else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return DitcompressError("E337", where, text, remedy)


def module_digest(module: nn.Module) -> str:
    """sha256 over the state dict of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def extract(extractor: Extractor, chunks: Iterable[Tensor], advance: Callable[[int], None] | None = None) -> np.ndarray:
    """Features of all images, (n, dimensions) float64. Images are clamped to [-1, 1], as when they are saved."""
    found = []
    with torch.no_grad():
        for chunk in chunks:
            images = chunk.clamp(-1, 1)
            output = _checked(extractor, extractor.features(images), len(images))
            found.append(output.detach().double().cpu().numpy())
            if advance is not None:
                advance(len(images))
    return np.concatenate(found)


def _checked(extractor: Extractor, output: Any, n: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != n:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise failed(extractor.name, f"gave {shape} for {n} images", "return features (images, dimensions)")
    return output.flatten(1)
