"""Prune-best: the budget is kept, the division is the best that was measured, and what is written is what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditcompress import api
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.models import adapter_for, build_meta
from ditcompress.pruning import parameters
from ditcompress.pruning.prune_best import MOST_WIDTH

FEW = ["samples=2", "steps=3"]
COARSE = ["divisions=3", "rounds=8"]


def block_parameters(model: object) -> float:
    layout = adapter_for(type(model).__name__).layout(model)
    return sum(parameters(model, layout).values())  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_budget_is_kept_and_nothing_is_worse_than_depth_alone(tmp_path: Path, ratio: float) -> None:
    best = api.prune(digits_folder(), ratio, tmp_path / "best", method="prune-best", seed=1, overrides=[*FEW, *COARSE],
                     width_overrides=["rounds=8"])  # fmt: skip
    depth = api.prune(digits_folder(), ratio, method="oracle-greedy", seed=1, overrides=FEW, dry_run=True)
    assert best.facts["output_sqnr_db"] >= depth.facts["output_sqnr_db"]
    assert best.facts["width"] and 0 < best.facts["width"]["width_ratio"] <= MOST_WIDTH
    model, _ = load_model(tmp_path / "best")
    whole = block_parameters(build_meta({**load_model(digits_folder())[1].config}))
    assert block_parameters(model) / whole == pytest.approx(1 - ratio, abs=0.03)
    assert best.facts["saved"] == pytest.approx(ratio)


def test_its_own_width_goes_with_no_other() -> None:
    with pytest.raises(DitcompressError, match="E203"):
        api.prune(digits_folder(), 0.3, method="prune-best", width_ratio=0.2, overrides=[*FEW, *COARSE], dry_run=True)
