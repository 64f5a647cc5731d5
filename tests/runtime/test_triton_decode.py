"""Stored weights decoded by kernels, and multiplied with few rows, against `formats.base.dequantize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ditcompress.formats.base import dequantize, resolve
from ditcompress.plan import WeightSpec
from tests.runtime.triton_support import DEVICE, INTERPRETED, kernels, noise

decode = kernels("decode")
small_m = kernels("small_m")


def stored(spec: WeightSpec, weight: Tensor) -> Mapping[str, Tensor]:
    module, params = resolve(spec)
    grid = module.fit(weight.cpu(), params, None)
    packed = module.pack(module.code(weight.cpu(), grid, params), grid, params)
    return {name: tensor.to(DEVICE) for name, tensor in packed.items()}


def spec(format: str, **params: Any) -> WeightSpec:
    return WeightSpec(format, params)


INTEGERS = [
    *(spec("int", bits=b, layout=layout, group=16, symmetric=s)
      for b in range(2, 9) for layout in ("row", "group") for s in (True, False)),
    spec("int", bits=4, layout="tensor", symmetric=False), spec("int", bits=3, layout="column_group", group=4),
    spec("int", bits=4, layout="column_group", group=4, symmetric=False, zero="int16"),
    spec("int", bits=4, layout="group", group=12, symmetric=False, scale="bfloat16"),
    spec("int", bits=3, layout="group", group=16, symmetric=False, scale="uint8"),
    spec("int", bits=8, layout="row", symmetric=False, zero="int16", scale="float16"),
]  # fmt: skip
OTHERS = [
    spec("nf4", block=16), spec("nf4", block=12, scale="uint8"),
    *(spec("fp", element=e, layout=layout, group=16)
      for e in ("e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2") for layout in ("row", "group")),
    *(spec("mx", element=e) for e in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")),
    spec("ternary"), spec("ternary", packing="base3"), spec("ternary", layout="group", group=16, packing="base3"),
    spec("vq", bits=4, dim=4, iterations=2), spec("vq", bits=5, dim=3, rows=5, row_scale=True, iterations=2),
    spec("vq", bits=10, dim=2, iterations=0), spec("vq", bits=1, dim=8, iterations=1),
]  # fmt: skip
ALL = INTEGERS + OTHERS
EXACT_INT8 = ("e1m2", "e2m1", "e3m0", "e2m3")


def name(value: Any) -> str:
    if not isinstance(value, WeightSpec):
        return "x".join(map(str, value))
    return "-".join([value.format, *(str(v) for v in value.params.values())])


@pytest.mark.parametrize("which", ALL, ids=name)
@pytest.mark.parametrize("shape", [(7, 77)], ids=name)
def test_every_format_decodes_as_its_module_says(which: WeightSpec, shape: tuple[int, int]) -> None:
    tensors = stored(which, noise(*shape, kind="zeros"))
    exact = dequantize(which, tensors, shape)
    ours = decode.decode_float(which, tensors, shape, torch.float32)
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)

    codes, scale = decode.decode_int8(which, tensors, shape)
    assert codes.dtype == torch.int8 and scale.shape == (shape[0], 1) and (scale > 0).all()
    error = (codes * scale - exact).abs()
    if one_step(which) and (which.format != "fp" or which.params["element"] in EXACT_INT8):
        assert error.max() <= 1e-6 * exact.abs().max()
    else:
        assert (error <= 0.5001 * scale).all()
        full = exact.abs().amax(1) > 0
        assert (codes.abs().amax(1)[full] == 127).all() and not codes[~full].any()


def one_step(which: WeightSpec) -> bool:
    """One scale a row, and whole numbers within +-127."""
    layout = which.params.get("layout", "row")
    if which.format == "int":
        symmetric = which.params.get("symmetric", True)
        eight = not symmetric and which.params["bits"] == 8
        return layout in ("row", "tensor") and not eight and which.params.get("zero") != "int16"
    return which.format in ("fp", "ternary") and layout in ("row", "tensor")


@pytest.mark.parametrize("which", OTHERS + INTEGERS[::3], ids=name)
def test_every_format_as_e4m3(which: WeightSpec) -> None:
    shape = (5, 70)
    tensors = stored(which, noise(*shape, kind="zeros"))
    exact = dequantize(which, tensors, shape)
    codes, scale = decode.decode_e4m3(which, tensors, shape)
    assert codes.dtype == torch.float8_e4m3fn
    error = (codes.float() * scale - exact).abs()
    small = which.params.get("element", "") in ("e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e4m3")
    if small and (which.format == "mx" or which.params["layout"] == "row"):
        assert error.max() <= 1e-6 * exact.abs().max()
    bound = exact.abs() / 16 + scale * 2.0**-10
    assert (error <= bound * 1.001).all()


def test_the_decoded_row_of_mxfp4_is_exact_over_14_binades_and_close_beyond() -> None:
    which, shape = spec("mx", element="e2m1"), (2, 96)
    weight = noise(*shape)
    weight[0, 32:64] *= 2.0**-12
    weight[1, 32:64] *= 2.0**-30
    tensors = stored(which, weight)
    exact = dequantize(which, tensors, shape)
    codes, scale = decode.decode_e4m3(which, tensors, shape)
    assert torch.equal(codes[0].float() * scale[0], exact[0])
    assert (codes[1].float() * scale[1] - exact[1]).abs().max() <= 2.0**-10 * scale[1].item()


def test_what_the_grid_of_a_row_costs() -> None:
    which, weight = spec("int", bits=4, layout="group", group=64, symmetric=False), noise(16, 1152)
    tensors = stored(which, weight)
    exact = dequantize(which, tensors, tuple(weight.shape))
    codes, scale = decode.decode_int8(which, tensors, tuple(weight.shape))
    before, after = ((weight - w).square().sum().log10() * 10 for w in (exact, codes * scale))
    assert after - before < 0.1


def test_half_precision_and_wide_rows() -> None:
    which, shape = spec("int", bits=4, layout="group", group=32, symmetric=False), (2, 2500)
    tensors = stored(which, noise(*shape))
    exact = dequantize(which, tensors, shape)
    ours = decode.decode_float(which, tensors, shape)
    assert ours.dtype == torch.bfloat16
    assert ((ours.float() - exact).abs() <= exact.abs() * 2.0 ** (-7 if INTERPRETED else -8)).all()
    codes, scale = decode.decode_int8(which, tensors, shape)
    assert ((codes * scale - exact).abs() <= 0.5001 * scale).all()
    with pytest.raises(ValueError, match="decodes"):
        decode.decode_int8(which, tensors, (2, 20000))
    assert not decode.supported(spec("nvfp4"), (2, 32))


@pytest.mark.parametrize("which", ALL[::4] + OTHERS[-4:], ids=name)
@pytest.mark.parametrize("shape", [(1, 20, 77), (17, 33, 130)], ids=name)
def test_few_rows_times_packed_weights(which: WeightSpec, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    tensors, x, bias = stored(which, noise(n, k)), noise(m, k, seed=1), noise(n, seed=2)
    got = small_m.product(x, which, tensors, (n, k), bias, activation="silu")
    exact = torch.nn.functional.silu(x.double()) @ dequantize(which, tensors, (n, k)).double().t() + bias
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_few_rows_keep_their_dtype_and_shape() -> None:
    which, shape = spec("int", bits=8), (20, 70)
    tensors, x = stored(which, noise(*shape)), noise(2, 1, 70, seed=1).bfloat16()
    got = small_m.product(x, which, tensors, shape)
    exact = x.double() @ dequantize(which, tensors, shape).double().t()
    assert got.dtype == torch.bfloat16 and got.shape == (2, 1, 20)
    assert (got.double() - exact).norm() <= 0.01 * exact.norm()
    with pytest.raises(ValueError, match="65 rows"):
        small_m.product(noise(65, 70), which, tensors, shape)
