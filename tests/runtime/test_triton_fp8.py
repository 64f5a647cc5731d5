"""E4M3 products against float64: whatever the device, the same codes give the same result."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.triton_support import DEVICE, kernels, noise

fp8 = kernels("fp8")
rows = kernels("rows")


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 24, 40), (33, 48, 64)])
@pytest.mark.parametrize("prepared", [False, True])
def test_products_of_any_shape(shape: tuple[int, int, int], prepared: bool) -> None:
    m, n, k = shape
    x, w = (rows.quantize_rows(noise(size, k, seed=i), element="e4m3") for i, size in enumerate((m, n)))
    bias = noise(n, seed=3)
    exact = (x.codes.double() * x.scale) @ (w.codes.double() * w.scale).t() + bias
    weight, scale, columns = w.codes, w.scale, 0
    if prepared:
        weight, columns = fp8.padded(weight, rows=True), n
        scale = torch.nn.functional.pad(scale, (0, 0, 0, len(weight) - n))
    got = fp8.product(x.codes, x.scale, weight, scale, bias, torch.float32, columns)
    tolerance = 1e-5 if not fp8.available(DEVICE) else 2**-7
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


def test_padding_adds_zeros() -> None:
    codes = noise(5, 17).to(torch.float8_e4m3fn)
    wide = fp8.padded(codes, rows=True)
    assert wide.shape == (16, 32) and torch.equal(wide[:5, :17].float(), codes.float())
    assert not wide.float()[5:].any() and not wide.float()[:, 17:].any()
