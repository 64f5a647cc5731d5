"""The packed linear: every path against plain floating point."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ditcompress.formats import int as fmt
from ditcompress.formats.base import resolve
from ditcompress.hadamard import pack_signs, signs
from ditcompress.plan import ActivationSpec, WeightSpec
from ditcompress.runtime.activation import fake_quantize
from ditcompress.runtime.kernels import ORDER, choose, set_decode
from ditcompress.runtime.linear import PackedLinear, Scheme
from ditcompress.runtime.ops import cpu_int8
from ditcompress.runtime.ops.base import registry as kernels

INT8 = WeightSpec("int", {"bits": 8, "layout": "row", "symmetric": True, "scale": "float32"})
INT4 = WeightSpec("int", {"bits": 4, "layout": "group", "group": 16, "symmetric": False, "scale": "uint8"})


def packed(scheme: Scheme, rows: int, columns: int, bias: bool = True) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    layer = PackedLinear(columns, rows, bias, scheme)
    params = fmt.Params(**scheme.weight.params)
    grid = fmt.fit(weight, params)
    stored = fmt.pack(fmt.code(weight, grid, params), grid, params)
    extra = {
        "smooth": torch.rand(columns, generator=generator) + 0.5,
        "low_rank_up": torch.randn(rows, scheme.rank, generator=generator).bfloat16(),
        "low_rank_down": torch.randn(scheme.rank, columns, generator=generator).bfloat16() / 10,
        "rotate_sign": pack_signs(signs(columns, 5)),
        "input_scale": torch.tensor([0.03]),
        "input_zero": torch.tensor([120.0]),
    }
    for name in layer.stored:
        setattr(layer, name, stored[name] if name in stored else extra[name])
    if layer.bias is not None:
        layer.bias.data = torch.randn(rows, generator=generator)
    return layer


def fitted(scheme: Scheme, rows: int, columns: int) -> PackedLinear:
    """A layer of random weights in any format, without bias, low rank or smoothing of its own."""
    fmt, params = resolve(scheme.weight)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    layer, grid = PackedLinear(columns, rows, True, scheme), fmt.fit(weight, params)
    stored = fmt.pack(fmt.code(weight, grid, params), grid, params)
    layer.load_state_dict({**stored, "bias": torch.zeros(rows)}, assign=True)
    return layer


def inputs(tokens: int, columns: int, outliers: bool = False) -> torch.Tensor:
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(1))
    if outliers:
        x[..., ::17] *= 40
    return x


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("tokens,rows,columns", [(1, 1, 1), (3, 5, 7), (16, 32, 64), (9, 17, 33), (64, 96, 160)])
@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
def test_the_integer_product_equals_floating_point_on_the_same_codes(
    tokens: int, rows: int, columns: int, symmetric: bool, outliers: bool
) -> None:
    scheme = Scheme(INT8, ActivationSpec("token", 8, symmetric))
    layer = packed(scheme, rows, columns)
    assert (choose(scheme, "cpu") == "cpu_int8") == cpu_int8.available()
    x = inputs(tokens, columns, outliers)
    rounded = fake_quantize(x, scheme.activation).double()
    expected = rounded @ layer.dequantize().double().T + layer.bias.double()
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


SCHEMES = {
    "weights only": Scheme(INT4),
    "per token": Scheme(INT4, ActivationSpec("token", 8, False)),
    "per tensor": Scheme(INT4, ActivationSpec("tensor", 8, False)),
    "static": Scheme(INT4, ActivationSpec("static", 8, True)),
    "static with zero": Scheme(INT4, ActivationSpec("static", 8, False)),
    "smoothed": Scheme(INT4, ActivationSpec("token", 8, True), "online"),
    "low rank": Scheme(INT4, ActivationSpec("token", 8, True), "online", 4),
    "int8 low rank": Scheme(INT8, ActivationSpec("token", 8, False), "online", 4),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_forward_is_what_the_scheme_says(scheme: Scheme) -> None:
    layer, x = packed(scheme, 24, 40), inputs(6, 40)
    smoothed = x / layer.smooth if scheme.smooth == "online" else x
    static = scheme.activation.mode == "static"
    rounded = fake_quantize(
        smoothed,
        scheme.activation,
        layer.input_scale if static else None,
        layer.input_zero if static and not scheme.activation.symmetric else None,
    ).double()
    expected = rounded @ layer.dequantize().double().T + layer.bias.double()
    assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_stored_tensors_keep_their_dtype_through_any_conversion(scheme: Scheme) -> None:
    layer = packed(scheme, 24, 40)
    before = {name: tensor.clone() for name, tensor in layer.stored_tensors().items()}
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        layer = convert(layer)
        for name, tensor in layer.stored_tensors().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert layer.bias.dtype == torch.float64


def test_two_codes_share_a_byte_in_memory_and_meta_knows_the_layout() -> None:
    scheme = Scheme(INT4)
    layer = packed(scheme, 24, 40)
    assert layer.qweight.shape == (24, 20) and layer.qweight.dtype == torch.uint8
    with torch.device("meta"):
        empty = PackedLinear(40, 24, True, scheme)
    assert {n: (t.shape, t.dtype) for n, t in empty.stored_tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in layer.stored_tensors().items()
    }
    assert layer.stored_bytes == sum(t.numel() * t.element_size() for t in layer.stored_tensors().values())


def test_a_bfloat16_input_gives_a_bfloat16_output_near_the_float32_one() -> None:
    for scheme in SCHEMES.values():
        layer, x = packed(scheme, 24, 40), inputs(6, 40)
        y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert (y.float() - layer(x)).norm() < 0.03 * layer(x).norm()


def test_every_kernel_has_a_place_in_the_order() -> None:
    assert sorted(ORDER) == kernels.names() and ORDER[-1] == "reference"


def test_large_inputs_stay_finite_in_float16() -> None:
    layer = packed(Scheme(INT8), 24, 640)
    x = 100 * inputs(4, 640).abs()
    y = layer(x.half())
    assert y.isfinite().all() and (y.float() - layer(x)).norm() < 0.01 * layer(x).norm()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", ["token", "tensor"])
def test_rounding_an_input_moves_it_by_at_most_one_step(mode: str, symmetric: bool, bits: int) -> None:
    x = inputs(5, 32)
    x[0, 0] = 0  # an all-zero token
    y = fake_quantize(x, ActivationSpec(mode, bits, symmetric))
    dims = (-1,) if mode == "token" else (0, 1, 2)
    span = x.amax(dims, keepdim=True).clamp_min(0) - x.amin(dims, keepdim=True).clamp_max(0)
    if symmetric:
        span = 2 * x.abs().amax(dims, keepdim=True)
    step = span / (2**bits - 2 if symmetric else 2**bits - 1)
    # DiTAS divides the range by 2^b, so its largest value loses one step more
    most = 1.6 if mode == "tensor" and not symmetric else 1.01
    assert ((y - x).abs() <= step * most + 1e-9).all()
    assert torch.isfinite(y).all()


def saturating(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What oneDNN does without VNNI: unsigned codes, pairs of products added in 16 bits."""
    terms = (codes.long() + 128).unsqueeze(1) * weight.long()
    if terms.shape[-1] % 2:
        terms = torch.nn.functional.pad(terms, (0, 1))
    pairs = terms.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - 128 * weight.long().sum(1)).int()


