"""The kernels as operators: the same numbers, known to torch.compile's tracing."""

from __future__ import annotations

import torch

from tests.runtime.triton_support import kernels, noise

library = kernels("library")
rows = kernels("rows")
gemm = kernels("int8_gemm")


def test_operators_are_registered_soundly() -> None:
    x, down = noise(3, 48), noise(4, 48, seed=1).bfloat16()
    checks = ("test_schema", "test_faketensor")
    for given in ({}, {"symmetric": False, "down": down}, {"element": "e4m3", "residual": x}):
        torch.library.opcheck(library.quantize_rows, (x,), given, test_utils=checks)
    weight, scale = torch.ones(7, 48, dtype=torch.int8, device=x.device), noise(7, 1).abs()
    codes = torch.ones(3, 48, dtype=torch.int8, device=x.device)
    torch.library.opcheck(library.product, (codes, scale[:3], weight, scale), test_utils=checks)


def test_a_linear_of_operators_is_one_of_functions() -> None:
    x, weight = noise(5, 48), rows.quantize_rows(noise(7, 48, seed=1))
    plain = rows.quantize_rows(x, norm="layer")
    expected = gemm.product(plain.codes, plain.scale, gemm.Weight(weight.codes, weight.scale), dtype=torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def linear(x: torch.Tensor) -> torch.Tensor:
        codes, scale, *_ = torch.ops.ditcompress.quantize_rows(x, norm="layer")
        return torch.ops.ditcompress.int8_product(codes, scale, weight.codes, weight.scale, dtype=torch.float32)

    assert torch.equal(linear(x), expected)
