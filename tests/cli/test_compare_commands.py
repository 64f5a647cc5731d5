"""compare and sample as processes: tables and images that can be read, one line for bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditcompress import api
from ditcompress.evaluation.digits import digits_folder
from ditcompress.report.runs import run_names

from ..commands import run

QUICK = ["--count", 5, "--steps", 2, "--guidance", 1.5, "--device", "cpu"]


def refused(code: str, word: str, *arguments: object) -> None:
    """The command leaves one line of `code` on stderr that says `word`, nothing on stdout, and its exit code."""
    done = run(*arguments)
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith(f"error[{code} ") and word in lines[0], done.stderr
    assert done.returncode == int(code[1]) and done.stdout == ""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Reports of the embedded model in eight and in four bits, on the same few pairs."""
    folder = tmp_path_factory.mktemp("reports")
    for recipe in ("w8a16", "w4a16-rtn"):
        api.quantize(digits_folder(), recipe, folder / recipe, device="cpu")
        api.evaluate(
            digits_folder(), folder / recipe, folder / f"report-{recipe}", pairs=8, inputs=8, timesteps=2, steps=2,
            shown=1, extractor="none", classifier="none", fresh_process=False, cost_batches=(1,), device="cpu",
        )  # fmt: skip
    return folder / "report-w8a16", folder / "report-w4a16-rtn"


def value(report: Path, name: str) -> float:
    rows = json.loads((report / "report.json").read_text())["measurements"]
    return float(next(m for m in rows if m["name"] == name)["value"])


