"""moe-local: clusters with a linear router, experts pruned for them, neurons shared out between layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import nn
from torch.nn.functional import gelu, linear

from ditcompress import api, mixture
from ditcompress.distill.comparison import Imitating
from ditcompress.distill.data import Batch
from ditcompress.distill.losses import output_loss
from ditcompress.errors import DitcompressError
from ditcompress.experts import ExpertLayer, convertible
from ditcompress.loading import load_model
from ditcompress.mixture import moe_local
from ditcompress.mixture._clusters import clustered
from ditcompress.models import registry as families
from ditcompress.runtime.moe import feed_forwards
from tests.moe.test_command import FEW, predicted

LOCAL = (*FEW, "method.states=8", "method.tokens=512")


def blobs(count: int = 4, each: int = 100, width: int = 8, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    centres = 6 * torch.randn(count, width, generator=generator)
    return (centres[:, None] + spread * torch.randn(count, each, width, generator=generator)).reshape(-1, width)


def feed_forward(width: int, experts: int = 4, neurons: int = 32) -> mixture.FeedForward:
    """Tokens in blobs and what a random feed-forward of 8 features makes of them."""
    tokens, generator = blobs(spread=4.0), torch.Generator().manual_seed(4)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((neurons, 8), (8, neurons)))
    return mixture.FeedForward(
        "ff", ExpertLayer(0, experts, width, 1, offset=True, of=neurons), down, tokens, gelu(tokens @ up.T), None,
        weights=torch.rand(len(tokens), generator=generator) + 0.1,
    )  # fmt: skip


def lost(layer: mixture.FeedForward, split: mixture.Split) -> float:
    """Weighted squared error of the split over its calibration tokens, relative to the output's energy."""
    assert split.downs is not None and split.offsets is not None and split.shift is not None
    assert layer.weights is not None
    chosen = linear(layer.tokens, split.router_weight, split.router_bias).argmax(1)
    wanted, bias = layer.hidden @ layer.down.T, split.offsets.sum(0) + split.shift
    found = torch.stack([
        layer.hidden[t, split.experts[e]] @ split.downs[e].T + bias - split.offsets[e]
        for t, e in enumerate(chosen.tolist())
    ])  # fmt: skip
    error, energy = ((x.square().sum(1) * layer.weights).sum() for x in (found - wanted, wanted))
    return float(error / energy)


def test_the_router_is_the_nearest_centre_and_finds_the_blobs() -> None:
    tokens = blobs()
    weight, bias = clustered(tokens, torch.ones(len(tokens)), 4, 0.0, torch.Generator().manual_seed(0))
    chosen = linear(tokens, weight, bias).argmax(1)
    assert torch.equal(chosen, torch.cdist(tokens, weight).argmin(1))
    assert all(len(set(part.tolist())) == 1 for part in chosen.split(100)) and len(chosen.unique()) == 4


def test_small_clusters_are_lifted_to_the_floor() -> None:
    tokens = torch.cat(
        [
            torch.randn(950, 4, generator=torch.Generator().manual_seed(0)),
            torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) + 3,
        ]
    )

    def least(floor: float) -> float:
        router = clustered(tokens, torch.ones(1000), 4, floor, torch.Generator().manual_seed(1))
        return float(torch.bincount(linear(tokens, *router).argmax(1), minlength=4).min()) / 250

    assert least(0.5) >= 0.5 > least(0.0)


def test_experts_of_all_neurons_are_the_dense_layer_and_fewer_neurons_lose_more() -> None:
    params = moe_local.Params()
    errors = [lost(layer, moe_local.split(layer, params)) for layer in (feed_forward(w) for w in (32, 24, 16, 8))]
    assert errors[0] < 1e-10 and errors == sorted(errors)


def test_experts_for_clusters_lose_less_than_one_pruned_layer() -> None:
    params = moe_local.Params()
    for width in (8, 16, 20):
        many, one = feed_forward(width), feed_forward(width, experts=1)
        assert lost(many, moe_local.split(many, params)) < lost(one, moe_local.split(one, params)) / 1.5


def test_neurons_go_to_the_layers_where_they_save_most_and_none_is_added() -> None:
    params = moe_local.Params(grain=16)
    wide = feed_forward(16)
    costly = dataclasses.replace(wide, down=10 * wide.down)
    layers = {"cheap": wide, "costly": costly}
    ready = {path: moe_local.prepare(layer, params) for path, layer in layers.items()}
    specs = {path: layer.spec for path, layer in layers.items()}
    found = moe_local.sized(specs, ready, params)
    assert found["costly"].width > 16 > found["cheap"].width
    assert 30 <= sum(spec.width for spec in found.values()) <= 32
    assert moe_local.sized(specs, ready, moe_local.Params(scope="local")) == specs
    costs = ready["cheap"].costs()
    assert len(costs) == 32 and float(costs[-1]) == 0 and bool((costs.diff() <= 0).all())


class Once:
    """Two states of a tiny model, the same in every batch."""

    def __init__(self, family: str) -> None:
        self.adapter = families.get(family)
        self.model = self.adapter.tiny()
        generator = torch.Generator().manual_seed(0)
        cond = self.adapter.random_conditions(self.model.config, 2, generator)
        latents = torch.randn((2, *self.adapter.latent_shape(self.model.config)), generator=generator)
        self.states = Batch(latents, torch.tensor([200, 700]), cond)

    def batch(self, step: int, size: int, part: int = 0) -> Batch:
        return self.states


