"""Expert layers: the same function as the dense layer, grouped execution equal to the loop, the balance loss."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from ditcompress import mixture
from ditcompress.errors import DitcompressError
from ditcompress.experts import ExpertLayer, apply_experts, build, convertible, left_dense
from ditcompress.models import adapter_for
from ditcompress.models import registry as families
from ditcompress.models._table import is_linear
from ditcompress.runtime.moe import MoEFeedForward, balance_loss, feed_forwards, idle_parameters

FAMILIES = [name for name in families.names() if name != "generic"]  # its tiny model, a Sana, has convolutions
METHODS = ("random", "dense2moe", "moe_best", "dit_moe")


def tokens_for(layout: object, axes: dict[str, str], model: nn.Module, count: int = 128) -> dict[str, torch.Tensor]:
    from ditcompress.structure import writers

    generator = torch.Generator().manual_seed(5)
    widths = {p: writers(layout, a)[0].in_features for p, a in axes.items()}  # type: ignore[arg-type]
    return {p: torch.randn(count, w, generator=generator) for p, w in widths.items()}


def converted(family: str, method: str, *, slices: int = 8, shared: int = 1, active: int = 2) -> tuple[nn.Module, ...]:
    """A tiny model in float64, and its copy with expert layers."""
    model = families.get(family).tiny().double()
    layout = families.get(family).layout(model)
    axes, module = convertible(model, layout), mixture.method_of(method)
    params = module.Params(refit=False) if method == "moe_best" else module.Params()
    offset = bool(getattr(params, "offsets", False))
    specs = mixture.specs_for(model, layout, slices, shared, active, offset=offset)
    tokens = tokens_for(layout, axes, model)
    importance = {
        p: torch.rand(layout.axes[a].size, generator=torch.Generator().manual_seed(1)) for p, a in axes.items()
    }
    parts = mixture.convert(model, layout, specs, module, params, tokens, importance)
    sparse = copy.deepcopy(model)
    for path, part in parts.items():
        sparse.set_submodule(path, part)
    return model, sparse


def layer(active: int = 2, gate: str = "one", shared: bool = True, seed: int = 0) -> MoEFeedForward:
    torch.manual_seed(seed)

    def part(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 16, bias=False)).double()

    moe = MoEFeedForward(part(8) if shared else None, [part(4) for _ in range(5)], torch.randn(16).double(), 16, active)
    moe.gate = gate  # type: ignore[assignment]
    moe.router.weight.normal_()
    return moe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [0, 1])
def test_all_experts_active_with_unit_gates_equal_the_dense_layer(family: str, method: str, shared: int) -> None:
    dense, sparse = converted(family, method, shared=shared)
    layers = feed_forwards(sparse)
    assert layers
    for path, moe in layers.items():
        x = torch.randn(
            2, 9, moe.router.weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        wanted = dense.get_submodule(path)(x)
        moe.active = len(moe.experts)
        assert (moe(x) - wanted).norm() < 1e-6 * wanted.norm()  # offsets come from float32 statistics
        moe.active = 2
        assert (moe(x) - wanted).norm() > 1e-3 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_with_all_experts_is_the_dense_model(family: str) -> None:
    dense, sparse = converted(family, "moe_best")
    module = families.get(family)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn((2, *module.latent_shape(dense.config)), generator=generator, dtype=torch.float64)
    cond = module.random_conditions(dense.config, 2, generator)
    for moe in feed_forwards(sparse).values():
        moe.active = len(moe.experts)
    with torch.no_grad():
        a, b = (module.predict(m, latents, torch.tensor([400, 400]), cond) for m in (dense, sparse))
    assert (a - b).norm() < 1e-6 * a.norm()


@pytest.mark.parametrize("method", METHODS)
def test_expert_neurons_are_a_partition(method: str) -> None:
    module = mixture.method_of(method)
    generator = torch.Generator().manual_seed(0)
    hidden, down = torch.randn(200, 64, generator=generator).relu(), torch.randn(16, 64, generator=generator)
    spec = ExpertLayer(16, 6, 8, 2)
    split = module.split(
        mixture.FeedForward("ff", spec, down, torch.randn(200, 16, generator=generator), hidden,
                            torch.rand(64, generator=generator)), module.Params(),
    )  # fmt: skip
    assert sorted(split.order) == list(range(64))
    assert len(split.shared) == 16 and [len(e) for e in split.experts] == [8] * 6
    assert split.router_weight.shape == (6, 16) and split.router_bias.shape == (6,)


@pytest.mark.parametrize("active", [0, 1, 2, 5])
@pytest.mark.parametrize("gate", ["one", "share"])
@pytest.mark.parametrize("shared", [False, True])
def test_grouped_execution_equals_the_loop(active: int, gate: str, shared: bool) -> None:
    moe = layer(active, gate, shared)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).double()
    if active:
        assert torch.allclose(moe(x), moe.reference(x), atol=1e-12)
    assert moe(x).shape == x.shape


def test_an_expert_without_tokens_does_not_run_and_no_token_is_dropped() -> None:
    moe = layer(1)
    moe.router.weight.zero_()
    moe.router.bias.copy_(torch.tensor([0.0, 0, 0, 9, 0]))
    ran: list[tuple[int, int]] = []
    for number, expert in enumerate(moe.experts):
        expert.register_forward_hook(lambda m, a, y, n=number: ran.append((n, len(a[0]))))  # type: ignore[misc]
    x = torch.randn(11, 16).double()
    assert torch.allclose(moe(x), moe.reference(x))
    assert ran[0] == (3, 11) and {n for n, _ in ran} == {3}


def test_the_router_stays_float32_and_shapes_of_empty_batches_hold() -> None:
    moe = layer().to(torch.bfloat16)
    assert moe.router.weight.dtype == moe.router.bias.dtype == torch.float32
    assert next(moe.experts.parameters()).dtype == torch.bfloat16
    assert moe(torch.randn(2, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert moe(torch.zeros(0, 3, 16, dtype=torch.bfloat16)).shape == (0, 3, 16)


def test_gradients_of_unit_gates_reach_the_router_and_leave_the_output() -> None:
    moe, x = layer(), torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).double()
    plain = moe(x).detach()
    moe.router.weight.requires_grad_(True)
    y = moe(x)
    assert torch.allclose(y, plain, atol=1e-6)
    y.square().sum().backward()
    assert moe.router.weight.grad is not None and float(moe.router.weight.grad.abs().sum()) > 0


def test_the_balance_loss_is_one_at_uniform_use_and_least_there() -> None:
    experts, tokens = 4, 64
    even = torch.full((tokens, experts), 1 / experts)
    turns = torch.arange(tokens)[:, None] % experts
    assert float(balance_loss(even, turns)) == pytest.approx(1)
    collapsed = torch.zeros(tokens, experts)
    collapsed[:, 0] = 1
    assert float(balance_loss(collapsed, torch.zeros(tokens, 1, dtype=torch.long))) == pytest.approx(experts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # a choice that follows the probabilities: never below one
        bias = torch.randn(experts, generator=generator)
        p = (torch.randn(tokens, experts, generator=generator) * 0.01 + bias).softmax(-1)
        assert float(balance_loss(p, p.topk(2, dim=-1).indices)) > 1


def test_parameters_are_those_of_the_dense_layer_and_the_idle_ones_are_counted() -> None:
    dense, sparse = converted("dit", "random")
    assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in sparse.parameters())
    size = sum(p.numel() for p in sparse.transformer_blocks[0].ff.experts[0].parameters())  # type: ignore[union-attr, index]
    assert idle_parameters(sparse) == 2 * 5 * size


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_converted_model_has_a_role_and_nothing_folds_into_an_expert(family: str) -> None:
    _, sparse = converted(family, "random")
    layout = families.get(family).layout(sparse)
    assert sorted(s.name for s in layout.sites) == sorted(n for n, m in sparse.named_modules() if is_linear(m))
    assert "other" not in {site.role for site in layout.sites}
    inside = tuple(f"{path}." for path in feed_forwards(sparse))
    for site in layout.sites:
        if site.name.startswith(inside) and site.role == "ffn_in":
            assert not any(layout.axes[name].fold for name in site.reads if name)
    assert not convertible(sparse, layout)


def test_the_parallel_layers_of_flux_single_blocks_are_left_dense_and_named() -> None:
    model = families.get("flux").tiny()
    layout = families.get("flux").layout(model)
    assert left_dense(model, layout) == ["single_transformer_blocks.0.proj_mlp"]
    assert list(convertible(model, layout)) == ["transformer_blocks.0.ff", "transformer_blocks.0.ff_context"]


OTHERS = ("PixArtTransformer2DModel", "CogVideoXTransformer3DModel", "AuraFlowTransformer2DModel",
          "Lumina2Transformer2DModel", "AllegroTransformer3DModel")  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_an_empty_model_of_other_classes_takes_expert_layers(name: str) -> None:
    from ditcompress.models import build_meta

    model = build_meta({"_class_name": name})
    layout = adapter_for(name).layout(model)
    specs = mixture.specs_for(model, layout, 8, 1, 2)
    path = next(iter(specs))
    apply_experts(model, {path: specs[path]})
    assert isinstance(model.get_submodule(path), MoEFeedForward)
    assert list(feed_forwards(model)) == [path]


def test_a_gated_layer_is_split_with_its_value_and_gate_rows() -> None:
    from diffusers.models.attention import FeedForward

    for kind in ("geglu", "swiglu", "gelu", "gelu-approximate"):
        block = nn.Module()
        block.blocks = nn.ModuleList([nn.Module()])
        block.blocks[0].ff = FeedForward(16, activation_fn=kind).double()
        from ditcompress.models._derive import derive

        layout = derive(block)
        axis = convertible(block, layout)["blocks.0.ff"]
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
        moe = build(block, layout, axis, ExpertLayer(8, 7, 8, 7), order)
        x = torch.randn(5, 16, dtype=torch.float64)
        assert torch.allclose(moe(x), block.blocks[0].ff(x), atol=1e-12), kind


def test_a_model_without_feed_forwards_of_linears_is_refused() -> None:
    model = families.get("generic").tiny()
    with pytest.raises(DitcompressError) as caught:
        mixture.specs_for(model, families.get("generic").layout(model), 8, 1, 2)
    assert caught.value.code == "E205"


@pytest.mark.parametrize(
    ("numbers", "code"), [((7, 1, 2), "E203"), ((8, 1, 8), "E203"), ((8, 8, 1), "E203"), ((8, -1, 1), "E203"),
                          ((0, 0, 0), "E203"), ((8, 1, -1), "E203"), ((8, 0, 0), "E203")],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, int], code: str) -> None:
    model = families.get("dit").tiny()
    with pytest.raises(DitcompressError) as caught:
        mixture.specs_for(model, families.get("dit").layout(model), *numbers)
    assert caught.value.code == code
    assert numbers != (7, 1, 2) or ("divide the 256 neurons" in caught.value.line() and "8" in caught.value.remedy)


def layer_of_tokens(count: int, *, width: int = 32, features: int = 16) -> mixture.FeedForward:
    """A dense layer of correlated neurons, as trained ones are."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(count, features, generator=generator)
    hidden = torch.nn.functional.gelu(tokens @ torch.randn(features, width, generator=generator))
    down = torch.randn(features, width, generator=generator)
    return mixture.FeedForward("ff", ExpertLayer(8, 3, 8, 1), down, tokens, hidden, None)


