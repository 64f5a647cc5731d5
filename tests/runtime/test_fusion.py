"""`fusion_cases` on the CPU's integer product, plain and compiled; and its parts of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ditcompress.runtime.fused import fused
from ditcompress.runtime.ops import cpu_int8
from tests.runtime.fusion_cases import *  # noqa: F403  (the tests themselves)
from tests.runtime.fusion_cases import SCHEMES, Block, packed, set_fusion

pytestmark = pytest.mark.skipif(not cpu_int8.available(), reason="no exact integer product on this CPU")


@pytest.fixture
def kernel() -> str:
    return "cpu_int8"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where there is a GPU."""
    monkeypatch.setattr("tests.runtime.fusion_cases.DEVICE", torch.device("cpu"))
    return iter(())


@pytest.mark.parametrize("size", [(3, 5), (1, 12), (4, 1)])
@pytest.mark.parametrize("most", [1, 4, 10, 100])
def test_parts_of_a_batch_make_the_whole(size: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_int8, "TOKENS", most)
    seen = torch.zeros(size)
    for samples, tokens, rows in cpu_int8._pieces(*size):
        part = torch.arange(size[0] * size[1]).view(size)[samples, tokens]
        assert part.flatten().tolist() == list(range(size[0] * size[1]))[rows]
        assert part.numel() <= max(most, 1)
        seen[samples, tokens] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("most", [3, 8, 2048])
def test_a_block_in_parts_is_the_block(most: int, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    torch.manual_seed(0)
    model = set_fusion(packed(Block(), ["first", "second"], SCHEMES["plain"], kernel))
    x, *vectors = (torch.randn(3, n, 32) for n in (5, 1, 1, 1))
    with torch.no_grad():
        whole = model(x, *vectors)
        monkeypatch.setattr(cpu_int8, "TOKENS", most)
        monkeypatch.setattr(cpu_int8, "PART", 16)
        torch.testing.assert_close(model(x, *vectors), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_it_is_the_same(kernel: str) -> None:
    """GELU by an exponential, norm and modulation in one loop with the rounding."""
    torch.manual_seed(0)
    model: Any = set_fusion(packed(Block(), ["first", "second"], SCHEMES["plain"], kernel))
    x, *vectors = (torch.randn(2, n, 32).bfloat16() for n in (5, 1, 1, 1))
    x[0, 0], vectors[0][1] = 0, 30  # a row without variance, and large inputs of GELU
    with torch.no_grad():
        with fused("never"):
            plain: Tensor = model(x, *vectors)
        with fused("always"):
            compiled = model(x, *vectors)
    assert cpu_int8._normalized.compiled and not (cpu_int8._normalized.broken or cpu_int8._scaled.broken)
    assert float((compiled.float() - plain.float()).norm() / plain.float().norm()) < 1e-2
