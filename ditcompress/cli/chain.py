"""Recipes with stages, for the commands that take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..console import print_table, print_text, size
from .common import emit

if TYPE_CHECKING:
    from pathlib import Path

    from ..api import ChainResult
    from ..recipe import Recipe


def run(as_json: bool, checkpoint: Path, recipe: Recipe, out: Path | None, **options: Any) -> None:
    """Run all stages and say what each did."""
    from .. import api

    result = api.run_recipe(checkpoint, recipe, out, **options)
    path = None if result.path is None else str(result.path)
    verdict = None if result.report is None else result.report["verdict"]
    facts = {"path": path, "stages": result.stages, "verdict": verdict}
    emit(as_json, facts, lambda: _show(result, recipe))


def _show(result: ChainResult, recipe: Recipe) -> None:
    rows = [[name, _said(name, facts)] for name, facts in result.stages.items()]
    if result.report is not None:
        rows.append(["evaluate", f"{result.report['verdict']} ({result.report['profile']})"])
    print_table(f"recipe {recipe.name}", ["stage", "result"], rows)
    if result.path is None:
        print_text("nothing was written")
        return
    print_text(f"written to {result.path}")
    if result.report is not None:
        print_text(f"report: {result.path}/report/report.html")


def _said(name: str, facts: Any) -> str:
    if name == "prune":
        narrowed = f", width by {facts['width']['width_ratio']:.0%}" if facts["width"] else ""
        told = "" if facts["output_sqnr_db"] is None else f", SQNR of the prediction {facts['output_sqnr_db']:.2f} dB"
        return f"{len(facts['removed'])} blocks removed{narrowed}{told}"
    if name == "distill":
        losses = [f"{loss} loss {facts['before'][loss]:.3g} -> {value:.3g}" for loss, value in facts["after"].items()]
        return f"{len(facts['losses'])} steps: {', '.join(losses)} on held-out states"
    bits = facts["bits_per_quantized_weight"]
    return f"{bits:.2f} bits a weight, {size(facts['original_bytes'])} -> {size(facts['bytes'])}"
