"""FuseGPT: the check of its method card (plain removal at first, the same after merging), windows, resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditcompress.distill.trainer import train
from ditcompress.pruning import choose, method
from ditcompress.pruning._learned import settings
from ditcompress.pruning.fusegpt import Fusion, Params, influence, rewrite, windows
from ditcompress.structure import remove_blocks

from .learned import Dying, Random, learning
from .models import DEPTHS, REMOVED, deep, inputs, run
from .test_methods import silenced

FEW = Params(updates=3, rows=2, rank=4, learning_rate=1e-2, fuse_rate=1e-1)


@pytest.mark.parametrize("family", sorted(DEPTHS))
def test_it_begins_as_plain_removal_and_ends_as_what_is_merged(family: str) -> None:
    model, removed = deep(family), REMOVED[family]
    given, found = inputs(family, model), learning(family, model)
    shallow = run(family, remove_blocks(model, found.depth, removed), given)
    states = (given["latents"], torch.tensor([400, 400]), given["cond"])
    with found.still():
        task = Fusion(found, FEW, removed, Random(family, model))
        with torch.no_grad():
            assert torch.equal(task.student(*states), shallow)
        train(task, settings(FEW))
        with torch.no_grad():
            unmerged = task.student(*states)
        changed = task.merged()
        task.release()
    with found.rewritten(changed):
        merged = run(family, remove_blocks(model, found.depth, removed), given)
    assert torch.allclose(merged, unmerged, atol=1e-5) and not torch.allclose(merged, shallow, atol=1e-4)
    assert not any(name.startswith(tuple(f"{block}." for block in removed)) for name in changed)
    assert all(tensor.shape == model.state_dict()[name].shape for name, tensor in changed.items())
    assert any(name.endswith(".bias") for name in changed)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(run(family, model, given), run(family, deep(family), given))


def test_windows_are_clipped_and_hold_what_stays() -> None:
    found = learning("dit", deep("dit"))
    names = [f"transformer_blocks.{n}" for n in range(5)]
    (first, last) = windows(found, [names[1], names[4]], 4)
    assert first.stay == (names[0], names[2], names[3]) and first.end == names[3]
    assert last.stay == (names[2], names[3]) and last.end == names[4]


def test_what_the_head_reads_of_the_first_block_is_not_fused() -> None:
    changed = rewrite(learning("dit", deep("dit")), FEW, ["transformer_blocks.2"])
    assert any(name.startswith("transformer_blocks.0.norm1.linear") for name in changed)
    assert not any(name.startswith("transformer_blocks.0.norm1.emb") for name in changed)


def test_influence_is_nothing_for_a_block_that_adds_nothing_and_it_goes_first() -> None:
    found = learning("dit", silenced(deep("dit"), "transformer_blocks.2"), 0.2)
    assert influence(found, ["transformer_blocks.2"]) == pytest.approx(0, abs=1e-9)
    choice = choose(found, method("fusegpt", {})[0], Params(train=False), 5.0)
    assert choice.units == ("transformer_blocks.2",) and not choice.tensors and choice.damage == 0.0


def test_learning_lowers_the_loss() -> None:
    found, params = learning("dit", deep("dit")), Params(updates=30, rows=8, rank=4)
    with found.still():
        task = Fusion(found, params, ["transformer_blocks.2"], Random("dit", found.model))
        before = float(task.loss(999, 0).detach())
        train(task, settings(params))
        assert float(task.loss(999, 0).detach()) < 0.9 * before
        task.release()


def test_a_killed_training_ends_with_the_same_tensors(tmp_path: Path) -> None:
    model, params, units = deep("dit"), Params(updates=8, rows=2, rank=2), ["transformer_blocks.2"]
    whole = rewrite(learning("dit", model), params, units)
    with pytest.raises(KeyboardInterrupt):
        rewrite(replace(learning("dit", model, kind=Dying), journal=tmp_path), params, units)
    assert not any(module._forward_hooks for module in model.modules())
    again = rewrite(replace(learning("dit", model), journal=tmp_path), params, units)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
