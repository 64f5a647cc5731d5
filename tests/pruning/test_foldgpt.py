"""FoldGPT: open gates are the dense model, gates polarise and meet the target, resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditcompress.console import Silent
from ditcompress.pruning import choose, method
from ditcompress.pruning._learned import gated
from ditcompress.pruning.foldgpt import Folding, Params, groups_of, rewrite, scores, share

from .learned import Dying, Random, learning
from .models import deep, inputs, run
from .test_methods import silenced


def test_gates_at_one_are_the_dense_model() -> None:
    model = deep("flux")
    given, found = inputs("flux", model), learning("flux", model)
    dense = run("flux", model, given)
    with gated(found) as gates, gates.at({name: torch.ones(()) for name in found.names}):
        assert torch.equal(run("flux", model, given), dense)


def test_gates_polarise_and_the_block_that_adds_nothing_closes() -> None:
    found = learning("dit", silenced(deep("dit"), "transformer_blocks.2"), 0.2)
    params = Params(updates=120, rows=4, learning_rate=3e-2)
    choice = choose(found, method("foldgpt", {})[0], params, 5.0)
    opened = choice.scores.values
    assert choice.units == ("transformer_blocks.2",) and choice.damage == 0.0
    assert opened["transformer_blocks.2"] < 0.2
    assert all(value > 0.9 for name, value in opened.items() if name != "transformer_blocks.2")


def test_the_pressure_is_the_distance_to_the_target() -> None:
    found = learning("dit", deep("dit"), 0.4)
    with gated(found) as gates, torch.no_grad():
        task = Folding(found, Params(pressure=1.0), Random("dit", found.model), gates)
        free = Folding(found, Params(pressure=1e-12), Random("dit", found.model), gates)
        away = abs(float((1 - task.open(0)).sum()) - 2.0) / 4
        assert float(task.loss(0, 0) - free.loss(0, 0)) == pytest.approx(away, rel=1e-4)


def test_a_killed_run_ends_with_the_same_gates(tmp_path: Path) -> None:
    model, params = deep("dit"), Params(updates=8, rows=2)
    whole = scores(learning("dit", model), params)
    with pytest.raises(KeyboardInterrupt):
        scores(replace(learning("dit", model, kind=Dying), journal=tmp_path), params)
    assert not any(module._forward_hooks for module in model.modules())
    assert scores(replace(learning("dit", model), journal=tmp_path), params) == whole


def test_groups_are_neighbours_of_one_shape_and_groups_of_one_change_nothing() -> None:
    found = learning("sd3", deep("sd3"))  # blocks 0, 1 and 3 have a second attention, the last has no text output
    names = [f"transformer_blocks.{n}" for n in range(5)]
    assert groups_of(found, 2, []) == [names[:2], names[2:3], names[3:4], names[4:]]
    assert share(found, Params(share=1), []) == {} and rewrite(found, Params(share=1), []) == {}
    shared = share(found, Params(share=2), [])
    assert all(a.startswith(f"{names[1]}.") and b.startswith(f"{names[0]}.") for a, b in shared.items())
    assert f"{names[1]}.attn.to_q" in shared and f"{names[1]}.ff.net.2" in shared
    assert not any("norm" in name for name in shared)
    quiet = Silent()
    assert rewrite(replace(found, reporter=quiet), Params(share=2), names[:1]) == {}  # 1 is no neighbour of its like
    assert any("no weights are shared" in note for note in quiet.notes)


def test_the_cure_lowers_the_damage_of_sharing_and_leaves_the_model() -> None:
    found, module = learning("dit", deep("dit"), 0.2), method("foldgpt", {})[0]
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    params = Params(updates=30, rows=8, share=2, cure_rate=1e-3)
    sick = choose(found, module, params.model_copy(update={"cure": False}), 5.0)
    cured = choose(found, module, params, 5.0)
    assert sick.shared == cured.shared and not sick.tensors and cured.tensors
    assert not set(cured.tensors) & {f"{copy}.weight" for copy in cured.shared}
    assert cured.damage is not None and sick.damage is not None and cured.damage < 0.8 * sick.damage
    assert all(torch.equal(tensor, found.model.state_dict()[name]) for name, tensor in before.items())
