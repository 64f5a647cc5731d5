"""Two processes with half of the images each gather the statistics of one; the first one writes, one line says why not.

All runs of the pair are made once, in two processes that live as long as the tests of this file.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from ditcompress import api
from ditcompress.calibration import collect as module
from ditcompress.calibration.collect import CalibrationSettings, collect
from ditcompress.calibration.collector import Collector, Share
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.statistics import Statistics
from ditcompress.calibration.store import load_statistics, save_statistics
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.checkpoint.writer import load_atomic
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.experts import ExpertLayer, apply_experts
from ditcompress.models import dit, flux, pixart, sd3
from ditcompress.ranks import ALONE, Ranks
from tests.processes import in_two

SETTINGS = CalibrationSettings(samples=5, steps=3, guidance=1.5, policy="all", buckets=3, reservoir=48, batch=4)
PASSES = {
    "dit": (dit, SETTINGS),
    "dit-fisher": (dit, replace(SETTINGS, weighting="fisher")),
    "dit-normal": (dit, replace(SETTINGS, policy="normal", steps=6, weighting="fisher")),
    "dit-normal-grams": (dit, replace(SETTINGS, policy="normal", steps=6)),
    "pixart": (pixart, SETTINGS),
    "sd3": (sd3, SETTINGS),
    "flux": (flux, SETTINGS),
    "experts": (dit, SETTINGS),
}
PATH = "transformer_blocks.1.ff"  # of the expert layer
FEW = ["calibration.samples=5", "calibration.steps=3"]


def gather(name: str, ranks: Ranks = ALONE, **options: Any) -> Statistics:
    family, settings = PASSES[name]
    torch.manual_seed(0)
    model = family.tiny()
    if name == "experts":
        apply_experts(model, {PATH: ExpertLayer(64, 16, 12, 1)})
        model.get_submodule(PATH).router.weight.normal_()
    conditions = get_conditions(ModuleSource(model), family, settings.samples, 0)
    scheduler = family.default_scheduler(model.config)
    layout = family.layout(model)
    return collect(model, family, model.config, layout, scheduler, conditions, settings, ranks=ranks, **options)


class Stop(Silent):
    """Interrupts a pass after so many steps: by default in its second batch."""

    def __init__(self, steps: int = SETTINGS.steps) -> None:
        self.done = iter(range(steps + 1))

    def task(self, *args: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext(lambda units: next(self.done))


def passes(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Every pass once."""
    for name in PASSES:
        found = gather(name, ranks)
        if ranks.first:
            (folder / name).mkdir()
            save_statistics(folder / name, found)
    return {}


