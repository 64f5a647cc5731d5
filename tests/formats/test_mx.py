"""OCP Microscaling against torchao's cast, bit for bit, and the scale options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditcompress.formats import mx as fmt

ELEMENTS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")


def weight() -> torch.Tensor:
    w = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    w = w * torch.logspace(-6, 4, 40)[:, None]
    w[3, 32:64] = 0
    w[4] = torch.arange(128) / 16  # ties and exact powers of two
    return w


def torchao_cast(w: torch.Tensor, element: str, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale bytes and bit patterns."""
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtypes: dict[str, Any] = {
        "e2m1": torch.float4_e2m1fn_x2,
        "e2m3": "fp6_e2m3",
        "e3m2": "fp6_e3m2",
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }
    scaling = module.ScaleCalculationMode[mode.upper()]
    scale, data = module.to_mx(w, dtypes[element], 32, scaling)
    data = data.view(torch.uint8)
    if element == "e2m1":
        data = torch.stack((data & 15, data >> 4), -1).reshape(w.shape)
    return scale.view(torch.uint8), data


@pytest.mark.parametrize("mode", ["floor", "even"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_and_exponents_are_those_of_torchao(element: str, mode: str) -> None:
    w = weight()
    params = fmt.Params(element=element, scale=mode)
    grid = fmt.fit(w, params)
    codes = fmt.code(w, grid, params)
    scale, data = torchao_cast(w, element, mode)
    assert torch.equal(fmt.pack(codes, grid, params)["scale"], scale)
    assert torch.equal(codes.to(torch.uint8), data)


@pytest.mark.parametrize("element", ELEMENTS)
def test_best_is_never_worse_than_floor(element: str) -> None:
    w = weight()
    errors = []
    for scale in ("floor", "best"):
        params = fmt.Params(element=element, scale=scale)
        grid = fmt.fit(w, params)
        blocks = (fmt.value(fmt.code(w, grid, params), grid, params) - w).reshape(40, 4, 32)
        errors.append(blocks.square().sum(-1))
    assert torch.all(errors[1] <= errors[0])
    assert element != "e2m1" or errors[1].sum() < errors[0].sum()


def test_mxfp4_takes_four_and_a_quarter_bits() -> None:
    layout = fmt.layout(fmt.Params(), (64, 128))
    assert sum(torch.Size(s).numel() * d.itemsize for s, d in layout.values()) * 8 == 64 * 128 * 4.25
