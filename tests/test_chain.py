"""Recipes with stages: what each leaves, one folder and one report, interruptions, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditcompress import api, recipe
from ditcompress.api import chain
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model

from .commands import fails, run

SECTIONS: dict[str, Any] = {
    "name": "small",
    "prune": {"ratio": 0.5, "method": "magnitude"},
    "distill": {"steps": 2, "batch": 4, "images": 4, "sample_steps": 2},
    "rules": [{"weight": {"format": "int", "bits": 8, "layout": "row"}}],
}


def small(**sections: Any) -> recipe.Recipe:
    return recipe.parse_recipe({**SECTIONS, **sections}, "small.yaml")


def test_stages_run_in_order_into_one_folder_with_one_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune = {"ratio": 0.5, "method": "magnitude", "width_ratio": 0.25, "width_method": "magnitude"}
    chosen = small(prune=prune, report={"pairs": 4, "images": 16}, evaluation={"profile": "quality"})
    result = api.run_recipe(digits_folder(), chosen, out, device="cpu")
    assert list(result.stages) == ["prune", "distill", "quantize"] and result.path == out
    model, _ = load_model(out)
    assert len(model.transformer_blocks) == 6  # type: ignore[arg-type]
    folder = out / "transformer"
    assert len(json.loads((folder / "distill.json").read_text())["losses"]) == 2
    assert json.loads((folder / "prune.json").read_text())["method"] == "magnitude"
    assert recipe.parse_recipe(json.loads((folder / "recipe.json").read_text()), "recipe.json") == chosen
    page = (out / "report" / "report.html").read_text()
    assert result.report is not None and result.report["verdict"] in page
    assert result.report["sizes"]["compressed"]["parameters"] < result.report["sizes"]["original"]["parameters"]
    layers = {layer["name"]: layer["sqnr_db"] for layer in result.report["layers"]}
    assert layers["transformer_blocks.5.ff.net.0.proj"] is None  # narrower: nothing to compare with
    assert layers["transformer_blocks.5.ff.net.2"] > -20 and layers["transformer_blocks.0.norm1.linear"] > 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    listed = json.loads((out / "manifest.json").read_text())
    assert any("report/report.html" in str(name) for name in listed["files"])


def test_a_killed_run_goes_on_with_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = api.run_recipe(digits_folder(), small(), tmp_path / "whole", device="cpu")
    calls = {"prune": 0, "distill": 0}
    for name in calls:
        made = getattr(chain, name)

        def counted(*given: Any, name: str = name, made: Any = made, **options: Any) -> Any:
            calls[name] += 1
            return made(*given, **options)

        monkeypatch.setattr(chain, name, counted)
    with monkeypatch.context() as context:
        context.setattr(chain, "quantize", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            api.run_recipe(digits_folder(), small(), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists() and calls == {"prune": 1, "distill": 1}
    with pytest.raises(DitcompressError, match="E503"):
        api.run_recipe(digits_folder(), small(), tmp_path / "out", device="cpu", seed=1)
    result = api.run_recipe(digits_folder(), small(), tmp_path / "out", device="cpu")
    assert calls == {"prune": 1, "distill": 1}
    assert result.stages["distill"]["losses"] == whole.stages["distill"]["losses"]
    files = [p / "transformer" / "diffusion_pytorch_model.safetensors" for p in (tmp_path / "out", tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_prune_takes_steps_and_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["prune", digits_folder(), "--ratio", 0.25, "--method", "magnitude", "--recipe", "w8a16"]
    dry = run(*asked, "--dry-run", "--json")
    assert json.loads(dry.stdout)["path"] is None and len(json.loads(dry.stdout)["stages"]["prune"]["removed"]) == 3
    done = run(*asked, "--out", out, "-q")
    assert done.returncode == 0 and "3 blocks removed" in done.stdout and "bits a weight" in done.stdout
    assert len(load_model(out)[0].transformer_blocks) == 9  # type: ignore[arg-type]


def test_bad_input() -> None:
    digits = digits_folder()
    assert "--ratio" in fails(2, "E203", "prune", digits, "--distill-steps", 3)
    assert "--distill-steps" in fails(2, "E203", "prune", digits, "--ratio", 0.5, "--data", "x")
    assert "E203" in fails(2, "E203", "prune", digits, "--ratio", 1.5, "--distill-steps", 3)
    for sections, code in (({"prune": None}, "E202"), ({"distill": {"steps": 2, "loss": "ouput=1"}}, "E201")):
        with pytest.raises(DitcompressError, match=code):
            api.run_recipe(digits, small(**sections), "unused")
    with pytest.raises(DitcompressError, match="E202"):
        api.quantize(digits, small())
    with pytest.raises(DitcompressError, match="E202"):
        small(prune={"ratio": 0.5, "metod": "x"})