def interrupted(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A pass that ends in its second batch, after the first one is saved."""
    module.SAVE_EVERY_S = -1.0
    (folder / "journal").mkdir(exist_ok=True)
    try:
        gather("dit-fisher", ranks, journal=folder / "journal" if ranks.first else None, reporter=Stop())
    except Exception as error:
        return {"stopped": type(error).__name__}
    finally:
        module.SAVE_EVERY_S = 20.0
    return {}


def taken_over(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What one process began and left within a batch."""
    found = gather("dit-fisher", ranks, journal=folder / "alone" if ranks.first else None)
    if ranks.first:
        (folder / "taken-over").mkdir()
        save_statistics(folder / "taken-over", found)
    return {}


def commands(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """calibrate and quantize of the api, and again where the output exists."""
    facts: dict[str, Any] = {}
    tiny = folder / "tiny"
    found = api.calibrate(tiny, folder / "statistics", overrides=FEW, device="cpu")
    facts["inputs"] = len(found.inputs)
    made = api.quantize(tiny, "w4a8", folder / "quantized", overrides=FEW, device="cpu")
    facts["records"] = len(made.records)
    for out in ("statistics", "quantized"):
        try:
            call = api.calibrate if out == "statistics" else api.quantize
            call(tiny, recipe="w4a8", out=folder / out, overrides=FEW, device="cpu")
        except DitcompressError as error:
            facts[f"{out} again"] = error.code
        distributed.barrier()
    return facts


def failures(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """One process fails in the middle of its work, each in turn, each with errors of ours and others."""
    facts: dict[str, Any] = {}
    for number in (0, 1):
        for kind in (
            ValueError("odd"),
            MemoryError(),
            DitcompressError("E319", "tensor x", "is not finite", "mend it"),
        ):
            try:
                with ranks.together():
                    with ranks.together():
                        pass
                    if ranks.rank == number:
                        raise kind
                    ranks.agree(None)
            except Exception as error:
                facts[f"{number} {type(kind).__name__}"] = f"{type(error).__name__} {error}"
    return facts


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_dit: Path) -> tuple[Path, dict[str, Any]]:
    """Their folder and what each function above gave in both."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(tiny_dit, folder / "tiny")
    (folder / "alone").mkdir()
    with pytest.raises(StopIteration), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAVE_EVERY_S", -1.0)
        gather("dit-fisher", journal=folder / "alone", reporter=Stop(2))
    return folder, in_two(folder, [passes, interrupted, taken_over, commands, failures])


def assert_equal(one: Statistics, other: Statistics, tokens: bool = True) -> None:
    """Sums and ranges to rounding; the same kept tokens, unless not `tokens`."""
    assert one.inputs.keys() == other.inputs.keys() and one.blocks.keys() == other.blocks.keys()
    for key, value in one.inputs.items():
        found = other.inputs[key]
        for name in ("low", "high", "total", "tokens", "gram"):
            expected = getattr(value, name)
            near = 1e-4 * float(expected.abs().max()) + 1e-6
            assert torch.allclose(expected, getattr(found, name), rtol=1e-4, atol=near), (key, name)
        if not tokens:
            assert (len(value.reservoir) > 0) == (len(found.reservoir) > 0), key
            continue
        assert torch.equal(value.reservoir_bucket, found.reservoir_bucket), key
        assert torch.equal(value.priority, found.priority), key
        assert torch.allclose(value.reservoir, found.reservoir, rtol=1e-3, atol=1e-4), key
    for block, similarity in one.blocks.items():
        assert torch.allclose(similarity, other.blocks[block], atol=1e-5), block
    assert one.meta["timesteps"] == other.meta["timesteps"]


@pytest.mark.parametrize("name", PASSES)
def test_two_processes_gather_what_one_does(two: tuple[Path, Any], name: str) -> None:
    assert_equal(gather(name), load_statistics(two[0] / name), tokens=name != "experts")


def test_many_processes_select_the_tokens_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only a part of the tokens enters the Gram matrix."""
    monkeypatch.setattr("ditcompress.calibration.collector.GRAM_TOKENS", 20)
    x = torch.randn(12, 7, 3, generator=torch.Generator().manual_seed(0))  # six images, both branches
    rows = torch.tensor([True, False, True, True, True, False] * 2)
    for counted in (None, rows):
        whole = Collector(SETTINGS)
        whole.begin(1, counted, 5)
        whole.see("x", x)
        parts = []
        for rank in range(3):
            share = Share(torch.tensor([rank, rank + 3, rank + 6, rank + 9]), 12)
            parts.append(Collector(SETTINGS))
            parts[-1].begin(1, counted, 5, share)
            parts[-1].see("x", x[share.rows])
        found = [part.inputs["x"] for part in parts]
        expected = whole.inputs["x"]
        assert expected.gram is not None
        assert torch.allclose(sum(f.gram for f in found), expected.gram, atol=1e-4)  # type: ignore[misc, arg-type]
        assert sum(float(f.tokens) for f in found) == pytest.approx(float(expected.tokens))
        assert torch.allclose(sum(f.total for f in found), expected.total)  # type: ignore[arg-type]
        rows_of = {tuple(row) for f in found for row in torch.cat([f.reservoir, f.priority[:, None]], 1).tolist()}
        assert rows_of == set(map(tuple, torch.cat([expected.reservoir, expected.priority[:, None]], 1).tolist()))


def test_an_interrupted_pass_of_two_goes_on_with_one(two: tuple[Path, Any]) -> None:
    folder, facts = two
    assert [f["stopped"] for f in facts["interrupted"]] == ["StopIteration", "RuntimeError"]
    assert (folder / "journal" / "state.safetensors").exists()
    assert_equal(gather("dit-fisher"), gather("dit-fisher", journal=folder / "journal"))


def test_what_one_process_left_within_a_batch_goes_on_with_two(two: tuple[Path, Any]) -> None:
    assert "walk.latents" in str([*load_atomic(two[0] / "alone" / "state.safetensors")[0]])
    assert_equal(gather("dit-fisher"), load_statistics(two[0] / "taken-over"))


def test_commands_write_once_and_all_learn_that_the_output_exists(two: tuple[Path, Any], tmp_path: Path) -> None:
    folder, facts = two
    tiny = folder / "tiny"
    first, second = facts["commands"]
    assert first["inputs"] > 0 == second["inputs"] and first["records"] > 0 == second["records"]
    assert {f[f"{out} again"] for f in (first, second) for out in ("statistics", "quantized")} == {"E501"}
    one = api.calibrate(tiny, tmp_path / "one", overrides=FEW, device="cpu")
    assert_equal(one, load_statistics(folder / "statistics"))
    made = api.quantize(tiny, "w4a8", tmp_path / "quantized", overrides=FEW, device="cpu")
    layers = [json.loads((place / "quantized" / "layers.json").read_text()) for place in (folder, tmp_path)]
    assert [r["site"] for r in layers[0]] == [r["site"] for r in layers[1]] and made.records
    for ours, theirs in zip(*layers, strict=True):
        assert ours["weight_sqnr_db"] == pytest.approx(theirs["weight_sqnr_db"], abs=0.5)
    assert not list(folder.glob(".quantized*")) and not list(folder.glob(".statistics*"))


def test_a_failure_of_one_is_that_of_all_and_names_its_process(two: tuple[Path, Any]) -> None:
    for rank, found in enumerate(two[1]["failures"]):
        for number in (0, 1):
            by = "" if rank == number or number == 0 else "process 1: "
            assert found[f"{number} DitcompressError"].startswith(
                f"DitcompressError error[E319 non-finite]: {by}tensor x: is not finite"
            )
            other = "ValueError odd" if rank == number else f"RuntimeError process {number}: ValueError: odd"
            assert found[f"{number} ValueError"] == other
            assert ("E602" in found[f"{number} MemoryError"]) == (rank != number)
