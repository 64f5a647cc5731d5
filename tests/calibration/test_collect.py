"""Calibration: what the hooks keep equals brute force, whatever the batches, and interruption changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from ditcompress.calibration import collect as module
from ditcompress.calibration.collect import CalibrationSettings, collect
from ditcompress.calibration.conditions import class_labels, get_conditions
from ditcompress.calibration.schedulers import load_scheduler
from ditcompress.calibration.sensitivity import token_weights
from ditcompress.calibration.statistics import flatten
from ditcompress.calibration.store import fingerprint, load_statistics, save_statistics
from ditcompress.calibration.trajectory import Sampling, StepRecord, initial_noise, sample
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.models import dit

SETTINGS = CalibrationSettings(samples=4, steps=3, guidance=1.5, policy="all", buckets=3, reservoir=48, batch=2)


@pytest.fixture(scope="module")
def setting() -> tuple[Any, ...]:
    model = dit.tiny()
    conditions = get_conditions(ModuleSource(model), dit, 4, 0)
    return model, dit.layout(model), dit.default_scheduler(model.config), conditions


def run(setting: tuple[Any, ...], settings: CalibrationSettings = SETTINGS, **options: Any) -> Any:
    model, layout, scheduler, conditions = setting
    return collect(model, dit, model.config, layout, scheduler, conditions, settings, **options)


def test_gram_and_ranges_equal_brute_force_over_both_branches(setting: tuple[Any, ...]) -> None:
    model, layout, scheduler, conditions = setting
    seen: dict[str, list[torch.Tensor]] = {}
    site = layout.by_name()["transformer_blocks.1.ff.net.2"]
    hook = model.get_submodule(site.name).register_forward_pre_hook(
        lambda m, args: seen.setdefault("x", []).append(args[0].double().reshape(-1, args[0].shape[-1]))
    )
    sample(model, dit, model.config, scheduler, conditions, Sampling(3, 1.5, 0, 2))
    hook.remove()
    tokens = torch.cat(seen["x"])
    found = run(setting).inputs[site.input_key]
    assert float(found.tokens) == len(tokens)
    assert torch.allclose(found.gram.double(), tokens.T @ tokens, rtol=1e-4, atol=1e-3)
    assert torch.allclose(found.absmax.amax(0), tokens.abs().amax(0).float(), rtol=1e-5)
    assert torch.allclose(found.mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
    per_step = [torch.cat(seen["x"][i::3]) for i in range(3)]
    for bucket, part in enumerate(per_step):
        assert torch.allclose(found.low[bucket], part.amin(0).float(), rtol=1e-5)
    rows = {tuple(r.tolist()) for r in tokens.float()}
    assert all(tuple(r.tolist()) in rows for r in found.reservoir)
    assert torch.bincount(found.reservoir_bucket.long()).tolist() == [16, 16, 16]


def test_the_statistics_do_not_depend_on_the_batch_size(setting: tuple[Any, ...]) -> None:
    small, large = run(setting), run(setting, replace(SETTINGS, batch=4))
    for key, one in small.inputs.items():
        other = large.inputs[key]
        assert torch.allclose(one.low, other.low, atol=1e-4) and torch.allclose(one.high, other.high, atol=1e-4)
        assert torch.allclose(one.gram, other.gram, rtol=1e-3, atol=1e-2)


def test_an_interrupted_pass_continues_to_the_same_bits(
    setting: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", -1.0)
    settings = replace(SETTINGS, weighting="fisher")
    whole = run(setting, settings)

    class Stop(Silent):
        count = 0

        def task(self, *args: Any) -> Any:
            from contextlib import nullcontext

            def advance(units: int) -> None:
                self.count += units
                if self.count == 5:
                    raise KeyboardInterrupt

            return nullcontext(advance)

    with pytest.raises(KeyboardInterrupt):
        run(setting, settings, journal=tmp_path, reporter=Stop())
    assert (tmp_path / "state.safetensors").exists()
    resumed = run(setting, settings, journal=tmp_path)
    assert resumed.digest == whole.digest


def test_fisher_weights_are_squared_gradients_of_the_relative_output(setting: tuple[Any, ...]) -> None:
    """Oracle: perturb one token of one linear's output and watch the output, in float64."""
    model, layout, _, _ = setting
    model = dit.tiny().double()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, *dit.latent_shape(model.config), generator=generator, dtype=torch.float64)
    cond = dit.random_conditions(model.config, 1, generator)
    site = layout.by_name()["transformer_blocks.1.attn1.to_out.0"]
    draws = [
        token_weights(model, dit, layout, latents, torch.tensor([300]), cond, seed)[site.input_key][0][1]
        for seed in range(300)
    ]
    estimate = torch.stack(draws).mean(0)[0]
    base = dit.predict(model, latents, torch.tensor([300]), cond).detach()
    token, total = 3, 0.0
    for channel in range(site.out_features):

        def nudge(m: Any, a: Any, y: torch.Tensor, channel: int = channel) -> torch.Tensor:
            y = y.clone()
            y[0, token, channel] += 1e-5
            return y

        handle = model.get_submodule(site.name).register_forward_hook(nudge)
        with torch.no_grad():
            moved = dit.predict(model, latents, torch.tensor([300]), cond)
        handle.remove()
        total += float(((moved - base) / 1e-5 / base.norm()).square().sum())
    assert float(estimate[token]) == pytest.approx(total / site.out_features, rel=0.35)


