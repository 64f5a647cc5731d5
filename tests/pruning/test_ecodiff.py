"""ecodiff: the checks of its method card - gates, the checkpointed gradient, masks against removal, the regulariser."""

from __future__ import annotations

import copy
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import nn

from ditcompress import prune
from ditcompress.calibration.conditions import Conditions
from ditcompress.calibration.trajectory import sample
from ditcompress.distill import trainer
from ditcompress.errors import DitcompressError
from ditcompress.models import depth_of
from ditcompress.models import registry as families
from ditcompress.models.base import Axis
from ditcompress.pruning.width import Context, cut_axes, ecodiff
from ditcompress.pruning.width._axes import cost_of, count_of
from ditcompress.pruning.width._masks import Gates, gate, masked
from ditcompress.pruning.width.base import places
from ditcompress.structure import narrow

from .models import deep, inputs, run

SMALL = {"updates": 3, "images_each": 2, "prompts": 4, "sample_steps": 3, "warmup": 0}


def context(family: str, guidance: float = 1.0, model: nn.Module | None = None) -> Context:
    """A context that samples with random conditions."""
    model = (deep(family) if model is None else model).requires_grad_(False)
    adapter, config = families.get(family), {**dict(model.config), "_class_name": type(model).__name__}  # type: ignore[arg-type]
    layout = adapter.layout(model)

    def conditions(count: int) -> Conditions:
        cond = adapter.random_conditions(config, count, torch.Generator().manual_seed(1))
        return Conditions(cond, adapter.null_conditions(config, cond), "random")

    return Context(model, adapter, layout, depth_of(config, layout), {}, 0.0, (), ratio=0.25, config=config,
                   scheduler=adapter.default_scheduler(config), guidance=guidance, conditions=conditions)  # fmt: skip


def gating(found: Context, axes: list[Axis] | None = None, **settings: Any) -> ecodiff.Gating:
    chosen = axes if axes is not None else cut_axes(found.layout, "both")
    return ecodiff.Gating(found, chosen, ecodiff.Params(**{**SMALL, **settings}))


def groups(found: Context) -> list[Gates]:
    axes = cut_axes(found.layout, "both")
    return [Gates(a.name, count_of(a), a.unit_size, tuple(places(found.layout, a))) for a in axes]


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_open_gates_are_the_dense_sampler_and_no_loss(family: str) -> None:
    found = context(family, families.get(family).default_guidance({}) if family == "dit" else 1.0)
    task = gating(found, init=20.0, eps=0.5, images_each=4)  # the batch of the targets
    fit, gradients = task.reconstruction(0, 0)
    assert float(fit) == 0.0 and all(bool((g == 0).all()) for g in gradients)
    again = sample(found.model, found.adapter, found.config, found.scheduler, task.conditions, task.sampling)
    assert torch.equal(again, task.target)


def test_the_range_of_a_gate_is_that_of_the_card() -> None:
    u = torch.linspace(0, 1, 1001)
    assert bool((gate(torch.tensor(3.2), u, 0.5) == 1).all())
    table = {(3.0, 0.1): (0.71, 1), (1.0, 0.1): (0.09, 1), (0.0, 0.5): (0.15, 0.85), (-3.0, 0.1): (0, 0.29),
             (0.0, 1.0): (0.26, 0.74)}  # fmt: skip
    for (logit, eps), (low, high) in table.items():
        found = gate(torch.tensor(logit), u, eps)
        assert (float(found.min()), float(found.max())) == pytest.approx((low, high), abs=0.006)


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_the_checkpointed_gradient_is_that_of_the_whole_graph(family: str) -> None:
    tiny = families.get(family).tiny(0)
    found = context(family, 2.0, tiny)
    task = gating(found, eps=0.5, init=1.0, modulation=0.1)
    fit, gradients = task.reconstruction(1, 0)
    walk, images = task.walk(1, 0)
    noise, latents = task.noise(1, 0, walk.count), walk.start
    for index in range(walk.count):
        with masked(found.model, task.groups, task.values(noise[index])):
            latents = walk.step(index, latents)
    whole = (latents - task.target[images]).square().mean()
    expected = torch.autograd.grad(whole, [*task.logits.values()], allow_unused=True)
    assert float(fit) == pytest.approx(float(whole.detach()), rel=1e-5) and float(fit) > 0
    scale = max(float(g.norm()) for g in expected if g is not None)
    for name, one, other in zip(task.logits, gradients, expected, strict=True):
        other = torch.zeros_like(one) if other is None else other
        assert float((one - other).norm()) < 1e-4 * max(float(other.norm()), 1e-2 * scale), name


def test_the_surrogate_loss_carries_both_gradients() -> None:
    task = gating(context("dit"), beta=0.3)
    task.loss(0, 0).backward()
    _, gradients = task.reconstruction(0, 0)
    own = torch.autograd.grad(task.regulariser(), [*task.logits.values()])
    for logit, fit, pull in zip(task.logits.values(), gradients, own, strict=True):
        torch.testing.assert_close(logit.grad, fit + 0.3 * pull)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("family", ["dit", "flux", "pixart", "sd3"])
