"""Gram matrices and normal equations of some blocks at a time: the same result, held bytes bounded by the largest."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditcompress import prune
from ditcompress.pruning.width import cut_axes, linear_ffn, narrowing, obs_diff
from ditcompress.pruning.width._refit import all_readers, batched, sweeps

from .models import deep
from .test_width_methods import context, few


class Held:
    """The most bytes that the matrices of a function's results had together while any of them lived."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.peak, self.calls = 0, 0

    def watch(self, found: dict[str, Any]) -> None:
        self.calls += 1
        for value in found.values():
            for tensor in (value,) if isinstance(value, Tensor) else (value.gram, value.cross):
                self.alive.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """What `grams` and the normal equations hold."""
    seen = Held()
    for module, name in ((obs_diff, "grams"), (linear_ffn, "_sums")):
        made = getattr(module, name)

        def watched(*args: Any, made: Any = made) -> Any:
            found = made(*args)
            seen.watch(found)
            return found

        monkeypatch.setattr(module, name, watched)
    yield seen


def result(family: str, model: nn.Module, method: Any, params: Any) -> Any:
    found = context(family, model)
    return found, narrowing(found, method, cut_axes(found.layout, "both"), params)


@pytest.mark.parametrize(("family", "weighting"), [("dit", "output"), ("flux", "timestep"), ("sd3", "output")])
def test_obs_diff_block_by_block_gives_the_same_in_the_memory_of_one_block(
    family: str, weighting: Any, held: Held
) -> None:
    model = deep(family)
    _, whole = result(family, model, obs_diff, obs_diff.Params(weighting=weighting))
    together, calls = held.peak, held.calls
    held.__init__()  # type: ignore[misc]
    found, parted = result(family, model, obs_diff, obs_diff.Params(weighting=weighting, hold=0))
    assert parted.kept == whole.kept and set(parted.tensors) == set(whole.tensors)
    for name, value in whole.tensors.items():
        torch.testing.assert_close(parted.tensors[name], value, rtol=1e-6, atol=1e-7)
    sizes: dict[str, int] = {}
    for site in all_readers(found.layout, cut_axes(found.layout, "both")):
        bias = found.model.get_submodule(site.name).bias is not None
        sizes[site.block] = sizes.get(site.block, 0) + 8 * (site.in_features + bias) ** 2
    assert calls == 1 and together == sum(sizes.values())
    assert held.peak <= max(sizes.values()) < together / 2
    count = len(sweeps(found.layout, cut_axes(found.layout, "both"), 0))
    assert count == len(found.layout.blocks) < held.calls < 2 * count  # those of the last scores are used again


def test_normal_equations_of_feed_forwards_one_at_a_time(held: Held) -> None:
    model = deep("sd3")
    _, whole = result("sd3", model, linear_ffn, linear_ffn.Params())
    together = held.peak
    held.__init__()  # type: ignore[misc]
    _, parted = result("sd3", model, linear_ffn, linear_ffn.Params(hold=0))
    assert list(parted.linear) == list(whole.linear) and held.peak < together / 5
    for path, linear in whole.linear.items():
        torch.testing.assert_close(parted.linear[path].weight, linear.weight, rtol=1e-5, atol=1e-6)


def test_other_methods_that_refit_hold_no_more(held: Held) -> None:
    made = prune(
        deep("dit"), width_ratio=0.25, width_method="ecodiff", width_overrides=[*few("ecodiff"), "hold=0"], seed=3
    )
    assert made.model is not None and held.calls > 1


def test_groups_are_consecutive_and_no_larger_than_asked() -> None:
    sizes = [("a", 3), ("b", 3), ("c", 9), ("d", 1), ("e", 2)]
    assert batched(sizes, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert batched(sizes, 0) == [["a"], ["b"], ["c"], ["d"], ["e"]] and batched([], 5) == []
