"""What the command line asks beside the work itself: results as JSON values, recipes checked without a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..evaluation.verdict import margins_of
from ..plan import LayerDecision, Plan
from ..quantization import check_plan
from ..recipe import Recipe

if TYPE_CHECKING:
    from .compress import QuantizeResult


def quantize_facts(result: QuantizeResult) -> dict[str, Any]:
    """A result as JSON values."""
    return {
        "path": str(result.path),
        "bits_per_quantized_weight": result.bits,
        "original_bytes": result.original_bytes,
        "bytes": result.bytes,
        "measured_db": result.measured_db,
        "tradeoff": [asdict(point) for point in result.plan.curve],
        "layers": [asdict(record) for record in result.records],
    }


def check_recipe(recipe: Recipe) -> None:
    """Validate every step and format of a recipe without a model."""
    layers = []
    for number, rule in enumerate(recipe.rules):
        if rule.weight is not None and not rule.keep:
            layers.append(
                LayerDecision(
                    "",
                    "",
                    rule.weight.spec(),
                    steps=rule.steps,
                    smooth=rule.smooth,
                    rank=rule.rank,
                    reason=f"rule {number + 1}",
                )
            )
    check_plan(Plan(tuple(layers)))
    judged = recipe.evaluation
    margins_of(judged.profile if judged.profile != "auto" else "fidelity", judged.margins)