def test_weighted_gram_matrices_are_means_over_the_rows(setting: tuple[Any, ...]) -> None:
    """tr(W G W^T) of a whole weight is about the relative change of the output without it: its scale has no N in it."""
    few, many = (run(setting, replace(SETTINGS, weighting="fisher", samples=n)) for n in (1, 4))
    ratios = [float(v.gram.trace() / many.inputs[key].gram.trace()) for key, v in few.inputs.items()]
    assert 0.5 < torch.tensor(ratios).median() < 2  # sums would give a quarter


def test_inputs_that_change_nothing_do_not_seem_to_matter_most() -> None:
    """The text side of Qwen-Image's last block: its Gram matrix is filled in, and stays below all others."""
    from ditcompress.models import registry

    family = registry.get("qwen_image")
    model = family.tiny()
    settings = CalibrationSettings(samples=2, steps=2, weighting="fisher")
    source = ModuleSource(model)
    conditions = get_conditions(source, family, 2, 0)
    found = collect(
        model, family, model.config, family.layout(model), family.default_scheduler(model.config), conditions, settings
    )
    last = max(int(key.split(".")[1]) for key in found.inputs if key.startswith("transformer_blocks."))
    traces = {key: float(value.gram.trace()) for key, value in found.inputs.items()}
    filled = {key for key in traces if key.startswith(f"transformer_blocks.{last}.txt_mlp")}
    assert filled and 0 < max(traces[k] for k in filled) < min(t for k, t in traces.items() if k not in filled)


def test_a_bfloat16_pass_keeps_gram_matrices_semidefinite() -> None:
    model = dit.tiny().to(torch.bfloat16)
    conditions = get_conditions(ModuleSource(model), dit, 4, 0)
    found = collect(
        model, dit, model.config, dit.layout(model), dit.default_scheduler(model.config), conditions, SETTINGS
    )
    for value in found.inputs.values():
        eigenvalues = torch.linalg.eigvalsh(value.gram.double())
        assert eigenvalues[0] > -1e-5 * eigenvalues[-1]


