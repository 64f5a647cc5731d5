"""Search and judgement of scheduler coefficients (Q-Sched, Frumkin and Marculescu 2025, arXiv 2509.01624).

Search and judgement use different images. The searched vectors are kept only where the paired bootstrap interval of
the score's gain over all ones lies above 0 and no metric beside it (SSIM; TC and IQ) is certainly worse: least squares
shrinks what it cannot repair, which PSNR rewards and SSIM shows. The same search with the original in place of the
compressed model stands beside it: what that gains is tuning of the score, not repair of rounding.

The score is TC + 2 IQ of two image-text metrics where they are given (the paper's JAQ), else the PSNR to the original
model's images of the same noise. `grid` is the paper's pair of ramps, coarse to fine; `gain` and `trajectory` are
closed forms (see calibration/coefficients.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration import coefficients as closed
from ..calibration.coefficients import Drive
from ..console import Reporter
from ..errors import DitcompressError
from ..runtime.coefficients import with_coefficients
from . import metrics
from .intervals import bca_interval
from .subject import Subject

METHODS = (*closed.METHODS, "grid")
QUALITY_WEIGHT = 2.0  # k of JAQ = TC + k IQ
SAME = 150.0  # dB that count for identical images
POINTS = 5  # a side of either grid
FALLBACK = "PSNR to the original model's images of the same noise (no image-text metric was given)"
Metric = Callable[[Tensor, Sequence[str]], Any]


@dataclass(frozen=True)
class Search:
    """`images` are searched on, the `held_out` ones after them are judged on; `low` and `high` bound the grid."""

    method: str = "trajectory"
    images: int = 32
    held_out: int = 128
    low: float = 0.8
    high: float = 1.2
    compatibility: str = ""  # TC and IQ as module:function of (images in [-1, 1], prompts) -> one number an image
    quality: str = ""


@dataclass(frozen=True)
class Found:
    """Vectors of one model, the points tried, and every metric on held-out images: all ones against searched."""

    model: list[float]
    sample: list[float]
    table: list[dict[str, float]]
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ones(self) -> bool:
        return all(value == 1 for value in (*self.model, *self.sample))


class Judge:
    """Scores of a model under given vectors, on the same noise and conditions each time."""

    def __init__(self, subject: Subject, search: Search) -> None:
        self.subject, self.search = subject, search
        self.steps = subject.settings.steps
        self.metrics = _plugins(search)
        self.score = "jaq" if self.metrics else "psnr"
        self.guards = tuple(self.metrics) or ("ssim",)  # what the score must not be bought with
        self.references: dict[tuple[int, ...], Tensor] = {}
        if self.metrics and not subject.makes_images:
            raise DitcompressError(
                "E205", "--compatibility", "the model makes latents", "give the folder with its vae/"
            )

    def images(self, model: nn.Module, vectors: tuple[list[float], list[float]], indices: list[int]) -> Tensor:
        scheduler = with_coefficients(self.subject.scheduler, *vectors)
        return replace(self.subject, scheduler=scheduler).images(model, indices)

    def values(
        self, model: nn.Module, vectors: tuple[list[float], list[float]], indices: list[int]
    ) -> dict[str, np.ndarray]:
        """Every metric of each image; E701 where an image is not finite."""
        made = self.images(model, vectors, indices)
        if not bool(torch.isfinite(made).all()):
            raise DitcompressError("E701", "q-sched", "an image is not finite", "narrow the grid with --low and --high")
        reference = self._reference(indices)
        peak = 2.0 if self.subject.makes_images else float(reference.max() - reference.min())
        found = {name: metric.values(reference, made, peak).numpy() for name, metric in metrics.registry.all().items()}
        found["psnr"] = np.minimum(found["psnr"], SAME)
        if self.metrics:
            texts = self._texts(indices)
            found |= {name: _checked(name, metric(made, texts), len(made)) for name, metric in self.metrics.items()}
            found["jaq"] = found["tc"] + QUALITY_WEIGHT * found["iq"]
        return found

    def _reference(self, indices: list[int]) -> Tensor:
        key = tuple(indices)
        if key not in self.references:
            self.references[key] = self.subject.images(self.subject.original, indices)
        return self.references[key]

    def _texts(self, indices: list[int]) -> list[str]:
        """Prompts of the images, or their class labels as text."""
        texts, labels = self.subject.conditions.texts(max(indices) + 1), self.subject.conditions.labels
        if texts is None and labels is None:
            raise DitcompressError("E330", "q-sched", "the metrics need prompts", "give a pipeline with text encoders")
        return [texts[i] if texts is not None else str(int(labels[i])) for i in indices]  # type: ignore[index]


def _plugins(search: Search) -> dict[str, Metric]:
    """The two metrics by name, or none; E203 where one is missing or cannot be imported."""
    named = {"tc": search.compatibility, "iq": search.quality}
    if not any(named.values()):
        return {}
    made = {}
    for option, (name, text) in zip(("--compatibility", "--quality"), named.items(), strict=True):
        module, _, attribute = text.partition(":")
        try:
            made[name] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            what = f"{text!r} cannot be imported ({type(error).__name__})"
            raise DitcompressError("E203", option, what, "give both metrics as module:function") from None
    return made


def _checked(name: str, values: Any, count: int) -> np.ndarray:
    """One finite number an image: a failing metric stops the search, it never counts as 0."""
    found = np.asarray(torch.as_tensor(values).detach().double().cpu())
    if found.shape != (count,) or not np.isfinite(found).all():
        what = f"gave {found.shape} values or some that are not finite for {count} images"
        raise DitcompressError("E701", f"metric {name}", what, "correct the metric")
    return found


# --- search ----------------------------------------------------------------------------------------------------------


def search_both(judge: Judge, reporter: Reporter) -> tuple[Found, Found]:
    """The compressed model's coefficients, and the control: the original's in its place."""
    subject = judge.subject
    reporter.note(f"searching {judge.search.method} coefficients of {judge.steps} steps, then the control")
    return find(judge, subject.compressed, reporter), find(judge, subject.original, reporter)


def find(judge: Judge, model: nn.Module, reporter: Reporter) -> Found:
    """Search on the first images, judge on the others."""
    search, subject, ones = judge.search, judge.subject, [1.0] * judge.steps
    seen = list(range(search.images))
    if search.method == "grid":
        vectors, table = grid(judge, model, seen, reporter)
    else:
        drive = Drive(subject.adapter, subject.config, subject.scheduler, subject.conditions, subject.sampling())
        method = {"gain": closed.gain, "trajectory": closed.trajectory}[search.method]
        vectors = method(subject.original, model, drive, seen, reporter)
        table = [_row(judge, model, v, seen, {"searched": float(v is vectors)}) for v in ((ones, ones), vectors)]
    held = list(range(search.images, search.images + search.held_out))
    before, after = judge.values(model, (ones, ones), held), judge.values(model, vectors, held)
    seed = subject.settings.seed
    return Found(*vectors, table, {name: _compared(before[name], after[name], seed) for name in before})


def _row(
    judge: Judge,
    model: nn.Module,
    vectors: tuple[list[float], list[float]],
    indices: list[int],
    marks: dict[str, float],
) -> dict[str, float]:
    """A row of the score table: marks, terms and the score that is maximised."""
    values = judge.values(model, vectors, indices)
    terms = {name: float(values[name].mean()) for name in (*judge.metrics, "psnr")}
    return {**marks, **terms, "score": float(values[judge.score].mean())}


def ramp(start: float, steps: int) -> list[float]:
    """The paper's vector: linspace(start, 1, S)."""
    return [float(value) for value in np.linspace(start, 1.0, steps)]


