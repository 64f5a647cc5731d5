"""Norms, activations, gates and residuals inside the kernels of a product: the same outputs, and what was fused.

`test_fusion.py` runs these tests with the CPU's kernel, `test_triton_fusion.py` with the GPU's: they name it by the
fixture `kernel`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
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
from ditcompress.runtime.kernels import KERNELS
from ditcompress.runtime.linear import PackedLinear, Scheme, replace_linears
from ditcompress.runtime.ops._normed import Normed
from tests.pruning.models import DEPTHS, inputs, run
from tests.runtime.triton_support import DEVICE

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
def packed(model: nn.Module, names: list[str], scheme: Scheme, kernel: str) -> nn.Module:
    """A copy of the model whose named linears are packed and run by a kernel."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    old = {name: model.get_submodule(name) for name in names}
    replace_linears(model, dict.fromkeys(names, scheme), torch.float32)
    for seed, (name, linear) in enumerate(old.items()):
        layer = model.get_submodule(name)
        fill(layer, linear, seed)  # type: ignore[arg-type]
        layer.kernels = {DEVICE.type: kernel}  # type: ignore[assignment]
    return model.to(DEVICE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, kernel: str) -> Counter[str]:
    """What the kernel was asked for: `rounded` and `computed`, and of them those with something more."""
    found: Counter[str] = Counter()
    module = KERNELS[kernel]
    rounded, computed = module.rounded, module.computed

    def round_(layer: Any, x: Any) -> Any:
        normed = isinstance(x, Normed)
        found.update({"rounded": 1, "norm": normed, "shift": normed and x.shift is not None})
        return rounded(layer, x)

    def compute(layer: Any, made: Any, codes: Any, shape: Any, dtype: Any, *more: Any) -> Any:
        found["computed"] += 1
        found.update(n for n, v in zip(("activation", "residual", "gate"), more, strict=False) if v is not None)
        return computed(layer, made, codes, shape, dtype, *more)

    monkeypatch.setattr(module, "rounded", round_)
    monkeypatch.setattr(module, "computed", compute)
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
def test_a_model_gives_what_its_reference_gives(family: str, calls: Counter[str], kernel: str) -> None:
    model = registry.get(family).tiny()
    names = linears(family, model)
    model = packed(model, names, SCHEMES["plain"], kernel)
    given = inputs(family, model)
    with torch.no_grad():
        fused = run(family, set_fusion(model), given)
        for name in names:
            model.get_submodule(name).kernels = {DEVICE.type: "reference"}  # type: ignore[assignment]
        plain = run(family, set_fusion(model, False), given)
    assert type(fused) is Tensor
    assert float((fused - plain).norm() / plain.norm()) < 5e-3
    assert 0 < calls["rounded"] < calls["computed"] <= len(names)
    assert calls["norm"] and calls["residual"] and (calls["activation"] or family == "generic"), calls  # that has GEGLU


def test_a_dit_block_is_four_roundings_and_six_products(calls: Counter[str], kernel: str) -> None:
    model = registry.get("dit").tiny()
    model = packed(model, linears("dit", model), SCHEMES["plain"], kernel)
    x = torch.randn(2, 4, 64).to(DEVICE)
    block, given = model.transformer_blocks[0], {"timestep": torch.tensor([5, 6]), "class_labels": torch.tensor([1, 2])}
    set_fusion(model)
    with torch.no_grad():
        y = block(x, **given)
    assert type(y) is Tensor
    assert calls == {"rounded": 4, "norm": 2, "shift": 2, "computed": 6, "activation": 1, "residual": 2, "gate": 2}
    set_fusion(model, False)
    with torch.no_grad(), counting() as seen:
        torch.testing.assert_close(block(x, **given), y, rtol=1e-3, atol=1e-3)
    assert seen["gelu"] == 1 and seen["native_layer_norm"] == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(32, 1e-6, False), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        y = self.second(F.gelu(self.first(self.norm(x) * (1 + scale) + shift), approximate="tanh"))
        return x + gate * y


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_scheme_and_dtype(scheme: Scheme, dtype: torch.dtype, kernel: str) -> None:
    torch.manual_seed(0)
    model = packed(Block(), ["first", "second"], scheme, kernel)
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
def test_any_use_of_what_was_put_off_has_its_numbers(use: Callable[[Tensor, Tensor], Tensor], kernel: str) -> None:
    torch.manual_seed(0)
    model = packed(nn.Sequential(nn.LayerNorm(32, 1e-6, False), nn.Linear(32, 32)), ["1"], SCHEMES["plain"], kernel)
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


