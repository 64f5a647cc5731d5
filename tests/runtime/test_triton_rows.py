"""Rows to codes, against the torch functions that they replace, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditcompress import hadamard
from ditcompress.runtime.activation import quantize_token, quantize_token_asymmetric
from tests.runtime.triton_support import DEVICE, INTERPRETED, kernels, noise

rows = kernels("rows")


def same_codes(ours: Tensor, theirs: Tensor, share: float = 2e-3) -> None:
    """Off by at most one, and rarely: ties that another order of sums falls on the other side of."""
    away = (ours.float() - theirs.float()).abs()
    assert away.max() <= 1 and (away > 0).float().mean() <= share


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 257), (2, 1152)])
@pytest.mark.parametrize("kind", ["plain", "outliers", "zeros", "constant", "negative"])
def test_the_grids_are_those_of_torch(bits: int, symmetric: bool, shape: tuple[int, int], kind: str) -> None:
    x = noise(*shape, kind=kind)
    got = rows.quantize_rows(x, bits=bits, symmetric=symmetric)
    if symmetric:
        codes, scale = quantize_token(x, bits)
        assert got.zero is None
    else:
        codes, scale, zero = quantize_token_asymmetric(x, bits)
        assert torch.equal(got.zero, zero)
    assert got.codes.dtype == torch.int8 and torch.equal(got.scale, scale)
    same_codes(got.codes, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_e4m3_rows_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    x = noise(5, 129, kind="outliers").to(dtype)
    got = rows.quantize_rows(x, element="e4m3")
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp_min(1e-12)
    assert got.codes.dtype == torch.float8_e4m3fn and torch.equal(got.scale, scale)
    theirs = (x.float() / scale).to(torch.float8_e4m3fn).float()
    error = (got.codes.float() - theirs).abs()
    assert (error > 0).float().mean() < 0.005 and (error <= theirs.abs() / 8 + 2.0**-9).all()


# powers of two as one, two and three products, widened ones, and orders that are not powers of two
@pytest.mark.parametrize(
    "width,block",
    [(48, 16), (8, 8), (24, 8), (96, 32), (384, 128), (512, 256), (1024, 512), (2048, 2048), (36, 36), (72, 36),
     (1152, 1152), (96, 48), (24, 12), (320, 160), (240, 60)],
)  # fmt: skip
def test_rotated_rows_are_those_of_hadamard(width: int, block: int) -> None:
    x, sign = noise(3, width, kind="outliers"), hadamard.signs(width, 1).to(DEVICE)
    got = rows.quantize_rows(x, sign=sign, rotate=block)
    exact = hadamard.rotate(x.double(), sign, block)
    codes, scale = quantize_token(exact.float(), 8)
    torch.testing.assert_close(got.scale, scale, rtol=2**-15, atol=0)
    same_codes(got.codes, codes, share=0.01)
    assert (got.codes * got.scale - exact).abs().max() <= 0.51 * scale.max()


def test_what_no_kernel_does_is_refused() -> None:
    device = DEVICE
    assert rows.supported(1152, 1152, device) and rows.supported(15360, 256, device)
    assert not rows.supported(20000, 0, device)
    with pytest.raises(ValueError, match="transform"):
        rows.quantize_rows(noise(2, 2 * 140), rotate=140)
    with pytest.raises(ValueError, match="samples"):
        rows.quantize_rows(noise(3, 8), shift=noise(2, 8))
    with pytest.raises(ValueError, match="bits"):
        rows.quantize_rows(noise(3, 8), bits=9)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "silu"])
def test_the_whole_chain(norm: str | None, activation: str | None) -> None:
    batch, tokens, width = 2, 3, 80
    x, h = noise(batch, tokens, width), noise(batch, tokens, width, seed=1)
    gate, shift, scale = (noise(batch, width, seed=s) for s in (2, 3, 4))
    smooth, sign = noise(width, seed=5).abs() + 0.3, hadamard.signs(width, 6).to(DEVICE)
    down = noise(5, width, seed=7).bfloat16()
    got = rows.quantize_rows(
        x, norm=norm, eps=1e-5, shift=shift, scale=scale, activation=activation, smooth=smooth, sign=sign, rotate=16,
        down=down, down_of="float", residual=h, gate=gate,
    )  # fmt: skip
    updated = h.double() + gate.double()[:, None] * x
    y = updated
    if norm == "layer":
        y = F.layer_norm(y, (width,), eps=1e-5)
    elif norm == "rms":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
    y = y * (1 + scale.double()[:, None]) + shift.double()[:, None]
    if activation:
        y = {"gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}[activation](y)
    y = hadamard.rotate(y / smooth, sign, 16).reshape(-1, width)
    codes, step = quantize_token(y.float(), 8)
    torch.testing.assert_close(got.residual, updated.float().reshape(-1, width), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.scale, step, rtol=2e-5, atol=0)
    same_codes(got.codes, codes, share=0.01)
    torch.testing.assert_close(got.down, (y @ down.double().t()).float(), rtol=1e-3, atol=1e-3)


def test_the_update_without_a_gate_in_the_models_dtype() -> None:
    x, h = noise(4, 33).bfloat16(), noise(4, 33, seed=1).bfloat16()
    got = rows.quantize_rows(x, residual=h, norm="layer")
    assert got.residual.dtype == torch.bfloat16 and got.residual.shape == x.shape
    exact = x.float() + h.float()  # the interpreter cuts bfloat16 off
    assert ((got.residual.float() - exact).abs() <= exact.abs() / (128 if INTERPRETED else 256)).all()
    codes, _ = quantize_token(F.layer_norm(got.residual.float(), (33,), eps=1e-6), 8)
    same_codes(got.codes, codes, share=0.02)


@pytest.mark.parametrize(
    "mode", [{}, {"symmetric": False}, {"element": "e4m3"}], ids=["symmetric", "asymmetric", "fp8"]
)
@pytest.mark.parametrize("shape", [(1, 17), (35, 150)])
def test_the_low_rank_part_of_the_rounded_input(mode: dict, shape: tuple[int, int]) -> None:
    x, down = noise(*shape), noise(6, shape[1], seed=1).bfloat16()
    got = rows.quantize_rows(x, down=down, **mode)
    rounded = (got.codes.double() - (0 if got.zero is None else got.zero)) * got.scale
    torch.testing.assert_close(got.down, (rounded @ down.double().t()).float(), rtol=1e-5, atol=1e-5)
