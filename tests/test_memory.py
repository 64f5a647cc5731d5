"""Peaks of memory, by the system's account of processes of their own: as predicted, and bounded when offloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditcompress.api import _memory, calibrate, calibration_plan, quantize
from ditcompress.api._quantized import checked_plan
from ditcompress.calibration.collect import CalibrationSettings
from ditcompress.calibration.footprint import Ledger, collect_bytes, follow, pass_bytes, statistics_bytes
from ditcompress.calibration.statistics import flatten
from ditcompress.calibration.walking import Abreast
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.loading import open_model
from ditcompress.models import adapter_for, registry
from ditcompress.recipe import load_recipe

from .pruning.models import DEPTHS, deep

CASES = ("forward:disk", "calibrate:disk", "encode:none")  # `python -m tests.peaks` knows more
PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measured and predicted bytes of every case, and the folder of the model."""
    folder = tmp_path_factory.mktemp("peaks")
    told = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.peaks", str(folder), *CASES]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "folder": folder / "medium"}


@pytest.mark.slow
def test_an_offloaded_pass_needs_no_more_than_two_blocks(peaks: dict[str, Any]) -> None:
    checkpoint, meta = open_model(peaks["folder"])
    blocks = adapter_for(checkpoint.config).layout(meta).blocks
    sizes = dict.fromkeys(("", *blocks), 0)
    for name, entry in checkpoint.tensors.items():
        owner = next((block for block in blocks if name.startswith(f"{block}.")), "")
        sizes[owner] += entry.stop - entry.start
    fixed = _memory.PROGRAM + 80_000_000  # the activations of one image; huge pages round every freed piece up
    bound = sizes[""] + 2 * max(sizes[block] for block in blocks) + fixed
    assert peaks["measured"]["forward:disk"] < bound < checkpoint.total_bytes / 2


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("forward")])
def test_the_predicted_peak_is_within_a_quarter(peaks: dict[str, Any], case: str) -> None:
    assert peaks["predicted"][case] == pytest.approx(peaks["measured"][case], rel=0.25)


def test_the_ledger_counts_storages_while_they_live() -> None:
    model = torch.nn.Linear(4, 4)
    with Ledger(model) as ledger:
        first = torch.zeros(100)
        second = first.view(10, 10).double()
        assert ledger.now == 400 + 800
        del first
        torch.zeros(50)
        third = model.weight.t()  # of the model: not counted
    assert (ledger.now, ledger.peak) == (800, 400 + 800) and second.numel() + third.numel() == 116


@pytest.mark.parametrize("family", sorted(DEPTHS))
def test_every_family_can_be_followed_without_data(family: str) -> None:
    model = deep(family)
    config: Any = {**dict(model.config), "_class_name": type(model).__name__}  # type: ignore[arg-type]
    adapter = registry.get(family)
    one, four = (pass_bytes(config, adapter, rows, torch.float32) for rows in (1, 4))
    assert 2 * one < four < 4.5 * one
    layout = adapter.layout(model)
    back = pass_bytes(config, adapter, 4, torch.float32, backward=True)
    assert back > four
    assert follow(config, adapter, 4, torch.float32, backward="blockwise", blocks=layout.blocks).peak < 0.7 * back
    settings = CalibrationSettings(samples=4, weighting="fisher")
    whole, alone = collect_bytes(config, adapter, layout, settings, torch.float32)
    assert whole > four and alone == Abreast()
    more = replace(settings, samples=20)  # in batches of 16 and 4; of eight images of a batch come gradients
    assert collect_bytes(config, adapter, layout, more, torch.float32, offloaded=True)[1] == Abreast(2, 4)


def test_statistics_are_as_large_as_predicted(tiny_dit: Path) -> None:
    sets = ["calibration.samples=4", "calibration.steps=8"]
    found = flatten(calibrate(tiny_dit, overrides=sets))
    checkpoint, meta = open_model(tiny_dit)
    layout = adapter_for(checkpoint.config).layout(meta)
    predicted = statistics_bytes(layout, CalibrationSettings(samples=4, steps=8))
    assert predicted == pytest.approx(sum(t.nbytes for t in found.values()), rel=0.25)


def test_dry_runs_and_notes_tell_the_prediction(tiny_dit: Path) -> None:
    resident, offloaded = (calibration_plan(tiny_dit, "w4a8", offload=way)["memory_bytes"] for way in ("none", "disk"))
    assert offloaded < resident
    assert quantize(tiny_dit, "w4a16-rtn", dry_run=True).memory_bytes is not None
    said: list[str] = []
    told: Any = type("Told", (), {"note": lambda self, text: said.append(text)})()
    _memory.tell(told, lambda: _memory.Memory(1_000_000, 2_000_000, 3_000_000))
    assert said[0].startswith("predicted peak memory beside the program's own: 6.0")


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("w4a8", {"target_bits": 5.0}, "the result of a target is measured"),
        ("terdit", {}, "steps of the recipe are trained"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    tiny_dit: Path, recipe: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DitcompressError, match=rf"E203 bad-option\]: --offload disk: {message}"):
        quantize(tiny_dit, recipe, dry_run=True, offload="disk", **options)


def test_optional_training_is_left_out_with_a_note(tiny_dit: Path) -> None:
    checkpoint, meta = open_model(tiny_dit)
    recipe = load_recipe("w3a16")
    said: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    plan = checked_plan(recipe, adapter_for(checkpoint.config).layout(meta))
    changed = _memory.check_quantization(recipe, plan, (None,), "disk", Notes())
    assert changed.training is None and said == ["not trained: an offloaded model has no weights that stay in memory"]
    assert _memory.check_quantization(recipe, plan, (None,), "none", Notes()) is recipe