def error_of(layer: mixture.FeedForward, split: mixture.Split, tokens: torch.Tensor, hidden: torch.Tensor) -> float:
    """Relative squared error of the split layer on other tokens."""
    from ditcompress.mixture.base import chosen_mask

    mask = chosen_mask(split.router_weight, split.router_bias, tokens, layer.spec.active)
    kept, down = hidden.clone(), layer.down if split.down is None else split.down
    for number, own in enumerate(split.experts):
        kept[:, own] *= mask[:, number, None]
    assert split.offsets is not None
    y = kept @ down.T - mask.float() @ split.offsets + split.offsets.sum(0)
    y = y if split.shift is None else y + split.shift
    wanted = hidden @ layer.down.T
    return float((y - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("count", [24, 2000])
def test_fitting_output_weights_anew_helps_on_other_tokens_and_does_not_overfit(count: int) -> None:
    method, whole = mixture.method_of("moe-best"), layer_of_tokens(4000)
    few = dataclasses.replace(whole, tokens=whole.tokens[:count], hidden=whole.hidden[:count])
    found = {}
    for refit in (False, True):
        split = method.split(few, method.Params(refit=refit))
        found[refit] = error_of(few, split, whole.tokens[2500:], whole.hidden[2500:])
    assert found[True] < found[False] * (1.1 if count == 24 else 0.9)


def test_the_router_of_ours_beats_a_random_choice_on_the_same_partition() -> None:
    method, layer = mixture.method_of("moe-best"), layer_of_tokens(2000)
    split = method.split(layer, method.Params(refit=False))
    mine = error_of(layer, split, layer.tokens, layer.hidden)
    shuffled = dataclasses.replace(split, router_weight=torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
    assert mine < 0.9 * error_of(layer, shuffled, layer.tokens, layer.hidden)