def test_binary_masks_are_the_removed_model(family: str, ratio: float) -> None:
    found = context(family)
    generator, kept, values = torch.Generator().manual_seed(3), {}, {}
    for axis in cut_axes(found.layout, "both"):
        left = torch.randperm(count_of(axis), generator=generator)[: count_of(axis) - int(ratio * count_of(axis))]
        kept[axis.name] = sorted(left.tolist())  # 0.75 of four heads leaves one
        values[axis.name] = torch.zeros(count_of(axis)).index_fill(0, left, 1.0)
    given = inputs(family, found.model)
    with masked(found.model, groups(found), values):
        expected = run(family, found.model, given)
    pruned = copy.deepcopy(found.model)
    narrow(pruned, found.layout, kept)
    torch.testing.assert_close(run(family, pruned, given), expected, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.model.modules())


def test_silenced_modulation_outputs_are_rows_of_zeros_in_the_result() -> None:
    found = context("dit")
    params = ecodiff.Params(**{**SMALL, "modulation": 0.25, "refit": False})
    axes = cut_axes(found.layout, "both")
    ecodiff.scores(found, axes, params)
    tensors = ecodiff.rewrite(found, axes, {}, params)
    values = {}
    for group in ecodiff.modulations(found.layout):
        gone = (tensors[f"{group.name}.weight"] == 0).all(1)
        assert int(gone.sum()) == round(0.25 * group.count)
        values[group.name] = (~gone).float()
    given = inputs("dit", found.model)
    with masked(found.model, ecodiff.modulations(found.layout), values):
        expected = run("dit", found.model, given)
    with found.rewritten(tensors):
        torch.testing.assert_close(run("dit", found.model, given), expected)


def test_parameters_of_a_unit_are_counted_as_the_card_does() -> None:
    layout = families.get("flux").layout(deep("flux"))
    dim, head = 64, 16
    biases = {"double": 6 * head, "single": 3 * head}
    double = layout.axes["transformer_blocks.0.attn.heads"]
    single = layout.axes["single_transformer_blocks.0.attn.heads"]
    assert cost_of(layout, single) == 3 * head * dim + dim * head + biases["single"]
    assert cost_of(layout, double) == 2 * (3 * head * dim + dim * head) + biases["double"]
    assert cost_of(layout, layout.axes["transformer_blocks.0.ff.neurons"]) == 2 * dim + 1


@pytest.mark.parametrize("sigmoid", [True, False])
def test_the_regulariser_alone_closes_gates_or_draws_raw_logits_to_zero(sigmoid: bool) -> None:
    task = gating(context("dit"), reg_sigmoid=sigmoid, init=1.0, budget=False)
    optimizer = torch.optim.Adam(task.parameters().values(), lr=0.05)
    means = []
    for _ in range(60):
        optimizer.zero_grad()
        task.regulariser().backward()
        optimizer.step()
        means.append(float(torch.cat([*task.logits.values()]).detach().mean()))
    if sigmoid:
        assert all(later < earlier for earlier, later in pairwise(means)) and means[-1] < -1
    else:
        assert abs(means[-1]) < 0.1
    zero = gating(context("dit"), norm=0, budget=False)
    assert float(zero.regulariser().detach()) == pytest.approx(
        2 / (1 + pow(2.718281828, -(3 + 0.83 * 2.3979))), rel=1e-3
    )


def test_the_budget_turns_the_regulariser_round_where_too_many_gates_are_closed() -> None:
    task = gating(context("dit"))  # a quarter goes
    assert [task.pull([group]) for group in task.groups[:2]] == [1.0, 1.0]
    with torch.no_grad():
        heads = next(group for group in task.groups if group.count == 4)
        task.logits[heads.name][:1] = -1
        assert task.pull([heads]) == pytest.approx(0.0, abs=1e-9)
        task.logits[heads.name][:2] = -1
        assert task.pull([heads]) == -1.0


def test_a_multistep_scheduler_takes_part_and_one_without_gradients_is_refused() -> None:
    found = context("dit")
    found.scheduler = DPMSolverMultistepScheduler()
    fit, gradients = gating(found, eps=0.5, init=1.0).reconstruction(0, 0)
    assert float(fit) > 0 and any(float(g.norm()) > 0 for g in gradients)

    class Blind(DDIMScheduler):
        @torch.no_grad()
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    found.scheduler = Blind()
    with pytest.raises(DitcompressError, match=r"E205 unsupported.*Blind: gives no gradient"):
        gating(found).reconstruction(0, 0)


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("dit")
    model.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    options: Any = {
        "width_ratio": 0.25, "width_method": "ecodiff",
        "width_overrides": ["updates=7", "images_each=1", "prompts=2", "sample_steps=2", "samples=1", "steps=2"],
    }  # fmt: skip
    prune(tmp_path / "original", out=tmp_path / "whole", **options)
    plain, calls = trainer._step, []

    def killed(*args: Any) -> float:
        calls.append(args[3])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "original", out=tmp_path / "again", **options)
    prune(tmp_path / "original", out=tmp_path / "again", **options)
    assert calls == [0, 1, 2, 3, 4, 5, 6, 5, 6]
    names = sorted(os.listdir(tmp_path / "whole"))
    assert names == sorted(os.listdir(tmp_path / "again"))
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    assert not (tmp_path / ".again.work").exists()
