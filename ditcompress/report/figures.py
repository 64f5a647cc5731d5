"""The figures of a report: title, caption, and an alternative text that says in numbers what the picture shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..console import number
from . import plots

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """`source` is a data: URI."""

    title: str
    text: str
    alt: str
    source: str


def drawn(result: Result) -> list[Figure]:
    """Every figure that the result has data for."""
    found = []
    for title, text, draw, describe in _FIGURES:
        source = draw(result)
        if source is not None:
            found.append(Figure(title, text, f"{title}: {describe(result)}", source))
    return found


def _range(values: Sequence[float | None], unit: str) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "no values"
    middle = float(np.median(known))
    return f"{number(min(known))} to {number(max(known))} {unit}, median {number(middle)}".replace(" ,", ",")


def _over_time(r: Result) -> str:
    rows = [x for x in r["timesteps"] if x["sqnr_db"] is not None]
    worst = min(rows, key=lambda x: x["sqnr_db"])
    found = _range([x["sqnr_db"] for x in rows], "dB")
    return f"{found}; lowest at timestep {number(worst['timestep'], 0)}, {worst['branch']} branch."


def _over_n(r: Result) -> str:
    parts = []
    for model in ("original", "compressed"):
        points = [p for p in r["pairs"]["frechet_curve"] if p["model"] == model]
        if points:
            parts.append(f"{model} {number(points[0]['fd'])} at N={points[0]['n']}, {number(points[-1]['fd'])} at "
                         f"N={points[-1]['n']}")  # fmt: skip
    return "; ".join(parts) + "."


def _classes(r: Result) -> str:
    change = [100 * (c["compressed"] - c["original"]) for c in r["pairs"]["per_class"]]
    return f"{_range(change, 'percentage points')} over {len(change)} classes."


def _history(r: Result, stage: str) -> Mapping[str, Any]:
    return r.get("history", {}).get(stage, {})  # type: ignore[no-any-return]


def _training(r: Result) -> str:
    points = _history(r, "distill")["losses"]
    return f"from {number(points[0][1])} to {number(points[-1][1])} over {points[-1][0]:.0f} steps."


def _blocks(r: Result) -> str:
    facts = _history(r, "prune")
    return f"{len(facts['removed'])} of {len(facts['removed']) + len(facts['kept'])} blocks removed."


_FIGURES: Sequence[tuple[str, str, Callable[[Result], str | None], Callable[[Result], str]]] = (
    (
        "SQNR of the denoiser over timesteps",
        "How far the compressed prediction is from the original's on the same inputs; higher is better. "
        "The band covers 5 to 95 % of inputs.",
        lambda r: plots.sqnr_over_time(r["timesteps"]),
        _over_time,
    ),
    (
        "Paired PSNR over all pairs",
        "The curve of a better model lies further right.",
        lambda r: plots.psnr_distribution(r["pairs"].get("psnr", [])),
        lambda r: _range(r["pairs"]["psnr"], "dB") + ".",
    ),
    (
        "Output SQNR of each linear, sorted",
        "Errors of earlier layers included; diagnostic, nothing is gated on it.",
        lambda r: plots.layer_sqnr(r["layers"]),
        lambda r: _range([x["sqnr_db"] for x in r["layers"]], "dB") + ".",
    ),
    (
        "Stored bits of each linear",
        "In forward order; scales, zeros and low-rank factors included.",
        lambda r: plots.layer_bits(r["layers"]),
        lambda r: _range([x["bits"] for x in r["layers"]], "bits") + ".",
    ),
    (
        "Fréchet distance to the reference over 1/N",
        "Fewer images give a larger distance, so compare only at one N; the lines meet 1/N = 0 at the estimate for "
        "infinitely many images.",
        lambda r: plots.frechet_over_n(r["pairs"].get("frechet_curve", [])),
        _over_n,
    ),
    (
        "Change of accuracy by class",
        "Compressed minus original, in percentage points, of the images asked for with each class.",
        lambda r: plots.class_change(r["pairs"].get("per_class", [])),
        _classes,
    ),
    (
        "Importance of the blocks",
        "By the method that pruned them; the removed ones in orange.",
        lambda r: plots.block_scores(_history(r, "prune").get("scores", {}), _history(r, "prune").get("removed", [])),
        _blocks,
    ),
    (
        "Training loss",
        "Of the distillation after pruning: what is left of the model against the original.",
        lambda r: plots.training_loss(_history(r, "distill").get("losses", [])),
        _training,
    ),
)
