"""Norms, activations, gates and residuals inside the kernels of a product: the same outputs, and what was fused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditcompress.calibration.footprint import ONE_ROW
from ditcompress.console import Silent
from ditcompress.evaluation import bench
from ditcompress.formats.base import resolve
from ditcompress.hadamard import pack_signs, rotate, signs
from ditcompress.models import registry
from ditcompress.plan import ActivationSpec, WeightSpec
from ditcompress.runtime.fusion import Deferred, set_fusion
from ditcompress.runtime.linear import PackedLinear, Scheme, replace_linears
from tests.pruning.models import DEPTHS, inputs, run
from tests.runtime.triton_support import DEVICE, kernels

rows = kernels("rows")
int8_gemm = kernels("int8_gemm")
F = torch.nn.functional
INT8 = WeightSpec("int", {"bits": 8, "symmetric": True, "layout": "row", "scale": "float32"})
SCHEMES = {
    "plain": Scheme(INT8, ActivationSpec("token", 8, False)),
    "rotated": Scheme(INT8, ActivationSpec("token", 8, True), rotate=16),
    "low rank": Scheme(INT8, ActivationSpec("token", 8, False), rank=4),
    "outside": Scheme(INT8, ActivationSpec("token", 8, True), rank=4, low_rank_input="float"),
}


def fill(layer: PackedLinear, linear: nn.Linear, seed: int) -> None:
    """The packed form of a linear, with signs and a small low-rank part where the scheme has them."""
    weight = linear.weight.detach()
    if layer.scheme.rotate:
        layer.rotate_sign.copy_(pack_signs(signs(layer.in_features, seed)))
        weight = rotate(weight, layer.signs(), layer.scheme.rotate)
    fmt, params = resolve(layer.scheme.weight)
    grid = fmt.fit(weight, params)
    stored = fmt.pack(fmt.code(weight, grid, params), grid, params)
    generator = torch.Generator().manual_seed(seed)
    for name in layer.stored:
        if name.startswith("low_rank"):
            stored[name] = 0.05 * torch.randn(getattr(layer, name).shape, generator=generator)
        if name in stored:
            getattr(layer, name).copy_(stored[name])
    if layer.bias is not None:
        layer.bias.copy_(linear.bias)


@torch.no_grad()
def packed(model: nn.Module, names: list[str], scheme: Scheme) -> nn.Module:
    """A copy of the model whose named linears are packed and run on the Triton kernels."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    old = {name: model.get_submodule(name) for name in names}
    replace_linears(model, dict.fromkeys(names, scheme), torch.float32)
    for seed, (name, linear) in enumerate(old.items()):
        layer = model.get_submodule(name)
        fill(layer, linear, seed)  # type: ignore[arg-type]
        layer.kernels = {DEVICE.type: "triton_int8"}  # type: ignore[assignment]
    return model.to(DEVICE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels that ran: `rows`, `product`, and of them those with something more."""
    found: Counter[str] = Counter()

    def counted(module: Any, name: str, more: tuple[str, ...]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            found.update(key for key in more if kwargs.get(key) is not None)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(rows, "quantize_rows", ("norm", "shift"))
    counted(int8_gemm, "product", ("activation", "residual", "gate"))
    return found


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Operations of torch inside."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    seen: Counter[str] = Counter()
    with Mode():
        yield seen


def linears(family: str, model: nn.Module) -> list[str]:
    """Those of the first block of each kind: the interpreter takes a tenth of a second a product."""
    layout = registry.get(family).layout(model)
    first = {block for block in layout.blocks if block.endswith(".0")}
    return [site.name for site in layout.sites if site.block in first and site.role not in ONE_ROW]


@pytest.mark.parametrize("family", sorted(DEPTHS))
def test_a_model_gives_what_its_reference_gives(family: str, calls: Counter[str]) -> None:
    model = registry.get(family).tiny()
    names = linears(family, model)
    model = packed(model, names, SCHEMES["plain"])
    given = inputs(family, model)
    with torch.no_grad():
        fused = run(family, set_fusion(model), given)
        for name in names:
            model.get_submodule(name).kernels = {}  # type: ignore[assignment]
        plain = run(family, set_fusion(model, False), given)
    assert type(fused) is Tensor
    assert float((fused - plain).norm() / plain.norm()) < 5e-3
    assert 0 < calls["quantize_rows"] < calls["product"] <= len(names)
    assert calls["norm"] and calls["residual"] and (calls["activation"] or family == "generic"), calls  # that has GEGLU


def test_a_dit_block_is_four_roundings_and_six_products(calls: Counter[str]) -> None:
    model = registry.get("dit").tiny()
    model = packed(model, linears("dit", model), SCHEMES["plain"])
    x = torch.randn(2, 4, 64).to(DEVICE)
    block, given = model.transformer_blocks[0], {"timestep": torch.tensor([5, 6]), "class_labels": torch.tensor([1, 2])}
    set_fusion(model)
    with torch.no_grad(), counting() as seen:
        y = block(x, **given)
    assert type(y) is Tensor and (calls["quantize_rows"], calls["product"]) == (4, 6)
    assert (calls["norm"], calls["shift"]) == (2, 2)
    assert (calls["activation"], calls["residual"], calls["gate"]) == (1, 2, 2)
    assert seen["gelu"] == seen["native_layer_norm"] == 0
    set_fusion(model, False)
    calls.clear()
    with torch.no_grad(), counting() as seen:
        torch.testing.assert_close(block(x, **given), y, rtol=1e-3, atol=1e-3)
    assert calls == {"quantize_rows": 6, "product": 6} and seen["gelu"] == 1 and seen["native_layer_norm"] == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(32, 1e-6, False), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        y = self.second(F.gelu(self.first(self.norm(x) * (1 + scale) + shift), approximate="tanh"))
        return x + gate * y


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_scheme_and_dtype(scheme: Scheme, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = packed(Block(), ["first", "second"], scheme)
    x, *vectors = (torch.randn(2, n, 32).to(DEVICE, dtype) for n in (5, 1, 1, 1))
    with torch.no_grad():
        wanted = model(x.float(), *(v.float() for v in vectors))
        plain, fused = model(x, *vectors), set_fusion(model)(x, *vectors)
    assert fused.dtype == dtype and type(fused) is Tensor
    far, near = (float((y.float() - wanted).norm() / wanted.norm()) for y in (plain, fused))
    assert near < (2e-3 if dtype == torch.float32 else max(1e-2, 1.2 * far))


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a view": lambda y, v: y.view(2, 5, 4, 8).transpose(1, 2),
    "parts": lambda y, v: torch.cat(y.chunk(2, dim=-1)),
    "two at once": lambda y, v: y * y + y,
    "a number": lambda y, v: (2 * y + 1) / 3,
    "rows of their own": lambda y, v: y * torch.ones(5, 1, device=DEVICE),
    "a vector from the left": lambda y, v: v + v * y,
    "two vectors": lambda y, v: (y * v) * v + v + v,
    "subtraction": lambda y, v: v - y,
    "another dtype": lambda y, v: y.to(torch.bfloat16).float(),
    "the dtype of another": lambda y, v: (y * v).type_as(v.double()),
    "written over": lambda y, v: y.mul_(2) + v,
    "an index": lambda y, v: y[:, 1:3] + y[0, 0],
    "nothing": lambda y, v: F.dropout(y.to(y.dtype) / 1.0, 0.5, training=False) * 1,
    "silu of a gate": lambda y, v: F.silu(y * v),
    "an activation twice": lambda y, v: F.gelu(F.gelu(y)),
    "attention": lambda y, v: F.scaled_dot_product_attention(y, y, y),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_any_use_of_what_was_put_off_has_its_numbers(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = packed(nn.Sequential(nn.LayerNorm(32, 1e-6, False), nn.Linear(32, 32)), ["1"], SCHEMES["plain"])
    x, v = torch.randn(2, 5, 32).to(DEVICE), torch.randn(2, 1, 32).to(DEVICE)
    with torch.no_grad():
        wanted = [use(model[0](x), v), use(model[1](x), v)]
        set_fusion(model)
        put_off = [model[0](x), model[1](x)]
        assert all(isinstance(y, Deferred) and y.value is None for y in put_off)
        found = [use(y, v) for y in put_off]
    for one, other in zip(found, wanted, strict=True):
        one = one.plain() if isinstance(one, Deferred) else one
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_input_that_changes_under_way_is_told() -> None:
    norm = set_fusion(nn.Sequential(nn.LayerNorm(32, 1e-6, False)))
    x = torch.randn(2, 5, 32).to(DEVICE)
    with torch.no_grad():
        y = norm(x)
        x += 1
        with pytest.raises(RuntimeError, match="changed before its output was read"):
            y + 0.5


def test_gradients_and_compilation_take_the_ordinary_way() -> None:
    model = set_fusion(packed(Block(), ["first", "second"], SCHEMES["plain"]))
    x = torch.randn(2, 5, 32).to(DEVICE).requires_grad_()
    assert type(model.norm(x)) is Tensor and model.norm(x).requires_grad
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), torch.no_grad():
        assert type(model.norm(x)) is Tensor
    with torch.no_grad():
        assert isinstance(model.norm(x), Deferred)
        twin = copy.deepcopy(model)
        assert isinstance(twin.norm(x), Deferred) and twin.norm.forward.args[0] is twin.norm


def test_new_weights_are_not_fused_with_old_signs() -> None:
    model = set_fusion(packed(Block(), ["first", "second"], SCHEMES["rotated"]))
    assert model.first.rounding != model.second.rounding is not None
    model.load_state_dict(model.state_dict())
    assert model.first.rounding is None and model.second.rounding is None


def test_the_benchmark_has_an_arm_of_it_where_it_does_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.peers, "PEERS", ())
    model = packed(Block(), ["first", "second"], SCHEMES["plain"])
    arms = list(bench._arms({"plain": Block(), "w8a8": model}, [], bench.Bench(), Silent()))
    assert [(arm.name, arm.fused) for arm in arms] == [("plain", False), ("w8a8", False), ("w8a8, fused", True)]
    assert arms[2].model.first.rounding and model.first.rounding is None  # type: ignore[union-attr]
