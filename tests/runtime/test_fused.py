"""Compiled rounding: the same values, when it is worth it, and never an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditcompress
from ditcompress.plan import ActivationSpec
from ditcompress.runtime import fused as module
from ditcompress.runtime.fused import Fused, fused
from ditcompress.runtime.linear import Scheme
from ditcompress.runtime.ops import cpu_int8
from tests.runtime.test_linear import INT8, inputs, packed


@pytest.mark.skipif(not cpu_int8.available(), reason="no exact integer product on this CPU")
@torch.no_grad()
def test_compiled_rounding_changes_no_bit() -> None:
    for symmetric in (True, False):
        layer = packed(Scheme(INT8, ActivationSpec("token", 8, symmetric)), 40, 72)
        for x in (inputs(9, 72, outliers=True).bfloat16(), inputs(5, 72).bfloat16()):  # two shapes, one compilation
            with fused("never"):
                plain = layer(x)
            with fused("always"):
                assert torch.equal(layer(x), plain)
    assert cpu_int8._scaled.compiled and not cpu_int8._scaled.broken


class Counted:
    """In place of torch.compile: says how often a compiled function was called."""

    def __init__(self, fails: bool = False) -> None:
        self.calls, self.fails = 0, fails

    def __call__(self, function: Any, **_: Any) -> Any:
        def compiled(*args: Any) -> Any:
            self.calls += 1
            if self.fails:
                raise RuntimeError("no compiler")
            return function(*args)

        return compiled


@torch.no_grad()
def test_compiling_waits_for_enough_work(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Counted()
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(module, "ENOUGH", 25)
    double, x = Fused(lambda x: x * 2), torch.ones(10)
    for calls in (0, 0, 1, 2):
        assert torch.equal(double(x), x * 2) and compiler.calls == calls
    with fused("never"):
        double(x)
    with torch.enable_grad():
        double(x)
    assert compiler.calls == 2
    with fused("always"):
        Fused(lambda x: x)(x)
    assert compiler.calls == 3


@torch.no_grad()
def test_a_compiler_that_fails_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Counted(fails=True)
    monkeypatch.setattr(torch, "compile", compiler)
    double, x = Fused(lambda x: x * 2), torch.ones(3)
    with fused("always"):
        for _ in range(3):
            assert torch.equal(double(x), x * 2)
    assert compiler.calls == 1


@torch.no_grad()
def test_wrong_inputs_are_not_the_compilers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", Counted())
    total = Fused(torch.add)
    with fused("always"):
        with pytest.raises(RuntimeError, match="size"):
            total(torch.ones(3), torch.ones(2))
        assert not total.broken and torch.equal(total(torch.ones(3), torch.ones(3)), torch.full((3,), 2.0))


def test_many_kinds_of_inputs_leave_the_compiled_ones_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, real = Counted(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: real(f, backend="eager", **given))
    kept = Fused(lambda x: x * 2)
    with fused("always"), torch._dynamo.config.patch(recompile_limit=1):  # type: ignore[no-untyped-call]
        for mode in (torch.no_grad, torch.inference_mode):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                with mode():
                    assert torch.equal(kept(torch.ones(3, dtype=dtype)), torch.full((3,), 2, dtype=dtype))
    assert not kept.broken
    monkeypatch.setattr(torch, "compile", compiler)
    with fused("always"), torch.no_grad():
        one = Fused(lambda x: x)
        one(torch.ones(1, 5)), one(torch.ones(0, 5))
    assert not compiler.calls  # nothing to gain


@pytest.mark.skipif(not cpu_int8.available(), reason="no exact integer product on this CPU")
@pytest.mark.parametrize("rank", [0, 4])
@torch.no_grad()
def test_no_tokens_give_no_outputs(rank: int) -> None:
    for symmetric in (True, False):
        scheme = Scheme(INT8, ActivationSpec("token", 8, symmetric), rank=rank)
        layer = packed(scheme, 40, 72)
        for shape in ((0, 72), (2, 0, 72)):
            with fused("always"):
                assert layer(torch.zeros(shape)).shape == (*shape[:-1], 40)


def test_what_was_set_comes_back() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        ditcompress.set_fused("sometimes")  # type: ignore[arg-type]
    assert ditcompress.set_fused("never") == "auto" and ditcompress.set_fused("auto") == "never"
