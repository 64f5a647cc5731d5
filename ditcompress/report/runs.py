"""Many runs side by side: one table and a Pareto plot of size or time against quality, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DitcompressError
from ..registry import nearest
from . import plots
from .html import environment

# what must be equal for numbers of two runs to stand in one column
SAME = (
    "original.fingerprint", "scheduler", "guidance", "conditions.sha256", "images", "extractor", "settings.pairs",
    "settings.steps", "settings.seed", "settings.dtype", "settings.inputs", "settings.timesteps",
)  # fmt: skip
X = {
    "size": "MB on disk",
    "bits": "stored bits per quantized weight",
    "latency": "ms of one forward pass",
}
COLUMNS = ("sqnr_weighted", "psnr", "ssim", "fd_original", "fd_reference", "class_accuracy")


@dataclass(frozen=True)
class Run:
    """One report: its name and its JSON."""

    name: str
    result: Mapping[str, Any]

    def row(self, name: str) -> Mapping[str, Any] | None:
        return next((m for m in self.result["measurements"] if m["name"] == name), None)

    def x(self, kind: str) -> float | None:
        sizes, speed = self.result["sizes"], self.result["speed"]
        if kind == "size":
            return sizes["compressed"]["disk_bytes"] / 1e6
        return (
            sizes["bits_per_quantized_weight"] if kind == "bits" else 1000 * speed["forward"][-1]["compressed"]["p50"]
        )


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def check_alike(runs: Sequence[Run]) -> None:
    """E342 unless every run compares with the same original on the same noise, number and sampler."""
    first = runs[0]
    for run in runs[1:]:
        for path in SAME:
            a, b = (_at(r.result["provenance"], path) for r in (first, run))
            if a != b:
                told = "" if isinstance(a, dict) else f" ({a} and {b})"
                raise DitcompressError(
                    "E342", run.name, f"{path} differs from that of {first.name}{told}", "evaluate both alike"
                )


def points(runs: Sequence[Run], x: str, y: str) -> list[dict[str, Any]]:
    """One record a run; `best` marks the front: no other run is at most as large and better. E203 for a metric that a
    run does not have."""
    found = []
    for run in runs:
        row, at = run.row(y), run.x(x)
        if row is None:
            names = [m["name"] for m in run.result["measurements"]]
            raise DitcompressError("E203", f"--y {y}", f"{run.name} has no such metric", nearest(y, names))
        if at is None or (row["value"] is None and not row["identical"]):
            continue
        found.append({"name": run.name, "x": at, "y": row["value"], "low": row["low"], "high": row["high"],
                      "identical": row["identical"], "higher": row["higher_is_better"]})  # fmt: skip
    known = [p for p in found if p["y"] is not None]  # identical runs have an infinite PSNR: in the table only
    for p in known:
        sign = 1 if p["higher"] else -1
        p["best"] = not any(
            q is not p and q["x"] <= p["x"] and sign * q["y"] >= sign * p["y"] and (q["x"], q["y"]) != (p["x"], p["y"])
            for q in known
        )
    return known


def table(runs: Sequence[Run]) -> dict[str, Any]:
    """Columns that any run has, and one row a run."""
    columns = [c for c in COLUMNS if any(run.row(c) for run in runs)]
    labels = {c: next(m["label"] for run in runs if (m := run.row(c))) for c in columns}
    rows = []
    for run in runs:
        sizes, speed = run.result["sizes"], run.result["speed"]
        rows.append(
            {
                "name": run.name,
                "verdict": run.result["verdict"],
                "profile": run.result["profile"],
                "disk_bytes": sizes["compressed"]["disk_bytes"],
                "ratio": sizes["ratio"],
                "bits": sizes["bits_per_quantized_weight"],
                "faster": speed["ratio"],
                "metrics": {c: run.row(c) for c in columns},
            }
        )
    return {"columns": [{"name": c, "label": labels[c]} for c in columns], "rows": rows}


def render_runs(facts: Mapping[str, Any]) -> str:
    """The page: plot and table."""
    source = None
    if facts["points"]:
        source = plots.pareto(facts["points"], X[facts["x"]], facts["y_label"])
    return environment().get_template("runs.html").render(f=facts, source=source)


def compare_facts(runs: Sequence[Run], x: str, y: str) -> dict[str, Any]:
    """Table and points of several runs as JSON values. E203 for an unknown x, E342 for runs that cannot be compared."""
    if x not in X:
        raise DitcompressError("E203", f"--x {x}", "is not known", nearest(x, list(X)))
    check_alike(runs)
    row = runs[0].row(y)
    found = points(runs, x, y)
    unit = f", {row['unit']}" if row and row["unit"] else ""
    return {
        "schema": 1,
        "original": runs[0].result["provenance"]["original"],
        "x": x,
        "y": y,
        "y_label": f"{row['label'] if row else y}{unit}",
        **table(runs),
        "points": found,
        "front": [p["name"] for p in found if p["best"]],
    }


def run_names(folders: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The compressed models' names; where two are alike the folders', or their whole paths."""
    names = [str(r["provenance"]["compressed"]["name"]) for r in results]
    for found in (names, [folder.resolve().name for folder in folders]):
        if len(set(found)) == len(found):
            return found
    return [str(folder) for folder in folders]
