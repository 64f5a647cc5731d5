"""Scheduler coefficients (Q-Sched): the checks of the method, the command, and loading in a fresh process."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ditcompress import api
from ditcompress.calibration.schedulers import load_scheduler
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.models import dit
from ditcompress.runtime.coefficients import CLASSES, MODEL, SAMPLE, Coefficients, with_coefficients

STEPS = 4
FEW: dict[str, Any] = {"steps": STEPS, "images": 4, "held_out": 8, "device": "cpu"}
GAINS, CARRIED = [0.9, 1.1, 0.95, 1.05], [1.02, 0.99, 1.01, 0.98]


def flat(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A metric: mean brightness."""
    return images.flatten(1).mean(1)


def contrast(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A metric that grows with the contrast: the search must follow it, for the control as well."""
    assert all(prompt.isdigit() for prompt in prompts)
    return images.flatten(1).std(1)


def broken(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.full((len(images),), math.nan)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, rounded so coarsely that there is something to repair."""
    out = tmp_path_factory.mktemp("small") / "w4a16-rtn"
    api.quantize(digits_folder(), "w4a16-rtn", out)
    return out


@pytest.fixture(scope="module")
def tuned(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` with coefficients that are certainly kept."""
    out = tmp_path_factory.mktemp("tuned") / "q"
    facts = api.q_sched(digits_folder(), small, out, **{**FEW, "images": 16, "held_out": 64})
    assert facts["kept"], facts["reason"]
    return out


def stock(name: str) -> Any:
    return getattr(diffusers, name)()


def walk(scheduler: Any, dtype: torch.dtype = torch.float32, scale: tuple[Any, Any] | None = None) -> torch.Tensor:
    """A short run with a smooth made-up model; `scale` multiplies output and sample of each step from outside."""
    scheduler.set_timesteps(STEPS)
    takes_noise = "generator" in inspect.signature(scheduler.step).parameters
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for index, time in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        extra = {"generator": torch.Generator().manual_seed(index)} if takes_noise else {}
        a, b = (1, 1) if scale is None else (scale[0][index], scale[1][index])
        x = scheduler.step(torch.sin(3 * scaled) * a, time, x * b, **extra, return_dict=False)[0]
    return x


# --- check 1: all ones; and what other values mean ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_all_ones_give_the_stock_latents_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    plain = stock(name)
    assert torch.equal(walk(with_coefficients(plain, [1.0] * STEPS, [1.0] * STEPS), dtype), walk(plain, dtype))


@pytest.mark.parametrize("name", CLASSES)
def test_coefficients_scale_output_and_sample_of_their_own_step(name: str) -> None:
    made, plain = with_coefficients(stock(name), GAINS, CARRIED), stock(name)
    first = walk(made)
    assert torch.equal(first, walk(plain, scale=(GAINS, CARRIED)))
    assert not torch.equal(first, walk(plain))
    assert torch.equal(walk(made), first)  # nothing is carried over to a second run
    for index in (0, STEPS - 1):  # the ends, where ancestral and multistep samplers differ
        vector = [1.1 if i == index else 1.0 for i in range(STEPS)]
        found = walk(with_coefficients(plain, vector, [1.0] * STEPS))
        assert torch.equal(found, walk(plain, scale=(vector, [1.0] * STEPS)))
        if name != "LCMScheduler" or index:  # the last LCM step forgets the one before but for its noise
            assert not torch.equal(found, walk(plain))


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_copies_pickles_and_saved_schedulers(name: str, tmp_path: Path) -> None:
    plain = stock(name)
    made = with_coefficients(plain, GAINS, CARRIED)
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(made, method)) == inspect.signature(getattr(plain, method))
    expected = walk(made)
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name
    loaded = type(plain).from_pretrained(tmp_path)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        assert torch.equal(walk(other), expected)
    assert type(plain).from_config(made.config).config[MODEL] == GAINS
    assert type(load_scheduler({}, tmp_path, dit, Silent())) is type(made)
    half = walk(made, torch.bfloat16)
    assert half.dtype == walk(plain, torch.bfloat16).dtype


def test_another_class_made_from_the_configuration_drops_the_coefficients() -> None:
    made = with_coefficients(stock("DDIMScheduler"), GAINS, CARRIED)
    other = diffusers.EulerDiscreteScheduler.from_config(made.config)
    assert not isinstance(other, Coefficients) and MODEL not in other.config


# --- check 2: an oracle ---------------------------------------------------------------------------------------------


def test_oracle_velocity_and_its_rescaling() -> None:
    generator = torch.Generator().manual_seed(1)
    target, noise = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)

    def end(scheduler: Any, scale: float) -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        x = noise * scheduler.sigmas[0] + target * (1 - scheduler.sigmas[0])
        for time in scheduler.timesteps:
            x = scheduler.step((noise - target) * scale, time, x, return_dict=False)[0]
        return x

    plain = diffusers.FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(end(plain, 1.0), target, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        end(with_coefficients(plain, [1 / 1.1] * STEPS, [1.0] * STEPS), 1.1), target, atol=1e-6, rtol=1e-6
    )


# --- check 3: length ------------------------------------------------------------------------------------------------


def test_other_numbers_of_steps_and_bad_vectors_are_errors() -> None:
    made = with_coefficients(stock("DDIMScheduler"), GAINS, CARRIED)
    with pytest.raises(DitcompressError, match=r"E332.*5 steps.*for 4"):
        made.set_timesteps(5)
    for model, sample in (([1.0], [1.0, 1.0]), ([], []), ([math.nan], [1.0]), ([-1.0], [1.0]), (["x"], [1.0])):
        with pytest.raises(DitcompressError, match="E332"):
            with_coefficients(stock("DDIMScheduler"), model, sample)
    with pytest.raises(DitcompressError, match=r"E332.*HeunDiscreteScheduler"):
        with_coefficients(stock("HeunDiscreteScheduler"), GAINS, CARRIED)


@pytest.mark.parametrize("change", [{"qsched_steps": 5}, {MODEL: [1, 2]}, {SAMPLE: "abcd"}, {SAMPLE: None}, {MODEL: 0}])
def test_a_damaged_configuration_is_one_clear_error(change: dict[str, Any]) -> None:
    config = {**with_coefficients(stock("DDIMScheduler"), GAINS, CARRIED).config, **change}
    with pytest.raises(DitcompressError, match=r"E332.*qsched_"):
        diffusers.DDIMScheduler.from_config(config)
    del config[SAMPLE]
    with pytest.raises(DitcompressError, match=r"E332.*missing"):
        diffusers.DDIMScheduler.from_config(config)


# --- checks 4 to 6: the search --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["trajectory", "gain", "grid"])
def test_the_original_against_itself_gives_ones(method: str, tmp_path: Path) -> None:
    few = {**FEW, "images": 2, "held_out": 2}
    facts = api.q_sched(digits_folder(), digits_folder(), tmp_path / "o", method=method, **few)
    assert not facts["kept"]
    for who in ("compressed", "control"):
        assert facts[who]["model"] == facts[who]["sample"] == [1.0] * STEPS
    config = json.loads((tmp_path / "o/scheduler/scheduler_config.json").read_text())
    assert not any(key.startswith("qsched") for key in config)


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]
)
def test_the_control_is_ones_for_samplers_with_history_and_noise(scheduler: str, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(small, folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    keep = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**keep, "_class_name": scheduler}))
    facts = api.q_sched(digits_folder(), folder, tmp_path / "out", **FEW)
    assert facts["scheduler"] == scheduler and facts["control"]["model"] == facts["control"]["sample"] == [1.0] * STEPS
    assert facts["compressed"]["model"] != [1.0] * STEPS


def test_trajectory_brings_the_end_closer_and_the_gain_is_least_squares(tuned: Path) -> None:
    facts = json.loads((tuned / "q_sched.json").read_text())
    rows = {row["searched"]: row["score"] for row in facts["compressed"]["table"]}
    assert rows[1.0] > rows[0.0]
    assert facts["compressed"]["held_out"]["psnr"]["low"] > 0
    assert facts["control"]["model"] == facts["control"]["sample"] == [1.0] * STEPS
    assert facts[MODEL] == facts["compressed"]["model"] and len(facts["sigmas"]) >= STEPS
    hashes = facts["condition_hashes"]
    assert (len(hashes["search"]), len(hashes["held_out"])) == (16, 64)


def test_the_same_seed_gives_the_same_table_and_files(small: Path, tmp_path: Path) -> None:
    grids = [
        api.q_sched(
            digits_folder(), small, tmp_path / n, method="grid", **{**FEW, "steps": 2, "images": 2, "held_out": 4}
        )
        for n in "ab"
    ]
    assert grids[0] | {"out": ""} == grids[1] | {"out": ""}
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    table = grids[0]["compressed"]["table"]
    assert any((row["m"], row["s"]) == (1.0, 1.0) for row in table) and 25 <= len(table) <= 50


def test_the_grid_follows_the_score_and_the_control_shows_it(small: Path, tmp_path: Path) -> None:
    names = {"compatibility": f"{__name__}:flat", "quality": f"{__name__}:contrast"}
    few = {**FEW, "images": 2, "held_out": 6}
    facts = api.q_sched(digits_folder(), small, tmp_path / "o", method="grid", **names, **few)
    for who in ("compressed", "control"):
        top = max(facts[who]["table"], key=lambda row: row["score"])
        assert top["score"] == pytest.approx(top["tc"] + 2 * top["iq"])
        assert (facts[who]["model"][0], facts[who]["sample"][0]) == (top["m"], top["s"])
        assert facts[who]["model"][-1] == facts[who]["sample"][-1] == 1.0
    assert facts["score"].startswith("TC + 2 IQ")
    assert facts["control"]["held_out"]["jaq"]["difference"] > 0  # metric tuning, not repair: said by the control


# --- check 7: the artefact ------------------------------------------------------------------------------------------

FRESH = """
import json, sys, torch
import ditcompress
import diffusers
folder = sys.argv[1]
first = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, vae=diffusers.AutoencoderKL()) if sys.argv[2:] else None
facts = json.load(open(folder + "/q_sched.json"))
for scheduler in (first, *([pipe.scheduler] if pipe else [])):
    assert scheduler.config["qsched_model_coefficients"] == facts["qsched_model_coefficients"]
    scheduler.set_timesteps(facts["steps"])
    x = v = torch.ones(1, 1, 2, 2)
    got = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    plain = diffusers.DDIMScheduler.from_config({k: w for k, w in scheduler.config.items() if "qsched" not in k})
    plain.set_timesteps(facts["steps"])
    a, b = facts["qsched_model_coefficients"][0], facts["qsched_sample_coefficients"][0]
    assert torch.equal(got, plain.step(v * a, plain.timesteps[0], x * b, return_dict=False)[0])
    assert not torch.equal(got, plain.step(v, plain.timesteps[0], x, return_dict=False)[0])
print("applied")
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(str(part) for part in command)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "DIFFUSERS_VERBOSITY": "warning"},  # another test may have hushed this process
    )  # fmt: skip


def test_stock_diffusers_in_a_fresh_process_applies_the_coefficients(tuned: Path) -> None:
    done = run("-c", FRESH, tuned, "pipeline")
    assert done.stdout.strip() == "applied", done.stderr
    plain = FRESH.replace("import ditcompress\n", "").split("pipe =")[0] + "\nprint(type(first).__mro__[1].__name__)"
    done = run("-c", plain, tuned)  # without ditcompress: the plain class, with a warning
    assert done.stdout.strip() == "SchedulerMixin" and "qsched_model_coefficients" in done.stderr


def test_a_pipeline_loads_saves_and_loads_again(tuned: Path, tmp_path: Path) -> None:
    index = json.loads((tuned / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tuned, vae=diffusers.AutoencoderKL())
    assert isinstance(pipe.scheduler, Coefficients)
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["scheduler"] == index["scheduler"]
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again").scheduler, Coefficients)


def test_sampling_the_folder_uses_them_and_only_for_their_steps(tuned: Path, small: Path, tmp_path: Path) -> None:
    for name, folder in (("tuned", tuned), ("small", small)):
        api.sample(folder, tmp_path / name, count=2, steps=STEPS, device="cpu")
    first, second = (sorted((tmp_path / name).rglob("*.png")) for name in ("tuned", "small"))
    assert first and any(a.read_bytes() != b.read_bytes() for a, b in zip(first, second, strict=True))
    with pytest.raises(DitcompressError, match=r"E332.*sample in 4 steps"):
        api.sample(tuned, tmp_path / "other", count=2, steps=5, device="cpu")
    assert not (tmp_path / "other").exists()


def test_a_tuned_folder_can_be_tuned_again(tuned: Path, tmp_path: Path) -> None:
    facts = api.q_sched(digits_folder(), tuned, tmp_path / "o", **{**FEW, "steps": 3})
    config = json.loads((tmp_path / "o/scheduler/scheduler_config.json").read_text())
    assert config.get("qsched_steps", 3) == 3 and len(facts[MODEL]) == 3
    assert json.loads((tmp_path / "o/manifest.json").read_text())["recipe"]["name"] == "w4a16-rtn"


def test_the_recipe_searches_at_the_end(tmp_path: Path) -> None:
    few = [f"scheduler_search.{key}" for key in ("steps=4", "images=16", "held_out=48")]
    api.quantize(digits_folder(), "q-sched", tmp_path / "o", overrides=few, device="cpu")
    facts = json.loads((tmp_path / "o/q_sched.json").read_text())
    config = json.loads((tmp_path / "o/scheduler/scheduler_config.json").read_text())
    assert config.get(MODEL, [1.0] * STEPS) == facts[MODEL] and facts["kept"] == (MODEL in config)
    assert json.loads((tmp_path / "o/transformer/recipe.json").read_text())["scheduler_search"]["steps"] == 4
    with pytest.raises(DitcompressError, match=r"E202.*did you mean 'steps'"):
        api.quantize(digits_folder(), "q-sched", tmp_path / "p", overrides=["scheduler_search.step=4"])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"steps": 0}, "E203"),
        ({"method": "gird"}, "E203"),
        ({"images": 0}, "E203"),
        ({"held_out": 1}, "E203"),
        ({"low": math.nan}, "E203"),
        ({"low": 1.0, "high": 1.0}, "E203"),
        ({"compatibility": "no.such:thing", "quality": "x:y"}, "E203"),
        ({"quality": f"{__name__}:contrast"}, "E203"),
        ({"method": "grid", "compatibility": f"{__name__}:flat", "quality": f"{__name__}:broken"}, "E701"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    change: dict[str, Any], code: str, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(DitcompressError) as caught:
        api.q_sched(digits_folder(), small, tmp_path / "out", **{**FEW, **change})
    assert caught.value.code == code and "\n" not in caught.value.line()
    assert not list(tmp_path.iterdir())


def test_bad_folders(small: Path, tiny_dit: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(small, damaged)
    (damaged / "transformer/recipe.json").write_text("{}")
    other = tmp_path / "heun"
    shutil.copytree(small, other)
    (other / "manifest.json").unlink()
    (other / "scheduler/scheduler_config.json").write_text('{"_class_name": "HeunDiscreteScheduler"}')
    for original, compressed, code in (
        (digits_folder(), tmp_path / "none", "E302"),
        (digits_folder(), damaged, "E323"),
        (digits_folder(), other, "E332"),
        (tiny_dit, small, "E340"),
    ):
        with pytest.raises(DitcompressError) as caught:
            api.q_sched(original, compressed, tmp_path / "out", **FEW)
        assert caught.value.code == code, caught.value.line()
    with pytest.raises(DitcompressError, match="E501"):
        api.q_sched(digits_folder(), small, small, **FEW)


def test_the_command(small: Path, tmp_path: Path) -> None:
    base = ("-m", "ditcompress", "q-sched", digits_folder(), small, "--steps", 4, "--images", 4, "--held-out", 8)
    done = run(*base, "--out", tmp_path / "o")
    assert done.returncode == 0 and "control" in done.stdout and "no image-text metric" in done.stdout, done.stderr
    done = run(*base, "--out", tmp_path / "o")
    assert done.returncode == 5 and done.stderr.strip().splitlines()[-1].startswith("error[E501")
    done = run(*base, "--out", tmp_path / "p", "--dry-run", "--json")
    assert json.loads(done.stdout)["steps"] == 4 and not (tmp_path / "p").exists()
