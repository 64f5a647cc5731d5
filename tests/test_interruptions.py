"""Runs that end early: what a killed one leaves is gone on with, what is damaged or differs is told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ditcompress import api
from ditcompress.api import compress
from ditcompress.checkpoint import writer
from ditcompress.errors import DitcompressError
from ditcompress.evaluation import compare
from ditcompress.loading import open_model
from ditcompress.models import adapter_for

from .pruning.models import deep

AUTO = ["calibration.samples=2", "calibration.steps=2", "rules.0.steps.1={rtn: {}}"]
MOE = ["calibration.samples=4", "calibration.steps=2", "images=0", "training.batch=2", "training.images=2",
       "training.sample_steps=2", "training.save_every=1"]  # fmt: skip


class Killed(BaseException):
    """As an interrupt, which nothing may catch."""


def killing(after: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, killed at the call after so many."""
    calls = [0]

    def call(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise Killed
        return real(*given, **more)

    return call


def conditions(model: Path, file: Path, seed: int) -> Path:
    config = open_model(model)[0].config
    save_file(adapter_for(config).random_conditions(config, 8, torch.Generator().manual_seed(seed)), file)
    return file


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "original"
    deep("dit").save_pretrained(folder)  # type: ignore[operator]
    return folder


def staged() -> Any:
    chosen = api.staged(None, {"ratio": 0.4, "method": "magnitude"}, 2, None)
    few = {"images": 2, "sample_steps": 2, "batch": 2}
    return chosen.model_copy(update={"distill": chosen.distill.model_copy(update=few)})


def test_a_staged_run_killed_while_it_is_published_keeps_its_training(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_manifest", killing(2, writer.write_manifest))  # of both stages, not the result
        with pytest.raises(Killed):
            api.run_recipe(original, staged(), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys.modules["ditcompress.api.distill"], "train", killing(0, print))
    result = api.run_recipe(original, staged(), tmp_path / "out", device="cpu")
    assert len(result.stages["distill"]["losses"]) == 2 and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_try_for_a_target_is_published_when_it_is_the_last_and_a_killed_one_goes_on(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(**more: Any) -> Any:
        return api.quantize(tiny_dit, "auto", tmp_path / "out", overrides=AUTO, device="cpu", **more)

    monkeypatch.setattr(compress, "measured_db", lambda *args, **more: 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(compress.engine, "run", killing(1, compress.engine.run))
        with pytest.raises(Killed):
            made(target_db=15.0)
    assert not (tmp_path / "out").exists()
    made(target_db=15.0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with monkeypatch.context() as patched:
        patched.setattr(compress.engine, "run", killing(2, compress.engine.run))
        with pytest.raises(Killed):
            made(target_db=15.0, overwrite=True)
    made(target_db=12.0, overwrite=True, restart=True)  # what another target left of its second try is no hindrance
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def killed_moe(model: Path, out: Path, **more: Any) -> Any:
    return api.moe(model, out, experts=4, active=1, shared=1, distill_steps=4, device="cpu", overrides=MOE, **more)


def test_other_conditions_or_types_are_no_continuation(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (conditions(tiny_dit, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    module = sys.modules["ditcompress.distill.trainer"]
    with monkeypatch.context() as patched:
        patched.setattr(module, "_step", killing(2, module._step))
        with pytest.raises(Killed):
            killed_moe(tiny_dit, tmp_path / "out", conditions=first)
    for more, word in (({"conditions": second}, "conditions"), ({"conditions": first, "dtype": "bfloat16"}, "dtype")):
        with pytest.raises(DitcompressError, match=f"E503.*differs in {word}"):
            killed_moe(tiny_dit, tmp_path / "out", **more)
    killed_moe(tiny_dit, tmp_path / "out", conditions=first)


def test_a_replaced_file_of_conditions_is_noticed(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned() -> Any:
        few = ["samples=2", "steps=2"]
        return api.prune(original, 0.4, tmp_path / "out", method="oracle-greedy", overrides=few, conditions=file,
                         device="cpu")  # fmt: skip

    file = conditions(original, tmp_path / "c.safetensors", 1)
    module = sys.modules["ditcompress.pruning.base"]
    with monkeypatch.context() as patched:
        patched.setattr(module.Context, "errors", killing(2, module.Context.errors))
        with pytest.raises(Killed):
            pruned()
    conditions(original, file, 2)
    with pytest.raises(DitcompressError, match=r"E503.*differs in conditions"):
        pruned()


def test_a_mistake_leaves_nothing_that_the_corrected_command_trips_over(
    original: Path, tiny_dit: Path, tmp_path: Path
) -> None:
    chosen = staged()
    wrong = chosen.model_copy(update={"prune": chosen.prune.model_copy(update={"method": "none"})})
    with pytest.raises(DitcompressError, match="E201"):
        api.run_recipe(original, wrong, tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DitcompressError, match="E3"):
        killed_moe(tiny_dit, tmp_path / "out", conditions=tmp_path / "none.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [b"", b"PK half of a file"])
def test_a_damaged_state_names_the_way_out(left: bytes, tiny_dit: Path, tmp_path: Path) -> None:
    options = {"steps": 3, "batch": 2, "images": 2, "sample_steps": 2, "save_every": 1, "device": "cpu"}
    module = sys.modules["ditcompress.distill.trainer"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_step", killing(2, module._step))
        with pytest.raises(Killed):
            api.distill(tiny_dit, tiny_dit, tmp_path / "out", **options)
    (tmp_path / ".out.work" / "training.pt").write_bytes(left)
    with pytest.raises(DitcompressError, match=r"E503.*is damaged.*--restart"):
        api.distill(tiny_dit, tiny_dit, tmp_path / "out", **options)
    api.distill(tiny_dit, tiny_dit, tmp_path / "out", restart=True, **options)


def test_a_damaged_block_names_the_way_out(tiny_dit: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "write_manifest", killing(0, print))
        with pytest.raises(Killed):
            api.quantize(tiny_dit, "w4a16-rtn", tmp_path / "out")
    unit = next((tmp_path / ".out.work").glob("unit-*.safetensors"))
    unit.write_bytes(unit.read_bytes()[:40])
    with pytest.raises(DitcompressError, match=r"E503.*is damaged.*--restart"):
        api.quantize(tiny_dit, "w4a16-rtn", tmp_path / "out")


def test_images_of_other_conditions_are_not_judged(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(**more: Any) -> Any:
        return api.evaluate(tiny_dit, tiny_dit, tmp_path / "out", conditions=file, pairs=2, inputs=8, timesteps=2,
                            steps=2, shown=1, extractor="none", classifier="none", fresh_process=False,
                            cost_batches=(1,), device="cpu", **more)  # fmt: skip

    file = conditions(tiny_dit, tmp_path / "c.safetensors", 1)
    with monkeypatch.context() as patched:
        patched.setattr(compare.denoiser, "probe", killing(0, print))
        with pytest.raises(Killed):
            judged()
    conditions(tiny_dit, file, 2)
    with pytest.raises(DitcompressError, match=r"E503.*differs in conditions"):
        judged()
    assert judged(restart=True)["provenance"]["conditions"]