def pair(kernel: str) -> nn.Module:
    """A norm and a packed linear."""
    return packed(nn.Sequential(nn.LayerNorm(32, 1e-6, False), nn.Linear(32, 32)), ["1"], SCHEMES["plain"], kernel)


def test_what_changes_under_way_is_told(kernel: str) -> None:
    norm, linear = set_fusion(pair(kernel))  # type: ignore[misc]
    x, v = torch.randn(2, 5, 32).to(DEVICE), torch.randn(2, 1, 32).to(DEVICE)
    with torch.no_grad():
        for put_off, changed in [(norm(x), x), (norm(x) * v, v), (norm(x) + v, v), (linear(x) * v, v)]:
            changed += 1
            with pytest.raises(RuntimeError, match="was changed before"):
                put_off + 0.5
        read = norm(x)
        first = linear(read)
        x += 1  # after it was rounded for all that read it
        assert torch.equal(linear(read) + 0, first + 0)


def test_a_copy_is_a_copy(kernel: str) -> None:
    x = torch.randn(2, 5, 32).to(DEVICE)
    copies: list[Callable[[Tensor], Tensor]] = [lambda y: y * 1, lambda y: y / 1.0]
    with torch.no_grad():
        for module in set_fusion(pair(kernel)):  # type: ignore[attr-defined]
            for copied in copies:
                y, wanted = module(x), module(x) + 0
                z = copied(y)
                z += 1
                assert torch.equal(y + 0, wanted) and torch.equal(z + 0, wanted + 1)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "to a device": lambda y, v: y.to(device=DEVICE),
    "to a layout": lambda y, v: y.to(memory_format=torch.contiguous_format),
    "to both": lambda y, v: y.to(DEVICE, dtype=torch.float64),
    "into a tensor": lambda y, v: torch.mul(y, v, out=torch.empty(2, 5, 32, device=DEVICE)),
    "by name": lambda y, v: torch.add(input=y.mul(other=v), other=v).div(other=2.0),
    "scaled": lambda y, v: torch.add(y, v, alpha=2),
    "rounded down": lambda y, v: y.div(2, rounding_mode="floor"),
    "an activation by name": lambda y, v: F.gelu(input=y),
    "an activation in place": lambda y, v: F.silu(y, inplace=True) + y,
}


@pytest.mark.parametrize("use", FORMS.values(), ids=FORMS)
def test_every_form_of_a_call(use: Callable[[Tensor, Tensor], Tensor], kernel: str) -> None:
    test_any_use_of_what_was_put_off_has_its_numbers(use, kernel)


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_norm_in_half_precision_has_its_own_epsilon(size: float, kernel: str) -> None:
    model = nn.Sequential(nn.RMSNorm(32, elementwise_affine=False), nn.Linear(32, 32))
    model = packed(model, ["1"], SCHEMES["plain"], kernel)  # type: ignore[assignment]
    x = (size * torch.randn(2, 5, 32)).bfloat16().to(DEVICE)
    with torch.no_grad():
        plain = model(x)
        fused = set_fusion(model)(x) + 0
    assert float((fused - plain).float().norm() / plain.float().norm()) < 2e-2


