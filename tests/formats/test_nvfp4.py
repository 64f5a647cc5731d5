"""NVFP4 against torchao, and the search over block scales."""

from __future__ import annotations

import pytest
import torch

from ditcompress.formats import nvfp4 as fmt


def weight() -> torch.Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 64)[:, None]


def errors(w: torch.Tensor, params: fmt.Params) -> torch.Tensor:
    """Squared errors of the blocks, (N, B)."""
    grid = fmt.fit(w, params)
    return (fmt.value(fmt.code(w, grid, params), grid, params) - w).square().reshape(len(w), -1, 16).sum(-1)


def test_codes_and_block_scales_are_those_of_torchao() -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = weight()
    tensor_scale = module.per_tensor_amax_to_scale(w.abs().max())
    scale, packed = module.nvfp4_quantize(w, 16, tensor_scale)
    params = fmt.Params()
    grid = fmt.fit(w, params)
    ours = fmt.pack(fmt.code(w, grid, params), grid, params)
    assert torch.equal(ours["tensor_scale"].reshape(()), tensor_scale)
    assert torch.equal(ours["scale"], scale.view(torch.uint8).reshape(ours["scale"].shape))
    assert torch.equal(ours["qweight"], packed)


def test_the_searches_lower_the_error_of_blocks_and_raise_none() -> None:
    w = weight()
    plain = errors(w, fmt.Params())
    for params in (fmt.Params(four_over_six=True), fmt.Params(clip=12), fmt.Params(clip=12, four_over_six=True)):
        searched = errors(w, params)
        assert torch.all(searched <= plain)
        assert searched.sum() < plain.sum()


def test_four_over_six_represents_a_block_that_ends_at_four() -> None:
    """4, 3, 2, 1 has no error with the scale 1; scaled to 6 the 3 becomes 4.5, which e2m1 lacks."""
    w = torch.tensor([[4.0, 3, 2, 1] * 4, [6.0, 6, 6, 6] * 4])
    assert errors(w, fmt.Params())[0].item() > 0.1
    assert errors(w, fmt.Params(four_over_six=True))[0].item() < 0.02


def test_it_takes_four_and_a_half_bits_and_a_float() -> None:
    layout = fmt.layout(fmt.Params(), (64, 128))
    assert sum(torch.Size(s).numel() * d.itemsize for s, d in layout.values()) == 64 * 128 * 4.5 / 8 + 4
