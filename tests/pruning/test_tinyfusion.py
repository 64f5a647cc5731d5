"""TinyFusion: the numbered checks of its method card, and that a killed search goes on to the same end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from ditcompress import prune
from ditcompress.distill.lora import Adapters
from ditcompress.distill.trainer import train
from ditcompress.errors import DitcompressError
from ditcompress.pruning import choose, method
from ditcompress.pruning._learned import gated, settings
from ditcompress.pruning.tinyfusion import Group, Params, Search, groups_of, scores

from .learned import Dying, Random, learning
from .models import DEPTHS, REMOVED, bypassed, deep, inputs, run
from .test_methods import silenced

FEW = Params(updates=3, rows=2, samples=2)


@pytest.mark.parametrize("family", sorted(DEPTHS))
def test_open_gates_are_the_dense_model_and_closed_ones_the_shallow_one(family: str) -> None:
    model = deep(family)
    given, found = inputs(family, model), learning(family, model)
    with gated(found) as gates:
        with gates.at({name: torch.ones(2) for name in found.names}):
            assert torch.equal(run(family, model, given), run(family, deep(family), given))
        with gates.at({name: torch.full((2,), float(name not in REMOVED[family])) for name in found.names}):
            closed = run(family, model, given)
    assert torch.equal(closed, run(family, bypassed(family, deep(family), REMOVED[family]), given))


def test_every_draw_keeps_n_of_each_group_and_samples_differ_while_it_is_hot() -> None:
    found = learning("dit", deep("dit"))
    groups = [Group(("a", "b", "c", "d"), 2), Group(("e", "f", "g"), 1)]
    params = Params(updates=101, rows=64)
    with gated(found) as gates:
        task = Search(found, params, groups, Random("dit", found.model), gates, None)
        drawn = task.draw(0, 0, 64)
        rows = torch.stack([drawn[unit] for unit in "abcdefg"], 1)
        assert set(rows.unique().tolist()) == {0.0, 1.0}
        assert bool((rows[:, :4].sum(1) == 2).all()) and bool((rows[:, 4:].sum(1) == 1).all())
        assert len({tuple(row) for row in rows.tolist()}) > 6
        with torch.no_grad():
            task.logits[0][3] += 0.06  # six on the logit: the pattern (b, c)
        cold = task.draw(100, 0, 64)
    assert float(torch.stack([cold["b"], cold["c"]]).detach().mean()) > 0.95


def test_gates_learn_and_the_weights_stay() -> None:
    model = deep("dit")
    found = learning("dit", model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with found.still(), gated(found) as gates:
        adapters = Adapters(model, found.layout.blocks, 8, 0, 2.0)
        adapters.enabled = False
        task = Search(found, FEW, groups_of(found, 4), Random("dit", model), gates, adapters)
        task.loss(0, 0).backward()
        for gate in task.logits:
            assert gate.grad is not None and float(gate.grad.abs().max()) > 0
            assert float(gate.grad.sum()) == pytest.approx(0, abs=1e-5 * float(gate.grad.abs().max()) + 1e-9)
        train(task, settings(FEW))
        assert any(bool(up.any()) for _, up in adapters.factors.values())
        adapters.remove()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_errors_can_be_weighted_by_timestep() -> None:
    model = deep("dit")
    found = learning("dit", model)

    def loss(weights: Callable[[torch.Tensor], torch.Tensor] | None) -> float:
        with found.still(), gated(found) as gates:
            task = Search(found, FEW, groups_of(found, 4), Random("dit", model), gates, None, weights)
            return float(task.loss(0, 0).detach())

    plain = loss(None)
    assert loss(lambda timestep: torch.full_like(timestep, 3.0, dtype=torch.float32)) == pytest.approx(3 * plain)
    assert plain > 0 and loss(lambda timestep: torch.zeros(len(timestep))) == 0


def test_groups_follow_the_lists_and_give_up_what_the_ratio_asks() -> None:
    found = learning("flux", deep("flux"), 0.4)
    groups = groups_of(found, 2)
    assert all(len({unit.rpartition(".")[0] for unit in group.units}) == 1 for group in groups)
    assert [unit for group in groups for unit in group.units] == found.names
    assert sum(len(group.units) - group.keep for group in groups) == 3
    sizes = [len(group.units) for group in groups_of(learning("dit", deep("dit")), [1, 2])]
    assert sizes == [1, 2, 1]
    assert Group(("a", "b", "c", "d"), 2).patterns.sum(1).tolist() == [2.0] * 6


@pytest.mark.parametrize("loss", ["output", "clean"])
def test_blocks_that_add_nothing_are_found(loss: Literal["output", "clean"]) -> None:
    model = silenced(silenced(deep("dit"), "transformer_blocks.2"), "transformer_blocks.3")
    found = learning("dit", model, 0.4)
    params = Params(updates=40, rows=8, learning_rate=1e-5, loss=loss)
    choice = choose(found, method("tinyfusion", {})[0], params, 5.0)
    assert choice.blocks == ("transformer_blocks.2", "transformer_blocks.3") and choice.damage == 0.0
    (row,) = choice.scores.notes["groups"]
    assert row["confidence"] > 0.5 and row["kept"] == ["transformer_blocks.1", "transformer_blocks.4"]


def test_a_killed_search_ends_with_the_same_scores(tmp_path: Path) -> None:
    model, params = deep("dit"), Params(updates=8, rows=2)
    whole = scores(learning("dit", model), params)
    with pytest.raises(KeyboardInterrupt):
        scores(replace(learning("dit", model, kind=Dying), journal=tmp_path), params)
    assert (tmp_path / "training.pt").is_file() and not any(m._forward_hooks for m in model.modules())
    assert scores(replace(learning("dit", model), journal=tmp_path), params) == whole


@pytest.mark.parametrize("group", ["0", "15", "[4,0]", "many"])
def test_a_bad_group_is_refused(group: str) -> None:
    with pytest.raises(DitcompressError, match=r"E203 bad-option\]: --set group"):
        prune(deep("dit"), 0.5, method="tinyfusion", overrides=[f"group={group}"])
