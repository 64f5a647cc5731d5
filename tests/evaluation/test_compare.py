"""The whole comparison on a tiny model: identity is exact, every planted fault is caught, the report is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditcompress import api
from ditcompress.errors import DitcompressError
from ditcompress.evaluation import denoiser, subject
from ditcompress.evaluation.digits import digits_folder, load_digit_classifier
from ditcompress.evaluation.settings import EvaluateSettings
from ditcompress.models import dit

SMALL: dict[str, Any] = {
    "pairs": 12, "images": 96, "inputs": 24, "steps": 4, "batch": 8, "guidance": 1.5, "fresh_process": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def digits_w8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "w8"
    api.quantize(digits_folder(), "w8a16", out)
    return out


@pytest.fixture(scope="module")
def report(digits_w8: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("report") / "out"
    options = {**SMALL, "pairs": 24, "steps": 10, "fresh_process": True}
    return out, api.evaluate(digits_folder(), digits_w8, out, command="ditcompress evaluate <b>x</b>", **options)


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {m["name"]: m for m in result["measurements"]}


def damaged(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the embedded transformer with one planted fault."""
    import shutil

    shutil.copytree(folder / "transformer", target)
    path = target / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    return target


def test_a_model_against_itself_is_identical_in_every_row_and_passes() -> None:
    result = api.evaluate(digits_folder(), digits_folder() / "transformer", **SMALL)
    assert result["verdict"] == "PASS"
    rows = by_name(result)
    assert all(m["identical"] for m in rows.values()), rows
    assert rows["class_accuracy"]["value"] == 0 and rows["label_flips"]["value"] == 0


def test_eight_bits_pass_the_sharp_margins_but_twelve_pairs_cannot_bound_rare_faults(report: Any) -> None:
    _, result = report
    rows = by_name(result)
    assert rows["psnr"]["gate"] == "PASS" and rows["psnr"]["low"] > 40
    assert rows["sqnr_weighted"]["gate"] == "PASS" and rows["sqnr_weighted"]["low"] > 45
    assert rows["pairs_under_15"]["gate"] == "INCONCLUSIVE" and "300 pairs" in rows["pairs_under_15"]["note"]
    assert result["verdict"] == "INCONCLUSIVE"
    assert rows["psnr"]["floor"] < 15  # unrelated images
    assert 0.999 < rows["feature_cosine"]["value"] <= 1


def test_every_integrity_check_ran_in_a_fresh_process_too(report: Any) -> None:
    checks = {c["name"]: c["passed"] for c in report[1]["integrity"]}
    names = ("manifest", "fresh process", "finite outputs", "timestep", "live layers")
    assert checks == dict.fromkeys(names, True)


def test_sizes_are_those_of_the_files(report: Any, digits_w8: Path) -> None:
    sizes = report[1]["sizes"]
    on_disk = sum(p.stat().st_size for p in (digits_w8 / "transformer").glob("*.safetensors"))
    assert sizes["compressed"]["disk_bytes"] == on_disk
    assert sizes["original"]["parameters"] == sizes["compressed"]["parameters"] == 1160900


def test_the_report_follows_its_schema_and_renders_again(report: Any) -> None:
    folder, result = report
    schema = json.loads((resources.files("ditcompress") / "report" / "schema.json").read_text())
    jsonschema.validate(json.loads((folder / "report.json").read_text()), schema)
    page = (folder / "report.html").read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;b&gt;x" in page and "<b>x</b>" not in page
    assert len(page) < 3_000_000 and page.count("<img") == page.count("alt=")
    (folder / "report.html").unlink()
    assert api.report(folder) == result
    assert (folder / "report.html").read_text() == page