def grid(
    judge: Judge, model: nn.Module, indices: list[int], reporter: Reporter
) -> tuple[tuple[list[float], list[float]], list[dict[str, float]]]:
    """Ramps from (m, s): a coarse grid with (1, 1) in it, then a fine one around its best point."""
    low, high, rows = judge.search.low, judge.search.high, {}

    def visit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
        with reporter.task("search", len(points)) as advance:
            for m, s in points:
                key = (round(m, 3), round(s, 3))
                if key not in rows:
                    vectors = ramp(key[0], judge.steps), ramp(key[1], judge.steps)
                    rows[key] = _row(judge, model, vectors, indices, {"m": key[0], "s": key[1]})
                advance(1)
        return best(rows)

    axis = np.linspace(low, high, POINTS)
    m, s = visit([(1.0, 1.0), *((float(a), float(b)) for a in axis for b in axis)])
    offsets = np.linspace(-0.5, 0.5, POINTS) * (high - low) / (POINTS - 1)
    m, s = visit([(float(m + a), float(s + b)) for a in offsets for b in offsets])
    return (ramp(m, judge.steps), ramp(s, judge.steps)), list(rows.values())


def best(rows: dict[tuple[float, float], dict[str, float]]) -> tuple[float, float]:
    """The point of the highest score (not of its first term); (1, 1) wins a tie."""
    return max(rows, key=lambda key: (rows[key]["score"], key == (1.0, 1.0)))


def _compared(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    """Means of both, and the mean paired difference with its BCa interval."""
    difference = after - before
    low, high = (0.0, 0.0) if not difference.any() else bca_interval(difference, lambda rows: float(rows.mean()), seed)
    return {"all_ones": float(before.mean()), "searched": float(after.mean()), "difference": float(difference.mean()),
            "low": low, "high": high, "n": len(difference)}  # fmt: skip


def verdict(judge: Judge, found: Found) -> tuple[bool, str]:
    """Whether the searched vectors are kept, and why in words."""
    if found.ones:
        return False, "the search found all ones"
    said = _said(judge.score, found.held_out[judge.score])
    if found.held_out[judge.score]["low"] <= 0:
        return False, f"all ones are kept: {said} is not certainly a gain"
    worse = [name for name in judge.guards if found.held_out[name]["high"] < 0]
    if worse:
        return False, f"all ones are kept: {said}, but {_said(worse[0], found.held_out[worse[0]])}"
    return True, f"kept: {said}"


def _said(name: str, row: dict[str, Any]) -> str:
    return f"{name} {row['difference']:+.3f} ({row['low']:+.3f} .. {row['high']:+.3f}) on held-out images"
