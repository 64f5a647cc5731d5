"""The checks at the end of the DiTAS card."""

from __future__ import annotations

import pytest
import torch

from ditcompress import engine, recipe
from ditcompress.models import dit
from ditcompress.models.base import Layout
from ditcompress.quantization import RecipeSteps, ditas, loftq, smooth
from ditcompress.quantization.base import Group, Layer
from ditcompress.structure import apply_fold

from .test_rounding import decision, problem, statistics

COLUMN_GROUP = {"layout": "column_group", "group": 32, "zero": "int16", "levels": "full", "scale": "float16"}


@pytest.mark.parametrize("seed", range(3))
def test_check_1_smoothing_and_merging_leave_the_output_unchanged(seed: int) -> None:
    model = dit.tiny().double()
    layout = dit.layout(model)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, *dit.latent_shape(model.config), generator=generator, dtype=torch.float64)
    time, cond = torch.tensor([37, 900]), dit.random_conditions(model.config, 2, generator)
    before = dit.predict(model, latents, time, cond)
    state = dict(model.state_dict())
    for axis in layout.axes.values():
        if axis.fold:
            state = apply_fold(state, axis, layout, torch.rand(axis.size, generator=generator).double() + 0.5)
    model.load_state_dict(state)
    assert (dit.predict(model, latents, time, cond) - before).abs().max() < 1e-9


def test_check_2_the_alternation_lowers_the_weight_error_below_plain_rounding() -> None:
    weight, _ = problem(64, 96)
    errors = []
    for rounds in (1, 2, 3):
        layer = Layer(decision((), rank=8, **COLUMN_GROUP), weight)
        codes, grid, up, down = loftq.alternate(layer, rounds)
        fmt, params = loftq.resolve(layer.decision.weight)
        errors.append((weight - fmt.value(codes, grid, params) - up @ down).norm().item())
    plain = Layer(decision((), rank=0, **COLUMN_GROUP), weight)
    codes, grid, _, _ = loftq.alternate(plain, 1)
    fmt, params = loftq.resolve(plain.decision.weight)
    rounding = (weight - fmt.value(codes, grid, params)).norm().item()
    assert errors[0] >= errors[1] >= errors[2] * 0.999
    assert errors[2] < rounding


def test_check_3_folding_into_the_scales_is_exact_but_for_their_16_bits() -> None:
    weight, _ = problem(64, 96)
    s = torch.rand(96) + 0.5
    one = decision((), rank=8, **{**COLUMN_GROUP, "scale": "float32"})
    folded = loftq.encode(Layer(one, weight, smooth=s), loftq.Params(rounds=3))
    plain = loftq.encode(Layer(one, weight), loftq.Params(rounds=3))
    assert torch.equal(folded.packed.tensors["qweight"], plain.packed.tensors["qweight"])
    quantized = [e.dequantize() - e.low_rank[0].float() @ e.low_rank[1].float() for e in (folded, plain)]
    assert torch.allclose(quantized[0], quantized[1] * s, rtol=1e-5, atol=1e-6)


def test_check_4_alpha_0_balances_weights_and_alpha_1_activations_and_the_search_is_not_worse() -> None:
    a, w = torch.rand(16) + 0.1, torch.rand(16) + 0.1
    assert torch.allclose(smooth.factors(a, w, 0.0), 1 / w)
    assert torch.allclose(smooth.factors(a, w, 1.0), a)
    weight, gram = problem(32, 48)
    group = Group([Layer(decision((), rank=4, **COLUMN_GROUP), weight, statistics(gram))])
    params = ditas.Params(points=11, rounds=2)
    best = ditas.prepare(group, params)
    parts = [ditas._parts(group.layers[0], 2)]
    wmax = parts[0][0].abs().amax(0)
    ends = [ditas.search_loss(group, parts, smooth.factors(group.absmax(), wmax, alpha), 50) for alpha in (0.0, 1.0)]
    assert ditas.search_loss(group, parts, best, 50) <= min(ends)


def test_check_5_the_maximum_over_steps_is_not_below_any_step() -> None:
    _, gram = problem()
    stats = statistics(gram)
    group = Group([Layer(decision(()), torch.zeros(1, 48), stats)])
    steps = torch.maximum(stats.high, -stats.low)
    assert group.absmax().shape == (48,)
    assert (group.absmax() >= steps).all()


def test_check_5_and_6_dit_xl_has_112_layers_and_the_stored_bits_of_the_card() -> None:
    """DiT-XL/2 on meta tensors: 28 blocks, four linears each in the card's count (q, k and v are one there)."""
    from ditcompress.models import build_meta
    from ditcompress.runtime.linear import Scheme

    config = {
        "_class_name": "DiTTransformer2DModel", "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72,
        "in_channels": 4, "out_channels": 8, "patch_size": 2, "sample_size": 32, "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False, "activation_fn": "gelu-approximate", "attention_bias": True,
        "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    layout: Layout = dit.layout(build_meta(config))
    plan = recipe.make_plan(recipe.load_recipe("w4a8-ditas"), layout)
    sites = layout.by_name()
    assert len({sites[d.site].input_key for d in plan.layers}) == 112
    assert not [d for d in plan.layers if d.role == "modulation"]
    total = weights = low_rank = 0
    for d in plan.layers:
        site = sites[d.site]
        shape = (site.out_features, site.in_features)
        stored = Scheme.from_json(engine.scheme_of(d, "fold")).layout(shape)
        total += sum(torch.Size(s).numel() * t.itemsize * 8 for s, t in stored.values())
        weights += shape[0] * shape[1]
        low_rank += 16 * 32 * sum(shape)
    assert total == 5 * weights + low_rank
    assert 5.5 < total / weights < 5.8  # the card says about 5.6 with q, k, v fused; split they need three L factors


def test_the_faithful_recipe_runs_on_every_step_of_the_trajectory() -> None:
    chosen = recipe.load_recipe("w4a8-ditas")
    assert chosen.source and chosen.calibration is not None
    assert (chosen.calibration.steps, chosen.calibration.buckets, chosen.calibration.policy) == (50, 50, "all")
    assert {step.name for rule in chosen.rules for step in rule.steps} == {"ditas", "loftq"}
    assert RecipeSteps()