def test_an_integer_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_int8, "integer_product", saturating)
    assert not cpu_int8.adds_exactly()
    cpu_int8._with_onednn.cache_clear()
    try:
        assert choose(Scheme(INT8, ActivationSpec("token")), "cpu") == "reference"
    finally:
        cpu_int8._with_onednn.cache_clear()


@pytest.mark.parametrize("widest", ["AVX512_CORE", "AVX2"])
def test_outputs_are_right_on_a_processor_without_vnni(widest: str) -> None:
    code = """
    import torch
    from tests.runtime.test_linear import INT8, ActivationSpec, Scheme, fake_quantize, inputs, packed
    for symmetric in (True, False):
        layer, x = packed(Scheme(INT8, ActivationSpec("token", 8, symmetric)), 96, 640), inputs(8, 640)
        expected = fake_quantize(x, layer.scheme.activation).double() @ layer.dequantize().double().T + layer.bias
        print(float((layer(x) - expected).norm() / expected.norm()))
    """
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": widest}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(float(line) < 1e-6 for line in done.stdout.split()), done.stdout


def test_new_codes_bring_new_row_sums() -> None:
    layer, x = packed(Scheme(INT8, ActivationSpec("token", 8, False)), 24, 40), inputs(6, 40) + 2
    layer(x)  # the row sums of the first codes are kept from here on
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["qweight"] = state["qweight"].flip(0)
    layer.load_state_dict(state)
    expected = fake_quantize(x, layer.scheme.activation) @ layer.dequantize().T + layer.bias
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


FORMATS = {
    "int4 in whole-number groups": WeightSpec(
        "int", {"bits": 4, "layout": "group", "group": 16, "symmetric": False, "scale": "uint4"}
    ),
    "int8": INT8,
    "int4 in groups": INT4,
    "int3": WeightSpec("int", {"bits": 3}),
    "ternary": WeightSpec("ternary", {"packing": "base3"}),
    "nf4": WeightSpec("nf4", {"block": 16}),
    "fp6": WeightSpec("fp", {"element": "e2m3"}),
    "mxfp4": WeightSpec("mx", {"element": "e2m1"}),
    "nvfp4": WeightSpec("nvfp4", {}),
    "vq": WeightSpec("vq", {"bits": 4, "dim": 2}),
}


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_every_format_is_traced_without_a_break_and_decoded_once_if_asked(spec: WeightSpec) -> None:
    small = ActivationSpec("token", 4, True, group=16, element="e2m1", scale="e8m0")
    for activation in (ActivationSpec(), ActivationSpec("token", 8, False), small):
        layer = fitted(Scheme(spec, activation), 24, 48)
        x = inputs(6, 48)
        expected = fake_quantize(x, activation) @ layer.dequantize().T
        assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        called = layer(x)
        again = copy.deepcopy(layer)
        assert set_decode(layer, "load") is layer and again.decode_when == "call"
        assert torch.equal(layer(x), called) and torch.equal(layer(x), called)
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    with pytest.raises(ValueError, match="decode"):
        set_decode(layer, "always")  # type: ignore[arg-type]


def test_weights_of_whole_number_groups_meet_int8_tokens() -> None:
    spec = FORMATS["int4 in whole-number groups"]
    scheme = Scheme(spec, ActivationSpec("token", 8, False))
    assert choose(scheme, "cpu") == ("cpu_int8" if cpu_int8.available() else "reference")
    assert choose(Scheme(INT4, ActivationSpec("token", 8, False)), "cpu") == "reference"
    layer, x = packed(scheme, cpu_int8.PART + 40, 72), inputs(9, 72, outliers=True)
    expected = fake_quantize(x, scheme.activation).double() @ layer.dequantize().double().T + layer.bias.double()
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
