"""The packed linear on the Triton kernels, against its reference: every scheme that they take."""

from __future__ import annotations

import pytest

from ditcompress.plan import ActivationSpec, WeightSpec
from ditcompress.runtime.kernels import KERNELS, choose, set_decode
from ditcompress.runtime.linear import Scheme
from tests.runtime.test_linear import FORMATS, INT8, fitted, inputs, packed
from tests.runtime.triton_support import DEVICE, kernels

kernels("library")
TOKEN = ActivationSpec("token", 8, False)
UINT4 = FORMATS["int4 in whole-number groups"]
E4M3 = WeightSpec("fp", {"element": "e4m3", "layout": "row", "scale": "float32"})
SCHEMES = {
    "int8": ("triton_int8", Scheme(INT8, TOKEN)),
    "int8 symmetric, smoothed": ("triton_int8", Scheme(INT8, ActivationSpec("token", 8, True), "online")),
    "int8 rotated": ("triton_int8", Scheme(INT8, TOKEN, rotate=64)),
    "int8, low rank of codes": ("triton_int8", Scheme(INT8, TOKEN, rank=4)),
    "int8, low rank of floats": ("triton_int8", Scheme(INT8, TOKEN, rank=4, low_rank_input="float")),
    "int4 in whole-number groups": ("triton_int8", Scheme(UINT4, TOKEN)),
    "float inputs": ("triton_float", Scheme(UINT4)),
    "tokens in groups": ("triton_float", Scheme(UINT4, ActivationSpec("token", 8, False, group=16))),
    "fp8": ("triton_fp8", Scheme(E4M3, ActivationSpec("token", element="e4m3"))),
}


@pytest.mark.parametrize("name,scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("tokens", [1, 40])  # 80 rows are more than `small_m` takes
def test_a_linear_on_the_kernels_is_its_reference(tokens: int, name: str, scheme: Scheme) -> None:
    assert choose(scheme, "cuda") == name
    layer = (packed(scheme, 48, 64) if scheme.weight.format == "int" and "scale" in scheme.weight.params else
             fitted(scheme, 48, 64)).to(DEVICE)  # fmt: skip
    x = inputs(tokens, 64, outliers=True).to(DEVICE)
    expected = KERNELS["reference"].run(layer, x, {}, x.dtype)
    layer.kernels = {DEVICE.type: name}
    for when in ("call", "load"):
        set_decode(layer, when)  # type: ignore[arg-type]
        y = layer(x)
        assert y.shape == expected.shape and y.dtype == x.dtype
        # a code at a tie may fall to either side
        assert float((y - expected).norm() / expected.norm()) < (2e-2 if name == "triton_fp8" else 2e-3)