class Triples(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 3


@pytest.mark.parametrize("fused_first", [True, False])
def test_hooks_of_others_stay_what_they_are(fused_first: bool, kernel: str) -> None:
    x, model = torch.randn(2, 5, 32).to(DEVICE), pair(kernel)
    norm, linear = model  # type: ignore[misc]
    with torch.no_grad():
        wanted = linear(norm(x) * 3)
        set_fusion(model, fused_first)
        add_hook_to_module(norm, Triples())
        for on in (True, False):
            torch.testing.assert_close(set_fusion(model, on)(x) + 0, wanted, rtol=1e-3, atol=1e-3)
        assert type(norm._old_forward(x)) is Tensor


def test_weights_that_come_and_go_are_not_put_off(kernel: str) -> None:
    """A hook that empties a layer after its call leaves nothing for later."""
    model = packed(Block(), ["first", "second"], SCHEMES["plain"], kernel)
    given = [torch.randn(2, n, 32).to(DEVICE) for n in (5, 1, 1, 1)]
    with torch.no_grad():
        wanted = model(*given)
        for fused_first in (True, False):
            other = set_fusion(copy.deepcopy(model), fused_first)
            cpu_offload(other, execution_device=DEVICE, offload_buffers=True)
            torch.testing.assert_close(set_fusion(other)(*given), wanted, rtol=1e-3, atol=1e-3)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim, self.rounding, self.gamma = 32, "nearest", nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_only_norms_that_are_known_are_put_off() -> None:
    x, model = torch.randn(2, 5, 32).to(DEVICE), nn.Sequential(RMSNorm(), LayerNorm(32, 1e-6, False))
    with torch.no_grad():
        assert all(type(norm(x)) is Tensor for norm in set_fusion(model))  # type: ignore[attr-defined]
    assert model[0].rounding == "nearest"


def test_a_model_without_data_runs(kernel: str) -> None:
    model = set_fusion(packed(Block(), ["first", "second"], SCHEMES["plain"], kernel)).to("meta")
    assert model(*(torch.zeros(2, n, 32, device="meta") for n in (5, 1, 1, 1))).shape == (2, 5, 32)


def test_gradients_and_autocast_take_the_ordinary_way(kernel: str) -> None:
    model = set_fusion(packed(Block(), ["first", "second"], SCHEMES["plain"], kernel))
    x = torch.randn(2, 5, 32).to(DEVICE).requires_grad_()
    assert type(model.norm(x)) is Tensor and model.norm(x).requires_grad
    vector = torch.randn(2, 1, 32, device=DEVICE, requires_grad=True)
    assert (model.norm(x.detach()) * vector + vector).requires_grad  # a trained modulation
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), torch.no_grad():
        assert type(model.norm(x)) is Tensor
    with torch.no_grad():
        x = x.detach()
        assert isinstance(model.norm(x), Deferred)
        twin = copy.deepcopy(model)
        assert isinstance(twin.norm(x), Deferred) and twin.norm.forward.args[0] is twin.norm


def test_new_weights_are_not_fused_with_old_signs(kernel: str) -> None:
    model = set_fusion(packed(Block(), ["first", "second"], SCHEMES["rotated"], kernel))
    assert model.first.rounding != model.second.rounding is not None
    model.load_state_dict(model.state_dict())
    assert model.first.rounding is None and model.second.rounding is None


def test_the_benchmark_has_an_arm_of_it_where_it_does_something(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(bench.peers, "PEERS", ())
    model = packed(Block(), ["first", "second"], SCHEMES["plain"], kernel)
    arms = list(bench._arms({"plain": Block(), "w8a8": model}, [], bench.Bench(), Silent()))
    assert [arm.name for arm in arms if not arm.name.endswith("decoded")] == ["plain", "w8a8", "w8a8, fused"]
    assert [arm.fused for arm in arms] == [arm.name == "w8a8, fused" for arm in arms]
    assert arms[-1].model.first.rounding and model.first.rounding is None  # type: ignore[union-attr]