def test_compare_writes_one_page_and_the_numbers_of_the_reports(reports: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("compare", *reports, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    facts = json.loads(done.stdout)
    assert facts == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [r["name"] for r in facts["rows"]] == ["w8a16", "w4a16-rtn"]
    for report, row, point in zip(reports, facts["rows"], facts["points"], strict=True):
        assert row["metrics"]["psnr"]["value"] == value(report, "psnr") == point["y"]
        assert point["x"] == row["disk_bytes"] / 1e6
    assert set(facts["front"]) == {"w8a16", "w4a16-rtn"}  # one is smaller, the other better
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    assert "w4a16-rtn" in page and 'alt="' in page
    refused("E501", "exists", "compare", *reports, "-o", tmp_path / "out")


def test_a_dry_comparison_prints_the_table_and_writes_nothing(reports: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("compare", *reports, "-o", tmp_path / "out", "--dry-run", "--x", "bits", "--y", "sqnr_weighted")
    assert done.returncode == 0 and "w8a16 *" in done.stdout and "verdict" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir()) and "compare.html" not in done.stdout


def test_a_run_that_is_worse_and_larger_is_not_on_the_front(reports: tuple[Path, Path], tmp_path: Path) -> None:
    def copied(name: str, **changes: Any) -> Path:
        shutil.copytree(reports[1], tmp_path / name)
        result = json.loads((tmp_path / name / "report.json").read_text())
        for key, changed in changes.items():
            result[key].update(changed)
        next(m for m in result["measurements"] if m["name"] == "psnr")["value"] -= 5
        (tmp_path / name / "report.json").write_text(json.dumps(result))
        return tmp_path / name

    worse = copied("worse")
    facts = api.compare([reports[1], worse])
    assert [r["name"] for r in facts["rows"]] == ["report-w4a16-rtn", "worse"]  # one model twice: named by folder
    assert facts["front"] == ["report-w4a16-rtn"]
    guided = copied("guided", provenance={"guidance": 9.0})
    refused("E342", "guidance", "compare", reports[1], guided)
    as_json = run("compare", reports[1], guided, "--json")
    assert as_json.returncode == 3 and json.loads(as_json.stderr)["error"]["code"] == "E342"


def test_comparisons_that_cannot_be_made_are_one_line(reports: tuple[Path, Path], tmp_path: Path) -> None:
    refused("E203", "two or more", "compare", reports[0])
    refused("E203", "did you mean 'psnr'", "compare", *reports, "--y", "pnsr")
    refused("E203", "did you mean 'latency'", "compare", *reports, "--x", "latencie")
    refused("E301", "report.json", "compare", reports[0], tmp_path)


def test_sample_writes_numbered_images_and_their_manifest(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ditcompress", "sample", digits_folder(), "-o", tmp_path / "out", *QUICK]
    done = subprocess.run([*map(str, command), "--json", "--seed", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    facts = json.loads(done.stdout)
    assert facts["images"] == 5 and facts["layout"] == "images"
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(5)) and {line["seed"] for line in lines} == {3}
    assert all((tmp_path / "out" / line["file"]).is_file() and 0 <= line["label"] < 10 for line in lines)
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the output"
    refused("E501", "exists", "sample", digits_folder(), "-o", tmp_path / "out", *QUICK)


def test_samples_do_not_depend_on_the_batch_and_the_compressed_model_gets_the_same_labels(
    reports: tuple[Path, Path], tmp_path: Path
) -> None:
    compressed = reports[0].parent / "w8a16"
    for name, source, batch in (("a", digits_folder(), 2), ("b", digits_folder(), 5), ("c", compressed, 5)):
        done = run("sample", source, "-o", tmp_path / name, *QUICK, "--layout", "adm", "--batch", batch, "-q")
        assert done.returncode == 0 and done.stderr == "", done.stderr
    a, b, c = (np.load(tmp_path / name / "samples.npz") for name in "abc")
    assert a["arr_0"].shape == (5, 8, 8, 3) and a["arr_0"].dtype == np.uint8
    far = np.abs(a["arr_0"].astype(int) - b["arr_0"]).max(), np.abs(b["arr_0"].astype(int) - c["arr_0"]).max()
    assert far[0] <= 1 and 0 < far[1] < 128
    assert a["arr_1"].tolist() == b["arr_1"].tolist() == c["arr_1"].tolist()


def test_an_interrupted_sample_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk fails once; the second run makes only that one."""
    from ditcompress.evaluation.subject import Subject

    real, asked = Subject.images, []

    def images(self: Subject, model: torch.nn.Module, indices: list[int], **options: Any) -> torch.Tensor:
        asked.append(indices[0])
        if asked == [0, 64]:
            raise KeyboardInterrupt
        return real(self, model, indices, **options)

    monkeypatch.setattr(Subject, "images", images)
    options: dict[str, Any] = {"count": 70, "steps": 2, "guidance": 1.5, "layout": "adm", "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        api.sample(digits_folder(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert api.sample(digits_folder(), tmp_path / "out", **options)["images"] == 70 and asked == [0, 64, 64]
    api.sample(digits_folder(), tmp_path / "whole", **options)
    first, second = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("out", "whole"))
    assert np.array_equal(first, second)


def test_a_dry_sample_prints_its_settings_and_writes_nothing(tmp_path: Path) -> None:
    done = run("sample", digits_folder(), "-o", tmp_path / "out", *QUICK, "--dry-run", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["count"] == 5 and not list(tmp_path.iterdir())


def test_samples_that_cannot_be_made_are_one_line(tiny_dit: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("E201", "did you mean 'images'", "sample", digits_folder(), "-o", out, *QUICK, "--layout", "imags")
    refused("E205", "no VAE", "sample", tiny_dit, "-o", out, *QUICK)
    refused("E301", "none", "sample", tmp_path / "none", "-o", out, *QUICK)
    refused("E203", "needs prompts", "sample", digits_folder(), "-o", out, *QUICK, "--layout", "geneval")
    assert not out.exists() and not list(tmp_path.glob(".out.partial*"))


def test_a_damaged_report_is_one_line(reports: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(reports[0], tmp_path / "report")
    images = folder / "images.safetensors"
    images.write_bytes(images.read_bytes()[:100])
    refused("E323", "damaged", "report", folder)
    shutil.copy(reports[0] / "images.safetensors", images)
    facts = json.loads((folder / "report.json").read_text())
    del facts["speed"]
    (folder / "report.json").write_text(json.dumps(facts))
    refused("E323", "has no speed", "report", folder)
    refused("E323", "has no speed", "compare", folder, reports[1])


def test_runs_are_told_apart_by_their_paths_where_nothing_else_differs() -> None:
    model = {"provenance": {"compressed": {"name": "w4a8"}}}
    folders = [Path("a") / "report", Path("b") / "report"]
    assert run_names(folders, [model, model]) == [str(folder) for folder in folders]
    assert run_names([Path("one"), Path("two")], [model, model]) == ["one", "two"]
