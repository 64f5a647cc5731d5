"""The stages of Dense2MoE: what runs and what learns in each, the split of the steps, and going on after a kill."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ditcompress import api
from ditcompress.cli.app import app
from ditcompress.distill import trainer
from ditcompress.errors import DitcompressError
from ditcompress.loading import load_model
from ditcompress.mixture import ONE, running, stages_of
from ditcompress.mixture._stages import SHARES
from ditcompress.models import registry as families
from ditcompress.models._inputs import built
from ditcompress.runtime.blocks import BlockRouter
from ditcompress.runtime.moe import feed_forwards, routed_parts
from tests.moe.test_command import FEW

MOB = (
    *FEW,
    "images=0",
    "calibration.samples=2",
    "calibration.steps=3",
    "training.learning_rate=0.001",
    "training.save_every=2",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DiT of three blocks in which a random half of the neurons matters."""
    folder = tmp_path_factory.mktemp("models") / "dit"
    tiny = families.get("dit").tiny()
    config = {key: value for key, value in tiny.config.items() if key[0] != "_"}
    model = built(type(tiny), {**config, "num_layers": 3}, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            weight = block.ff.net[2].weight  # type: ignore[union-attr]
            weight.mul_(torch.where(torch.rand(weight.shape[1], generator=generator) < 0.5, 3.0, 0.02))
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_steps_are_split_by_their_shares_and_every_stage_has_one() -> None:
    assert [(s.name, s.steps, s.start) for s in stages_of(SHARES, 300)] == [
        ("shared", 60, 0), ("experts", 90, 60), ("all", 150, 150)
    ]  # fmt: skip
    assert [s.steps for s in stages_of(SHARES, 3)] == [1, 1, 1]
    assert [(s.name, s.steps) for s in stages_of(ONE, 7)] == [("all", 7)]
    assert [(s.name, s.steps) for s in stages_of((1, 3, 0), 8)] == [("shared", 2), ("experts", 6)]
    for steps in range(3, 40):
        found = stages_of((0.01, 0.98, 0.01), steps)
        assert sum(s.steps for s in found) == steps and all(s.steps > 0 for s in found)
        assert [s.start for s in found] == [0, found[0].steps, steps - found[2].steps]
    with pytest.raises(DitcompressError) as caught:
        stages_of(SHARES, 2)
    assert caught.value.code == "E203"


def test_every_stage_trains_its_own_parts(dense: Path) -> None:
    model = load_model(dense)[0]

    def made(*more: str, steps: int = 3) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"overrides": (*MOB, *more), "distill_steps": steps}
        return api.moe(model, method="dense2moe-mob", **options)["model"].state_dict()  # type: ignore[no-any-return]

    before = made(steps=0)

    def learnt(stages: str, *more: str) -> set[str]:
        """Names of the tensors that training in these stages changes."""
        after = made(f"training.stages={stages}", *more)
        return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}

    first = learnt("[1,0,0]")
    assert all(".ff.shared." in name or name.endswith(".ff.bias") for name in first) and len(first) == 3 * 4
    second = learnt("[0,1,0]")
    assert all(".ff.experts." in name or ".ff.router." in name for name in second)
    assert any(".ff.router." in name for name in second) and any(".ff.experts." in name for name in second)
    third = learnt("[0,0,1]")
    kinds = (".ff.shared.", ".ff.experts.", ".ff.router.", ".block_router.", ".attn1.", ".norm1.")
    assert all(any(kind in name for name in third) for kind in kinds)
    assert not any(name.startswith("proj_out") for name in third)
    whole = learnt("[0,0,1]", "training.everything=true")
    assert third < whole and any(name.startswith("proj_out") for name in whole)


def test_what_a_stage_leaves_out_does_not_run_and_is_back_after_it(dense: Path, tmp_path: Path) -> None:
    api.moe(dense, tmp_path / "m", method="dense2moe-mob", overrides=MOB)
    model, _ = load_model(tmp_path / "m")
    layers = routed_parts(model)
    for name, active, blocks in (("shared", 0, 3), ("experts", 2, 3), ("all", 2, 2)):
        with running(layers, name):  # type: ignore[arg-type]
            assert {m.active for m in feed_forwards(model).values()} == {active}
            assert [m.active for m in layers.values() if isinstance(m, BlockRouter)] == [blocks]
    assert {m.active for m in feed_forwards(model).values()} == {2}
    x = torch.randn(3, 64)
    moe = next(iter(feed_forwards(model).values()))
    with running(layers, "shared"):
        assert moe.shared is not None and moe.bias is not None
        assert torch.allclose(moe(x), moe.shared(x) + moe.bias)  # the dense layer cut to the shared neurons


