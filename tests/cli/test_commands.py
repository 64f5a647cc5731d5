"""The command line as a process: exit codes, one-line errors, JSON, silence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ditcompress.api import check_recipe
from ditcompress.errors import DitcompressError
from ditcompress.recipe import load_recipe

from ..commands import fails, fresh, run

FEW = ["--set", "calibration.samples=2", "--set", "calibration.steps=2"]


def test_help_is_fast_and_names_every_command() -> None:
    started = time.time()
    done = fresh("--help")
    assert time.time() - started < 2.0  # a quiet machine takes a tenth of a second
    for command in (
        "demo",
        "calibrate",
        "quantize",
        "prune",
        "distill",
        "evaluate",
        "inspect",
        "export",
        "report",
        "recipes",
        "explain",
    ):
        assert command in done.stdout
        assert "--" in run(command, "--help").stdout


def test_importing_the_command_line_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, ditcompress.cli.app; print([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_recipes_are_checked_without_torch() -> None:
    code = (
        "import sys; from ditcompress.recipe import load_recipe; load_recipe('ternary'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_usage_errors_are_one_line() -> None:
    assert "--nope" in fails(2, "E203", "quantize", "x", "--nope")
    assert "qantize" in fails(2, "E203", "qantize")
    assert "w4a8" in fails(2, "E201", "recipes", "show", "w4a9")
    assert "did you mean 'damp'" in fails(
        2, "E202", "recipes", "validate", "w8a8", "--set", "rules.0.steps=[{gptq: {dmp: 1}}]"
    )
    for more in (["--seed", -1], ["--guidance", "nan"], ["--margin", "psnr=nan"], ["--extractor-floor", "inf"]):
        assert str(more[0]) in fails(2, "E203", "evaluate", "x", "y", *more)
    assert run("--version").stdout.startswith("ditcompress ")


def test_recipe_faults_name_line_or_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for text, word in (
        ("rules: [", "line"),
        ("rules: &a [{}]\nx: *a", "aliases"),
        ("rules: []\nrules: []", "twice"),
        ("ruls: []", "'rules'"),
        ("rules: [{wieght: {format: int}}]", "'weight'"),
        ("rules: [{weight: {format: int, bits: 99}}]", "bits"),
        ("rules: [{weight: {format: itn}}]", "'int'"),
        ("rules: [{weight: {format: int}, steps: [gtpq]}]", "'gptq'"),
        ("rules: [{weight: {format: int}, activation: {mode: toke}}]", "token"),
        ("!!python/object/apply:os.system ['true']", "tag"),
    ):
        path.write_text(text)
        with pytest.raises(DitcompressError, match="E20") as caught:
            check_recipe(load_recipe(path))
        assert word in caught.value.line()
    assert "tag" in fails(2, "E202", "recipes", "validate", path)


@pytest.mark.parametrize(
    "given,pairs", [((), 320), (("--quick",), 64), (("--full",), 1000), (("--quick", "--pairs", 4), 4)]
)
def test_pairs_that_are_given_count(tmp_path: Path, given: tuple[object, ...], pairs: int) -> None:
    done = run("evaluate", tmp_path, tmp_path, *given, "--dry-run", "--json")
    assert json.loads(done.stdout)["pairs"] == pairs


def test_quantize_inspect_export_evaluate_end_to_end(tiny_dit: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", tiny_dit, "-r", "w4a8", "-o", out, *FEW, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["layers"]) == 18 and facts["bits_per_quantized_weight"] < 5.2
    assert "E501" in fails(5, "E501", "quantize", tiny_dit, "-o", out, *FEW)
    assert "E322" in fails(3, "E322", "quantize", out, "-o", tmp_path / "twice")
    look = json.loads(run("inspect", out, "--json").stdout)
    assert look["recipe"] == "w4a8" and sum(r["parameters"] for r in look["roles"]) == look["parameters"]
    assert sum(r["bytes"] for r in look["roles"]) == look["bytes"]
    assert "int4 group" in run("inspect", out, "--layers").stdout
    assert run("export", out, "-o", tmp_path / "plain", "-f", "diffusers").returncode == 0
    assert "did you mean" in fails(2, "E201", "export", out, "-o", tmp_path / "x", "-f", "diffuser")
    few = ["--pairs", 4, "--inputs", 8, "--steps", 3, "--classifier", "none"]
    done = run("evaluate", tiny_dit, out, *few, "-o", tmp_path / "rep", "--gate", "--json")
    verdict = json.loads(done.stdout)["verdict"]
    assert done.returncode == {"PASS": 0, "FAIL": 8, "INCONCLUSIVE": 9}[verdict]
    assert (tmp_path / "rep" / "report.html").stat().st_size > 10_000
    same = run("evaluate", tiny_dit, tiny_dit, *few, "--gate")
    assert same.returncode == 0 and "PASS" in same.stdout and "identical" in same.stdout


def test_calibrate_once_and_quantize_twice_from_it(tiny_dit: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    assert run("calibrate", tiny_dit, "-o", stats, *FEW, "-q").returncode == 0
    for recipe, start in (("w4a8", fresh), ("w8a8", run)):
        done = start("quantize", tiny_dit, "-r", recipe, "--statistics", stats, "-o", tmp_path / recipe, "-q")
        assert done.returncode == 0 and done.stderr == ""
    other = tmp_path / "other"
    shutil.copytree(tiny_dit, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-3}))
    assert "another checkpoint" in fails(3, "E331", "quantize", other, "--statistics", stats, "-o", tmp_path / "x")


def test_dry_runs_print_the_plan_and_write_nothing(tiny_dit: Path, tmp_path: Path) -> None:
    done = run("quantize", tiny_dit, "-o", tmp_path / "out", "--dry-run")
    assert done.returncode == 0 and "ffn_in" in done.stdout and not (tmp_path / "out").exists()
    assert len(json.loads(run("quantize", tiny_dit, "--dry-run", "--json").stdout)["plan"]) == 18
    assert (
        run("calibrate", tiny_dit, "-o", tmp_path / "s", "--dry-run").returncode == 0 and not (tmp_path / "s").exists()
    )


def test_bad_checkpoints_give_their_code(copied: Path, tmp_path: Path) -> None:
    assert "no-such" in fails(3, "E301", "inspect", tmp_path / "no-such")
    weights = copied / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = fails(3, "E312", "quantize", copied, "-r", "w8a16", "-o", tmp_path / "out")
    assert weights.name in line and "copy" in line and not (tmp_path / "out").exists()
    as_json = run("inspect", copied, "--json")
    assert json.loads(as_json.stderr)["error"]["code"] == "E312" and as_json.stdout == ""


def test_a_nan_weight_stops_the_run_and_the_earlier_output_survives(copied: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert run("quantize", copied, "-r", "w8a16", "-o", tmp_path / "out").returncode == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    path = copied / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.0.ff.net.2.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    line = fails(3, "E319", "quantize", copied, "-r", "w8a16", "-o", tmp_path / "out", "--overwrite")
    assert "transformer_blocks.0.ff.net.2.weight" in line
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert not [p.name for p in tmp_path.iterdir() if "partial" in p.name]


def test_an_interrupt_gives_130_and_leaves_no_output(tmp_path: Path) -> None:
    from ditcompress.evaluation.digits import digits_folder

    command = [
        sys.executable,
        "-m",
        "ditcompress",
        "quantize",
        str(digits_folder()),
        "-o",
        str(tmp_path / "out"),
        "--seed",
        "77",
    ]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.time() + 60
        while not list(tmp_path.glob(".out.partial-*")) and time.time() < deadline:
            time.sleep(0.1)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == code and "Traceback" not in errors
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.partial-*"))


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m ditcompress recipes list | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1", "LANG": "C", "LC_ALL": "C"}, {"HOME": "/proc/none", "XDG_CACHE_HOME": ""}]
)
def test_odd_environments(environment: dict[str, str], tiny_dit: Path, tmp_path: Path) -> None:
    out = tmp_path / "with space"
    done = fresh("quantize", tiny_dit, "-r", "w4a8", "-o", out, *FEW, env={**os.environ, **environment})
    assert done.returncode == 0 and "\x1b" not in done.stdout, done.stderr


def test_explain_and_lists() -> None:
    assert "Frantar" in run("explain", "gptq").stdout
    assert "column_group" in run("explain", "int").stdout
    assert "did you mean 'gptq'" in fails(2, "E201", "explain", "gptqq")
    names = {r["name"]: r["source"] for r in json.loads(run("recipes", "list", "--json").stdout)}
    assert {"w8a8", "w4a8", "w4a16", "w8a16", "w4a8-ditas"} <= set(names) and names["w4a8-ditas"]
    for name in names:
        check_recipe(load_recipe(name))