@pytest.mark.parametrize("family", ["dit", "flux", "sd3"])
def test_tokens_and_their_weights_come_from_the_same_places(family: str) -> None:
    once = Once(family)
    model, layout = once.model, once.adapter.layout(once.model)
    axes = convertible(model, layout)

    def found(scale: torch.Tensor) -> dict[str, mixture.Weighed]:
        return mixture.weighed_tokens(
            model, layout, axes, once, lambda t: scale, states=2, size=2, tokens=10**6, seed=0  # type: ignore[arg-type]
        )  # fmt: skip

    first, both = found(torch.tensor([1.0, 0.0])), found(torch.tensor([1.0, 1.0]))
    assert set(first) == set(axes) and all(p.requires_grad for p in model.parameters())
    for path, weighed in both.items():
        assert len(weighed.tokens) == len(weighed.weights) and float(weighed.weights.min()) >= 0
        silent = first[path].weights == 0  # the second sample's, half of the tokens
        assert int(silent.sum()) == len(silent) // 2
        assert torch.equal(first[path].tokens, weighed.tokens)
        assert torch.allclose(first[path].weights[~silent], weighed.weights[~silent])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_dit: Path) -> Path:
    out = tmp_path_factory.mktemp("local") / "moe"
    api.moe(tiny_dit, out, method="moe-local", experts=3, overrides=LOCAL)
    return out


def test_a_saved_model_is_loaded_as_it_was_and_runs_as_its_reference(local: Path, tiny_dit: Path) -> None:
    model = load_model(local)[0]
    layers = feed_forwards(model)
    assert layers and all(len(m.experts) == 3 and m.active == 1 for m in layers.values())
    for moe in layers.values():
        x = torch.randn(2, 5, moe.router.weight.shape[1], generator=torch.Generator().manual_seed(1))
        assert torch.allclose(moe(x), moe.reference(x), atol=1e-5)
    again = api.moe(load_model(tiny_dit)[0], method="moe-local", experts=3, overrides=LOCAL)["model"]
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_a_token_meets_is_counted_against_the_dense_layer(local: Path, tiny_dit: Path) -> None:
    facts = json.loads((local / "moe.json").read_text())
    assert facts["active_neurons"] == pytest.approx(0.5, abs=0.02)
    flops = facts["feed_forward_flops_per_token"]
    dense = load_model(tiny_dit)[0]
    modules = [m for path in feed_forwards(load_model(local)[0]) for m in dense.get_submodule(path).modules()]
    assert flops["dense"] == sum(2 * m.weight.numel() for m in modules if isinstance(m, nn.Linear))
    assert 0.45 < flops["active"] / flops["dense"] < 0.6
    assert facts["parameters"]["total"] > facts["parameters"]["dense"] > facts["parameters"]["active"]


def test_it_is_quantized_like_any_other(local: Path, tmp_path: Path) -> None:
    api.quantize(local, "w8a16", tmp_path / "w8a16")
    a, b = predicted(local), predicted(tmp_path / "w8a16")
    assert 0 < float((a - b).norm() / a.norm()) < 0.05


@pytest.mark.parametrize("numbers", [{"shared": 1}, {"active": 2}, {"experts": 1}])
def test_other_numbers_are_refused(numbers: dict[str, int], tiny_dit: Path) -> None:
    with pytest.raises(DitcompressError) as caught:
        api.moe(tiny_dit, method="moe-local", dry_run=True, **numbers)  # type: ignore[arg-type]
    assert caught.value.code == "E203" and f"--{next(iter(numbers))}" in caught.value.line()


def test_a_scheduler_without_noise_levels_is_refused_with_what_helps(tiny_dit: Path, tmp_path: Path) -> None:
    EDMEulerScheduler().save_pretrained(tmp_path / "edm")
    asked = {"moe-local": ((), "--scheduler"), "random": (("training.clean=1",), "training.clean")}
    for method, (more, helps) in asked.items():
        with pytest.raises(DitcompressError) as caught:
            api.moe(load_model(tiny_dit)[0], method=method, scheduler=tmp_path / "edm", overrides=(*LOCAL[:-2], *more),
                    distill_steps=int(bool(more)))  # fmt: skip
        assert caught.value.code == "E205" and helps in caught.value.remedy and "--data" not in caught.value.line()


def test_an_entry_with_more_neurons_than_there_are_is_refused() -> None:
    good = ExpertLayer(0, 3, 16, 1, offset=True, of=32)
    assert ExpertLayer.from_json(good.to_json(), "x") == good
    with pytest.raises(DitcompressError) as caught:
        ExpertLayer.from_json({**good.to_json(), "width": 33}, "x")
    assert caught.value.code == "E320"


def test_the_clean_loss_is_the_output_loss_in_units_of_the_clean_latents() -> None:
    once = Once("dit")
    teacher, student = (families.get("dit").tiny() for _ in range(2))
    with torch.no_grad():
        next(student.transformer_blocks.parameters()).mul_(1.5)
    task = Imitating(teacher, student, once, 2, ())  # type: ignore[arg-type]
    with torch.no_grad():
        task.compare(0, 0)
        assert task.clean is None
        task.clean_weights = lambda timestep: torch.tensor([3.0, 0.5])
        task.compare(0, 0)
    batch = once.batch(0, 2)
    with torch.no_grad():
        found, wanted = (once.adapter.predict(m, batch.latents, batch.timestep, batch.cond) for m in (student, teacher))
    each = torch.stack([output_loss(found[n : n + 1], wanted[n : n + 1]) for n in range(2)])
    assert task.clean is not None and float(task.clean) == pytest.approx(float((3 * each[0] + 0.5 * each[1]) / 2))
