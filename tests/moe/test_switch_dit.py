"""switch-dit: experts at zero leave the model as it is, gates follow the timestep alone, the diffusion prior."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from typer.testing import CliRunner

from ditcompress import api
from ditcompress.cli.app import app
from ditcompress.errors import DitcompressError
from ditcompress.mixture._prior import divergence, matched, prior_loss, prior_map
from ditcompress.runtime.task_mask import TaskMask
from tests.distill.models import cached
from tests.moe.routed_models import both, routed_model, written
from tests.moe.test_command import predicted


@pytest.mark.parametrize("family", ["dit", "pixart", "flux", "sd3"])
def test_experts_at_zero_leave_the_model_as_it_is_and_others_do_not(family: str) -> None:
    dense, other, part = routed_model(family, "mask", "transformer_blocks.0", count=3, active=2)
    a, b = both(family, dense, other)
    assert torch.equal(a, b)
    part.weight.normal_(std=0.1)
    a, b = both(family, dense, other)
    assert (a - b).norm() > 1e-4 * a.norm()
    a, c = both(family, copy.deepcopy(other), other)  # a copy has hooks of its own
    assert torch.equal(a, c) and torch.equal(b, c)


def test_gates_depend_on_the_timestep_alone() -> None:
    _, other, part = routed_model("dit", "mask", "transformer_blocks.0", count=3, active=2)
    seen = []
    part.seen = seen.append
    both("dit", other, other, times=(3, 900, 3))
    chosen, gates = seen[0].chosen, seen[0].gates
    assert torch.equal(chosen[0], chosen[2]) and torch.equal(gates[0], gates[2])
    assert not torch.equal(gates[0], gates[1])


def test_every_sample_of_a_batch_is_masked_as_if_alone_and_as_defined() -> None:
    _, _other, part = routed_model("dit", "mask", "transformer_blocks.0", count=3, active=2)
    assert isinstance(part, TaskMask)
    part.weight.normal_(std=0.1)
    part.bias.normal_(std=0.1)
    x = torch.randn(5, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    routing = part.route(torch.tensor([3, 900, 3, 400, 10]))
    assert torch.allclose(part(x, routing), part.reference(x, routing), atol=1e-12)
    scores = part.probabilities(part.time.at(torch.tensor([3])))
    assert torch.allclose(routing.gates[0], scores.topk(2).values[0], atol=1e-6)  # not normalised over the chosen


def test_the_prior_is_a_window_that_slides_from_the_first_to_the_last_expert() -> None:
    prior = prior_map(1000, 12, 8)
    assert torch.equal(prior.sum(1), torch.full((1000,), 8.0))
    assert prior[0].nonzero()[0] == 0 and prior[-1].nonzero()[-1] == 11
    first = prior.argmax(1)
    assert bool((first.diff() >= 0).all()) and int(first[500]) == round((500 / 999) ** 4 * 4)


def test_the_divergence_is_zero_for_equal_rows_log_2_for_disjoint_ones_and_columns_are_matched() -> None:
    p = torch.tensor([[1.0, 1, 0, 0], [0, 1.0, 1, 0]])
    assert float(divergence(p, p)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(p[:1], 1 - p[:1])) == pytest.approx(torch.tensor(2.0).log().item())
    prior = prior_map(1000, 6, 4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(matched(prior[:, order], prior), prior[:, order])
    gates = [prior[:, order[:3]].clamp_min(0.01), prior[:, order[3:]].clamp_min(0.01)]
    uniform = [torch.full((1000, 3), 1 / 3)] * 2
    assert float(prior_loss([g / g.sum(1, keepdim=True) for g in gates], 2)) < float(prior_loss(uniform, 2))


def test_training_follows_the_prior_and_the_dense_model(tiny_dit: Path, tmp_path: Path) -> None:
    facts = written(tiny_dit, tmp_path / "plain", "switch-dit")
    assert facts["sqnr_db"] is None and torch.allclose(predicted(tmp_path / "plain"), predicted(tiny_dit), atol=1e-6)
    flops = facts["block_linear_flops_per_token"]
    assert flops["active"] - flops["dense"] == 2 * 2 * 2 * 64**2  # blocks, active, two a multiply and add
    assert facts["parameters"]["total"] - facts["parameters"]["dense"] == 2 * 3 * (64**2 + 64 + 64 + 1)
    more = ("training.output=0", "training.features=0", "training.router_rate=0.05")
    done = written(tiny_dit, tmp_path / "prior", "switch-dit", *more, distill_steps=12)
    assert done["distilled"]["last"] < done["distilled"]["first"]
    table = done["routing"]["timestep"]
    assert list(table["layers"]) == [f"transformer_blocks.{n}.task_mask" for n in (0, 1)]
    assert not list(tmp_path.glob(".*work*"))


def test_quantize_after_switch_dit_keeps_masks_that_real_data_have_trained(tiny_dit: Path, tmp_path: Path) -> None:
    more = ("training.output=0", "training.features=0", "training.prior=0", "training.learning_rate=0.01")
    done = written(
        tiny_dit, tmp_path / "m", "switch-dit", *more, distill_steps=30, data=cached(tmp_path / "latents", (4, 8, 8))
    )
    assert done["distilled"]["last"] < done["distilled"]["first"] and done["sqnr_db"] is not None
    api.quantize(tmp_path / "m", "w8a16", tmp_path / "q")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "q")
    assert isinstance(model.transformer_blocks[0].task_mask, TaskMask)
    a, b = predicted(tmp_path / "m"), predicted(tmp_path / "q")
    assert (a - b).norm() < 0.05 * a.norm()


def test_data_without_training_are_refused(tiny_dit: Path, tmp_path: Path) -> None:
    with pytest.raises(DitcompressError) as caught:
        api.moe(tiny_dit, tmp_path / "out", method="switch-dit", data=tmp_path)
    assert caught.value.code == "E203"


@pytest.mark.parametrize(
    "options", [["--shared", "1"], ["--active", "4"], ["--active", "0"], ["--blocks-active", "0.5"]]
)
def test_numbers_that_do_not_fit_are_one_line(options: list[str], tiny_dit: Path, tmp_path: Path) -> None:
    command = ["moe", str(tiny_dit), "--out", str(tmp_path / "out"), "--method", "switch-dit", *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "error[E203" in done.stderr and len(done.stderr.strip().splitlines()) == 1
