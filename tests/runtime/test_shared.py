"""Readers of one input round it once, and never take what was another's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from ditcompress.plan import ActivationSpec
from ditcompress.runtime.linear import PackedLinear, Scheme
from ditcompress.runtime.ops import cpu_int8, reference
from ditcompress.runtime.ops._shared import Latest
from tests.runtime.test_linear import INT8, inputs, packed

TOKEN = ActivationSpec("token", 8, False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often an input was rounded by each kernel."""
    counts = {"cpu_int8": 0, "reference": 0}

    def count(module: Any, name: str, kernel: str) -> None:
        real = getattr(module, name)

        def counting(*given: Any) -> Any:
            counts[kernel] += 1
            return real(*given)

        monkeypatch.setattr(module, name, counting)

    count(cpu_int8, "_tokens", "cpu_int8")
    count(reference, "on_grid", "reference")
    return counts


def layers(scheme: Scheme, count: int = 3) -> list[PackedLinear]:
    return [packed(scheme, 40, 72) for _ in range(count)]


@pytest.mark.parametrize("rotate", [0, 72])
@torch.no_grad()
def test_one_rounding_for_q_k_and_v(counted: dict[str, int], rotate: int) -> None:
    readers = layers(Scheme(INT8, TOKEN, rotate=rotate))
    x = inputs(9, 72)
    apart = [layer(x.clone()) for layer in readers]
    kernel = readers[0].kernel("cpu")
    before = counted[kernel]
    assert all(torch.equal(layer(x), y) for layer, y in zip(readers, apart, strict=True))
    assert counted[kernel] == before + 1


@torch.no_grad()
def test_other_schemes_and_changed_inputs_are_rounded_anew() -> None:
    first, second = packed(Scheme(INT8, TOKEN), 40, 72), packed(Scheme(INT8, ActivationSpec("token", 4, False)), 40, 72)
    x = inputs(9, 72)
    assert torch.equal(second(x), second(x.clone())) and torch.equal(first(x), first(x.clone()))
    x.mul_(2)
    assert torch.equal(first(x), first(x.clone()))
    turned = [packed(Scheme(INT8, TOKEN, rotate=72), 40, 72) for _ in range(2)]
    turned[1].rotate_sign.copy_(~turned[1].rotate_sign)  # type: ignore[operator]
    turned[0](x)
    assert torch.equal(turned[1](x), turned[1](x.clone()))
    x.data = inputs(9, 72) * 3
    assert torch.equal(turned[1](x), turned[1](x.clone()))
    with torch.autocast("cpu"):
        assert torch.equal(turned[1](x), turned[1](x.clone()))


@torch.no_grad()
def test_a_reloaded_layer_rounds_anew() -> None:
    layer, other = (packed(Scheme(INT8, TOKEN, rotate=72), 40, 72) for _ in range(2))
    other.rotate_sign.copy_(~other.rotate_sign)  # type: ignore[operator]
    x = inputs(9, 72)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), layer(x.clone())) and torch.equal(layer(x), other(x.clone()))


def test_nothing_is_kept_of_a_tensor_that_is_gone_or_not_followed() -> None:
    latest, made = Latest(), []

    def make() -> Tensor:
        made.append(torch.zeros(3))
        return made[-1]

    with torch.no_grad():
        x = torch.ones(3)
        assert latest(x, 1, [None], make) is latest(x, 1, [None], make) and len(made) == 1
        known = weakref.ref(made.pop())
        del x
        gc.collect()
        assert known() is None
        with torch.inference_mode():
            y = torch.ones(3)
            assert latest(y, 1, [], make) is not latest(y, 1, [], make)
    with torch.enable_grad():
        z = torch.ones(3)
        assert latest(z, 1, [], make) is not latest(z, 1, [], make)


@torch.no_grad()
def test_the_input_itself_is_let_go() -> None:
    layer = packed(Scheme(INT8, TOKEN), 40, 72)
    x = inputs(9, 72)
    gone = weakref.ref(x)
    layer(x)
    del x
    gc.collect()
    assert gone() is None