def test_a_run_killed_in_any_stage_goes_on_to_the_same_bits(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (*MOB, "training.ema=0.9")
    whole = api.moe(dense, tmp_path / "whole", method="dense2moe-mob", overrides=more, distill_steps=9)
    step, calls = trainer._step, [0]

    def killed(*arguments: Any) -> float:
        calls[0] += 1
        if calls[0] in (2, 6, 10):  # in each of the stages of 2, 3 and 4 steps
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(trainer, "_step", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            api.moe(dense, tmp_path / "parts", method="dense2moe-mob", overrides=more, distill_steps=9)
    parts = api.moe(dense, tmp_path / "parts", method="dense2moe-mob", overrides=more, distill_steps=9)
    assert calls[0] > 10  # every kill came
    assert parts["distilled"] == whole["distilled"]
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert not list(tmp_path.glob(".*work*"))


def test_the_report_has_the_losses_of_every_stage(dense: Path, tmp_path: Path) -> None:
    command = ["moe", str(dense), "--out", str(tmp_path / "m"), "--method", "dense2moe-mob", "--distill-steps", "12",
               *[part for value in MOB for part in ("--set", value)]]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and all(f"stage {name}" in done.output for name in ("shared", "experts", "all"))
    facts = json.loads((tmp_path / "m/moe.json").read_text())["distilled"]
    stages = facts["stages"]
    assert [(s["stage"], s["steps"]) for s in stages] == [("shared", 2), ("experts", 4), ("all", 6)]
    assert [x for s in stages for x, _ in s["curve"]] == list(range(1, 13)) and facts["steps"] == 12
    assert (facts["first"], facts["last"]) == (stages[-1]["first"], stages[-1]["last"])
    assert "Loss of the training, by stage" in (tmp_path / "m/moe.html").read_text()


def test_shared_neurons_by_taylor_score_learn_to_a_lower_loss_than_random_ones(dense: Path, tmp_path: Path) -> None:
    more = (*MOB, "training.stages=[1,0,0]")
    found = {
        method: api.moe(dense, tmp_path / method, method=method, overrides=more, shared=3, active=2, distill_steps=10)
        for method in ("dense2moe", "random")
    }
    last = {method: facts["distilled"]["last"] for method, facts in found.items()}
    assert last["dense2moe"] < 0.9 * last["random"]


def test_fewer_active_experts_degrade_smoothly_after_the_stages_of_the_feed_forwards(
    dense: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": "dense2moe", "overrides": (*MOB, "training.stages=[1,1,0]")}
    api.moe(dense, tmp_path / "m", distill_steps=12, **options)
    model, _ = load_model(tmp_path / "m")
    original, _ = load_model(dense)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([30, 300, 600, 900])
    labels, errors = torch.tensor([0, 1, 0, 1]), []
    with torch.no_grad():
        wanted = original(x, t, labels).sample
        for active in (2, 1, 0):
            other = copy.deepcopy(model)
            for layer in feed_forwards(other).values():
                layer.active = active
            errors.append(float((other(x, t, labels).sample - wanted).norm()))
    assert errors[0] < errors[1] < errors[2] < float(wanted.norm())


@pytest.mark.parametrize(
    ("stages", "numbers", "steps", "code"),
    [("[1,1]", {}, 5, "E202"), ("[0,0,0]", {}, 5, "E202"), ("[-1,1,1]", {}, 5, "E202"), ("[1,1,1]", {}, 2, "E203"),
     ("[1,0,1]", {"shared": 0}, 5, "E203"), ("[0,1,1]", {"active": 0, "shared": 3}, 5, "E203")],
)  # fmt: skip
def test_stages_that_do_not_fit_are_refused(
    stages: str, numbers: dict[str, int], steps: int, code: str, dense: Path, tmp_path: Path
) -> None:
    more = (*MOB, f"training.stages={stages}")
    with pytest.raises(DitcompressError) as caught:
        api.moe(dense, tmp_path / "m", method="dense2moe", overrides=more, distill_steps=steps, **numbers)
    assert caught.value.code == code and len(caught.value.line().splitlines()) == 1
    with pytest.raises(DitcompressError) as caught:  # heads are no feed-forwards
        api.moe(dense, tmp_path / "m", method="moh", overrides=(*MOB, "training.stages=[1,1,1]"), distill_steps=5)
    assert caught.value.code == "E203"