FAULTS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "scale x1.1 of one linear a block": lambda t: [t[n].mul_(1.1) for n in t if n.endswith("ff.net.2.weight")],
    "a dead block": lambda t: [t[n].zero_() for n in t if n.startswith("transformer_blocks.6.norm1.linear")],
    "labels rotated": lambda t: [
        t.__setitem__(n, torch.cat([t[n][:10].roll(1, 0), t[n][10:]])) for n in list(t) if "embedding_table" in n
    ],
    "an unrelated head": lambda t: t["proj_out_2.weight"].neg_(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault: str, tmp_path: Path) -> None:
    broken = damaged(digits_folder(), tmp_path / "broken", FAULTS[fault])
    margins = {"sqnr_weighted": 35.0, "psnr": 32.0}  # eight bits pass these with room to spare, see above
    result = api.evaluate(digits_folder(), broken, **{**SMALL, "pairs": 20, "steps": 10, "margins": margins})
    assert result["verdict"] == "FAIL", by_name(result)
    if fault == "labels rotated":
        assert by_name(result)["class_accuracy"]["high"] < -50


def test_outputs_that_are_not_finite_fail(tmp_path: Path) -> None:
    broken = damaged(digits_folder(), tmp_path / "nan", lambda t: t["proj_out_2.bias"].fill_(float("inf")))
    result = api.evaluate(digits_folder(), broken, tmp_path / "out", **SMALL)
    assert result["verdict"] == "FAIL" and (tmp_path / "out" / "report.html").is_file()
    assert {c["name"]: c["passed"] for c in result["integrity"]}["finite outputs"] is False


def test_a_shift_of_one_timestep_is_seen_by_the_denoiser_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvaluateSettings(**SMALL)
    one = subject.open_subject(digits_folder(), digits_folder(), settings, reporter=api.judge.Silent())
    real = type(one).predict

    def shifted(self: Any, model: Any, latents: Any, timestep: Any, *rest: Any) -> Any:
        return real(self, model, latents, timestep + (model is self.compressed), *rest)

    monkeypatch.setattr(subject.Subject, "predict", shifted)
    rows = {m.name: m for m in denoiser.measurements(denoiser.probe(one, api.judge.Silent()), 0)}
    assert not rows["sqnr_weighted"].identical and rows["sqnr_worst"].value < 40


def test_results_do_not_depend_on_the_batch_size(digits_w8: Path) -> None:
    first, second = (
        by_name(api.evaluate(digits_folder(), digits_w8, **{**SMALL, "batch": batch})) for batch in (4, 12)
    )
    for name in ("psnr", "sqnr_weighted", "ssim"):
        assert first[name]["value"] == pytest.approx(second[name]["value"], abs=0.05)


def test_sampler_weights_of_ddim_are_its_closed_form() -> None:
    scheduler = dit.default_scheduler({})
    times, weights = denoiser.sampler_weights(scheduler, 5)
    scheduler.set_timesteps(5)
    alphas = scheduler.alphas_cumprod.double()
    for t, weight in zip(times, weights, strict=True):
        a, b = alphas[int(t)], alphas[int(t) - 200] if t >= 200 else scheduler.final_alpha_cumprod.double()
        expected = (1 - b).sqrt() - (b / a).sqrt() * (1 - a).sqrt()
        assert weight == pytest.approx(float(expected) ** 2, rel=1e-2)


def test_two_different_models_are_not_compared(tmp_path: Path, tiny_dit: Path) -> None:
    with pytest.raises(DitcompressError, match="E340"):
        api.evaluate(digits_folder(), tiny_dit, **SMALL)


def test_a_report_folder_without_a_report_and_a_classifier_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DitcompressError, match="E301"):
        api.report(tmp_path)
    with pytest.raises(DitcompressError, match="E203"):
        api.evaluate(digits_folder(), digits_folder(), **{**SMALL, "classifier": "no.such:thing"})


def test_the_embedded_classifier_knows_digits() -> None:
    facts = json.loads((digits_folder() / "training.json").read_text())
    assert facts["sample_accuracy"] >= 0.98 and facts["classifier_accuracy"] >= 0.97
    assert load_digit_classifier().features(torch.zeros(2, 1, 8, 8)).shape == (2, 32)
    size = sum(p.stat().st_size for p in digits_folder().rglob("*") if p.is_file())
    assert size <= 4_000_000
