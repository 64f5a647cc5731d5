"""Prune-best: the budget is kept, the division is the best that was measured, and what is written is what was meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditcompress import api
from ditcompress.console import Silent
from ditcompress.distill.lora import Adapters
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.models import adapter_for, build_meta
from ditcompress.pruning import _learned, parameters, prune_best, tinyfusion
from ditcompress.pruning.prune_best import MOST_WIDTH

from .learned import Random, learning
from .models import deep

FEW = ["samples=2", "steps=3"]
COARSE = ["divisions=3", "rounds=8", "updates=0"]


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


def test_a_learned_set_is_made_with_its_weights_where_it_is_better_than_every_division(tmp_path: Path) -> None:
    few = [*FEW, "divisions=3", "rounds=8", "updates=40", "rows=16"]
    found = api.prune(digits_folder(), 0.75, tmp_path / "out", method="prune-best", seed=1, overrides=few)
    notes = found.facts["notes"]
    assert notes["learned_db"] > notes["division_db"] and not found.facts["width"]
    assert found.facts["output_sqnr_db"] == pytest.approx(notes["learned_db"], abs=1e-6)
    original, model = (load_model(path)[0].state_dict() for path in (digits_folder(), tmp_path / "out"))
    places = {row["was"]: row["block"] for row in found.facts["kept"]}
    assert {unit for group in notes["groups"] for unit in group["kept"]} <= set(places)  # one block always stays
    for old, new in places.items():
        assert not torch.equal(model[f"{new}.attn1.to_q.weight"], original[f"{old}.attn1.to_q.weight"])


class Noting(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_nothing_is_learned_where_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Noting()
    monkeypatch.setattr(_learned, "free_memory", lambda device: 1_000_000)
    found = api.prune(digits_folder(), 0.5, method="prune-best", overrides=[*FEW, "divisions=2", "rounds=8"],
                      dry_run=True, reporter=reporter)  # fmt: skip
    assert any("no set of blocks is learned: that needs" in line for line in reporter.said)
    assert "learned_db" not in found.facts["notes"]


def test_a_sampler_without_noise_levels_is_learned_by_the_prediction() -> None:
    found = learning("dit", deep("dit"))
    assert prune_best._has_clean_latents(found)
    blind = Random("dit", found.model)
    blind.scheduler = Silenced()  # type: ignore[assignment]
    assert not prune_best._has_clean_latents(replace(found, data=lambda **_: blind))
    assert prune_best.Params().learned(False).loss == "output" and prune_best.Params().learned(True).loss == "clean"


class Silenced:
    """A scheduler that says nothing about noise."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_memory_of_a_training_step_is_that_of_what_autograd_keeps(family: str) -> None:
    """Counted without keeping it, against what the search's own loss keeps alive."""
    found = learning(family, deep(family))
    params = prune_best.Params().learned(False)
    told = tinyfusion.state_bytes(found, params)
    alive: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    few = params.model_copy(update={"rows": 4})
    with found.still(), _learned.gated(found) as gates:
        adapters = Adapters(found.model, found.layout.blocks, few.rank, 0, 2.0)
        task = tinyfusion.Search(
            found, few, tinyfusion.groups_of(found, 4), Random(family, found.model), gates, adapters
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = task.loss(0, 0)
        own = {p.untyped_storage().data_ptr() for p in (*found.model.parameters(), *task.parameters().values())}
    kept = sum(storage.nbytes() for place, storage in alive.items() if place not in own)
    assert loss.requires_grad and kept == pytest.approx(4 * told, rel=0.1)


def test_a_learned_set_that_leaves_a_rest_of_width_is_measured_with_it(tmp_path: Path) -> None:
    few = [*FEW, "divisions=2", "rounds=8", "updates=12", "rows=8"]
    found = api.prune(digits_folder(), 0.78, tmp_path / "out", method="prune-best", seed=1, overrides=few,
                      width_overrides=["rounds=8"])  # fmt: skip
    notes = found.facts["notes"]
    assert notes["learned_db"] > notes["division_db"] and found.facts["width"]["width_ratio"] > 0
    assert found.facts["output_sqnr_db"] == pytest.approx(notes["learned_db"], abs=1e-6)


def test_importance_alone_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_best, "scores", lambda *_: pytest.fail("searched"))
    few = ["samples=1", "steps=2"]
    assert api.sensitivity(digits_folder(), method="prune-best", overrides=few)["method"] == "oracle-greedy"