def test_the_normal_policy_counts_each_image_once(setting: tuple[Any, ...]) -> None:
    found = run(setting, replace(SETTINGS, policy="normal", steps=10, buckets=5))
    tokens = {float(v.tokens) for k, v in found.inputs.items() if ".ff." in k or "attn1" in k}
    model = setting[0]
    per_image = (model.config["sample_size"] // model.config["patch_size"]) ** 2
    assert tokens == {2.0 * 4 * per_image}  # both branches of four images, one step each


def test_uniform_trajectories_vary_their_number_of_steps(setting: tuple[Any, ...]) -> None:
    found = run(setting, replace(SETTINGS, policy="uniform", steps=5))
    assert [len(t) for t in found.meta["timesteps"]] == [5, 4]


def test_samples_do_not_depend_on_batches_and_noise_is_per_image(setting: tuple[Any, ...]) -> None:
    model, _, _, conditions = setting
    for scheduler in (dit.default_scheduler(model.config), DDPMScheduler(), FlowMatchEulerDiscreteScheduler()):
        one = sample(model, dit, model.config, scheduler, conditions, Sampling(4, 1.5, 7, 1))
        all_ = sample(model, dit, model.config, scheduler, conditions, Sampling(4, 1.5, 7, 4))
        some = sample(model, dit, model.config, scheduler, conditions, Sampling(4, 1.5, 7, 4), indices=[2])
        assert torch.allclose(one, all_, rtol=1e-3, atol=1e-3)
        assert torch.allclose(some[0], all_[2], rtol=1e-3, atol=1e-3)
    assert torch.equal(initial_noise((2, 3), 5, [0, 1])[1], initial_noise((2, 3), 5, [1])[0])


def test_every_step_is_reported_with_the_timestep_that_was_fed(setting: tuple[Any, ...]) -> None:
    model, _, scheduler, conditions = setting
    records: list[StepRecord] = []
    sample(model, dit, model.config, scheduler, conditions, Sampling(5, 1.5, 0, 4), on_step=records.append)
    scheduler.set_timesteps(5)
    assert [int(r.timestep) for r in records] == [int(t) for t in scheduler.timesteps]
    assert all(r.null_output is not None for r in records)


def test_statistics_are_stored_and_recognised(setting: tuple[Any, ...], tmp_path: Path) -> None:
    statistics = run(setting)
    statistics.meta |= fingerprint("m", setting[2], setting[3], SETTINGS)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_statistics(tmp_path / name, statistics)
    files = [sorted(p.read_bytes() for p in (tmp_path / n).iterdir()) for n in ("a", "b")]
    assert files[0] == files[1]
    again = load_statistics(tmp_path / "a", {"model": "m"})
    assert again.digest == statistics.digest and flatten(again).keys() == flatten(statistics).keys()
    with pytest.raises(DitcompressError, match=r"E331.*another model"):
        load_statistics(tmp_path / "a", {"model": "other"})
    facts = json.loads((tmp_path / "b" / "statistics.json").read_text())
    (tmp_path / "b" / "statistics.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "version"}))
    with pytest.raises(DitcompressError, match=r"E331.*another version"):
        load_statistics(tmp_path / "b")
    (tmp_path / "a" / "statistics.safetensors").write_bytes(b"cut")
    with pytest.raises(DitcompressError, match="E331"):
        load_statistics(tmp_path / "a")


def test_labels_come_equally_often() -> None:
    labels = class_labels(10, 40, 0)
    assert torch.bincount(labels).tolist() == [4] * 10
    assert class_labels(10, 5, 0, [7, 8]).tolist() == [7, 8, 7, 8, 7]


def test_conditions_from_a_file_are_checked_by_name_and_length(tmp_path: Path) -> None:
    source = ModuleSource(dit.tiny())
    path = tmp_path / "c.safetensors"
    save_file({"class_labels": torch.tensor([1, 2, 3]), "null.class_labels": torch.tensor([9])}, path)
    found = get_conditions(source, dit, 5, 0, file=path)
    assert found.labels.tolist() == [1, 2, 3, 1, 2] and found.take(range(5)).null["class_labels"].tolist() == [9] * 5
    for tensors, word in (
        ({"class_label": torch.tensor([1])}, "class_labels"),
        ({"class_labels": torch.tensor([1, 2]), "null.class_labels": torch.zeros(3)}, "samples"),
        ({"null.class_labels": torch.zeros(3)}, "conditional"),
    ):
        save_file(tensors, path)
        with pytest.raises(DitcompressError, match="E330") as caught:
            get_conditions(source, dit, 5, 0, file=path)
        assert word in caught.value.line()
    path.write_text("no")
    with pytest.raises(DitcompressError, match="E330"):
        get_conditions(source, dit, 5, 0, file=path)


def test_a_missing_scheduler_is_said_aloud_and_a_wrong_one_refused(tmp_path: Path) -> None:
    reporter = Silent()
    config = dit.tiny().config
    assert type(load_scheduler(config, None, dit, reporter)).__name__ == "DDIMScheduler" and reporter.notes
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDIMSchedular"}')
    with pytest.raises(DitcompressError, match=r"E332.*DDIMScheduler"):
        load_scheduler(config, tmp_path, dit, reporter)
    (tmp_path / "scheduler_config.json").write_text("[")
    with pytest.raises(DitcompressError, match="E332"):
        load_scheduler(config, tmp_path, dit, reporter)
