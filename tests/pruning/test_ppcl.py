"""PPCL: the numbered checks of its method card, and that the model's other users of a block are spared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditcompress.distill.trainer import train
from ditcompress.pruning import choose, method
from ditcompress.pruning._cka import Chains, Record, linear_cka, runs
from ditcompress.pruning._learned import settings, used_outside
from ditcompress.pruning.ppcl import Params, Students, intervals, length_loss, rewrite

from .learned import Dying, Random, learning
from .models import DEPTHS, deep
from .test_methods import silenced

FEW = Params(updates=4, rows=2)
WIDTH, TOKENS = 6, 400


def chain(changes: Sequence[Tensor], noise: Sequence[float] = ()) -> tuple[Chains, list[Tensor]]:
    """Records of blocks h -> h + h @ W + noise, and their true maps."""
    draw = torch.Generator().manual_seed(0)
    h, records = torch.randn(TOKENS, WIDTH, generator=draw), {}
    for number, change in enumerate(changes):
        wild = torch.randn(h.shape, generator=draw) * (noise[number] if noise else 0.0)
        y = h + h @ change + wild
        row = Record(torch.zeros(WIDTH + 1, WIDTH + 1).double(), torch.zeros(WIDTH + 1, WIDTH).double())
        row.add(h, y, torch.arange(TOKENS))
        records[f"blocks.{number}"] = [row]
        h = y
    return Chains(records, 1e-9), list(changes)


def maps(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [0.2 * torch.randn(WIDTH, WIDTH, generator=draw) for _ in range(count)]


def test_linear_blocks_are_recovered_and_make_one_interval() -> None:
    chains, true = chain(maps(5))
    for number, change in enumerate(true):
        (found,) = chains.probes[f"blocks.{number}"]
        assert torch.allclose(found[:-1], change.double(), atol=1e-4)
        assert chains.similarity("blocks", 1, number) == pytest.approx(1, abs=1e-6)
    assert list(intervals(chains, "blocks", 5, Params())) == [(0, 4)]
    assert list(intervals(chains, "blocks", 5, Params(longest=3))) == [(0, 2), (3, 4)]


def test_an_interval_ends_before_the_block_that_is_not_linear() -> None:
    chains, _ = chain(maps(5), [0, 0, 0, 3.0, 0])
    assert list(intervals(chains, "blocks", 5, Params())) == [(0, 2), (3, 4)]


def test_cka_does_not_see_rotation_scale_and_shift_in_either_form() -> None:
    draw = torch.Generator().manual_seed(0)
    for tokens, width in ((50, 8), (8, 50)):
        x = torch.randn(tokens, width, generator=draw).double()
        turn, _ = torch.linalg.qr(torch.randn(width, width, generator=draw).double())
        assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-9)
        y = torch.randn(tokens, width, generator=draw).double()
        a, b = x - x.mean(0), y - y.mean(0)
        wanted = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
        assert linear_cka(x, y) == pytest.approx(float(wanted))
    assert linear_cka(torch.ones(4, 3), torch.ones(4, 3)) == 1.0


def test_runs_of_blocks() -> None:
    assert runs(["b.4", "a.1", "a.2", "a.10", "b.5"]) == [("a", 1, 2), ("a", 10, 10), ("b", 4, 5)]
    assert runs([]) == []


@pytest.mark.parametrize("family", sorted(DEPTHS))
def test_a_block_that_stands_for_itself_has_nothing_to_learn(family: str) -> None:
    model = deep(family)
    found = learning(family, model)
    blocks = found.layout.blocks
    task = Students(found, FEW, [(*_place(block), _place(block)[1]) for block in blocks], Random(family, model), set())
    assert all(float(term.detach()) == pytest.approx(0, abs=1e-9) for term in task.terms(0, 0))
    task.release()
    assert rewrite(found, FEW, []) == {}


def _place(block: str) -> tuple[str, int]:
    owner, _, number = block.rpartition(".")
    return owner, int(number)


def test_intervals_learn_apart_and_only_their_kept_blocks_do() -> None:
    model = deep("flux")
    found = learning("flux", model)
    spans = [("transformer_blocks", 0, 1), ("single_transformer_blocks", 1, 3)]
    with found.still():
        task = Students(found, FEW, spans, Random("flux", model), set())
        first, second = task.terms(0, 0)
        assert bool(first > 0) and bool(second > 0)
        first.backward()
        for name, tensor in task.parameters().items():
            touched = tensor.grad is not None and bool(tensor.grad.any())
            assert not (touched and name.startswith("single_transformer_blocks.1."))
        assert all(parameter.grad is None for parameter in model.parameters())
        task.release()
    changed = rewrite(
        found, FEW, ["transformer_blocks.1", "single_transformer_blocks.2", "single_transformer_blocks.3"]
    )
    assert {".".join(name.split(".")[:2]) for name in changed} == {
        "transformer_blocks.0", "single_transformer_blocks.1",
    }  # fmt: skip
    state = model.state_dict()
    assert any(not torch.equal(value, state[name]) for name, value in changed.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_the_head_reads_of_the_first_block_does_not_learn() -> None:
    found = learning("dit", deep("dit"))
    assert "transformer_blocks.0.norm1.emb" in used_outside(found, ["transformer_blocks.0", "transformer_blocks.1"])
    changed = rewrite(found, FEW, ["transformer_blocks.1"])
    assert changed and not any(".norm1.emb." in name for name in changed)
    assert any("transformer_blocks.0.norm1.linear" in name for name in changed)
    assert used_outside(learning("flux", deep("flux")), ["transformer_blocks.0"]) == set()


def test_learning_lowers_the_loss_and_a_block_that_adds_nothing_goes_first() -> None:
    found, spans, params = learning("dit", deep("dit")), [("transformer_blocks", 1, 3)], Params(updates=40, rows=8)
    with found.still():
        task = Students(found, params, spans, Random("dit", found.model), set())
        before = float(task.loss(999, 0).detach())
        train(task, settings(params))
        assert float(task.loss(999, 0).detach()) < 0.9 * before
        task.release()
    silent = learning("dit", silenced(deep("dit"), "transformer_blocks.2"), 0.2)
    choice = choose(silent, method("ppcl", {"train": False})[0], FEW, 5.0)
    assert choice.units == ("transformer_blocks.2",)


def test_lengths_count() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert float(length_loss([1.5 * x], [x])) == pytest.approx(0.25, rel=1e-5)
    assert float(length_loss([-x], [x])) == pytest.approx(0)


def test_a_killed_training_ends_with_the_same_tensors(tmp_path: Path) -> None:
    model, params, units = deep("dit"), Params(updates=8, rows=2), ["transformer_blocks.2"]
    whole = rewrite(learning("dit", model), params, units)
    with pytest.raises(KeyboardInterrupt):
        rewrite(replace(learning("dit", model, kind=Dying), journal=tmp_path), params, units)
    again = rewrite(replace(learning("dit", model), journal=tmp_path), params, units)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
