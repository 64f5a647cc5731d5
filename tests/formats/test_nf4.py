"""NormalFloat 4 against bitsandbytes, and the bytes it takes."""

from __future__ import annotations

import pytest
import torch

from ditcompress.formats import nf4 as fmt
from ditcompress.formats.base import PackedWeight
from ditcompress.plan import WeightSpec


@pytest.mark.parametrize("block", [32, 64, 128])
def test_codes_scales_and_values_are_those_of_bitsandbytes(block: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    packed, state = functional.quantize_4bit(w, blocksize=block, quant_type="nf4")
    flat = packed.reshape(48, -1)
    theirs = torch.stack((flat >> 4, flat & 15), -1).reshape(48, 256)
    params = fmt.Params(block=block)
    grid = fmt.fit(w, params)
    codes = fmt.code(w, grid, params)
    assert state.code.tolist() == list(fmt.TABLE)
    assert torch.equal(grid.scale.reshape(-1), state.absmax)
    assert torch.equal(codes.to(torch.uint8), theirs)
    assert torch.equal(fmt.value(codes, grid, params), functional.dequantize_4bit(packed, state))


def test_two_level_scales_cost_about_a_tenth_of_a_bit() -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = {}
    for scale in ("float32", "uint8"):
        spec = WeightSpec("nf4", {"scale": scale})
        params = fmt.Params(**spec.params)
        grid = fmt.fit(w, params)
        codes = fmt.code(w, grid, params)
        packed = PackedWeight(spec, (64, 512), fmt.pack(codes, grid, params))
        assert packed.bits == pytest.approx(4 + (32 / 64 if scale == "float32" else 8 / 64 + 16 / 512))
        errors[scale] = (fmt.value(codes, grid, params) - w).square().mean().item()
    assert errors["uint8"] < 1.02 * errors["float32"]


def test_the_clip_search_never_does_worse_than_the_full_range() -> None:
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) ** 3
    errors = []
    for clip in (1, 20):
        params = fmt.Params(clip=clip, scale="float16")
        grid = fmt.fit(w, params)
        errors.append((fmt.value(fmt.code(w, grid, params), grid, params) - w).square().sum().item())
    assert errors[1] < errors[0]
