"""`ditcompress distill` as a process: facts, dry runs, one-line errors, and a killed run that goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from ditcompress.evaluation.digits import digits_folder

from ..commands import fails, run
from ..distill.models import cached, shortened

FEW = ["--batch", 8, "--images", 4, "--sample-steps", 4, "--device", "cpu"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def student(folder: Path) -> Path:
    return shortened(digits_folder() / "transformer", folder / "student", [0, 4, 8])


def test_facts_and_dry_runs(tmp_path: Path) -> None:
    made = student(tmp_path)
    done = run("distill", digits_folder(), made, "-o", tmp_path / "out", "--steps", 3, *FEW, "--dry-run")
    assert done.returncode == 0 and "transformer_blocks.11" in done.stdout and not (tmp_path / "out").exists()
    done = run("distill", digits_folder(), made, "-o", tmp_path / "out", "--steps", 3, *FEW, "--json", "-q")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and len(facts["losses"]) == 3 and facts["path"].endswith("out") and done.stderr == ""
    assert "E501" in fails(5, "E501", "distill", digits_folder(), made, "-o", tmp_path / "out", "--steps", 3, *FEW)
    done = run("distill", digits_folder(), made, "-o", tmp_path / "out", "--steps", 2, *FEW, "--overwrite")
    assert done.returncode == 0 and "2 steps" in done.stdout


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    made, digits, out = student(tmp_path), digits_folder(), tmp_path / "out"
    assert "steps" in fails(2, "E203", "distill", digits, made, "-o", out, "--steps", 0)
    assert "masked" in fails(2, "E201", "distill", digits, made, "-o", out, "--loss", "maksed=1")
    assert "blocks" in fails(3, "E340", "distill", made, digits, "-o", out)
    wrong = cached(tmp_path / "wrong", (1, 4, 4))
    assert "(n, 1, 8, 8)" in fails(3, "E338", "distill", digits, made, "-o", out, "--data", wrong)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_killed_run_goes_on_when_it_is_called_again(tmp_path: Path) -> None:
    made = student(tmp_path)
    options = ["--steps", 150, *FEW, "--save-every", 10, "-q"]
    assert run("distill", digits_folder(), made, "-o", tmp_path / "whole", *options).returncode == 0
    for number, code in ((signal.SIGKILL, -9),):
        command = [
            sys.executable,
            "-m",
            "ditcompress",
            "distill",
            digits_folder(),
            made,
            "-o",
            tmp_path / "out",
            *options,
        ]
        child = subprocess.Popen([str(a) for a in command], stderr=subprocess.PIPE, text=True, start_new_session=True)
        state, deadline = tmp_path / ".out.work" / "training.pt", time.time() + 100
        before = state.stat().st_mtime_ns if state.exists() else 0
        while time.time() < deadline and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.02)
        child.send_signal(number)
        child.communicate(timeout=60)
        assert child.returncode == code and not (tmp_path / "out").exists()
    assert run("distill", digits_folder(), made, "-o", tmp_path / "out", *options).returncode == 0
    for name in (WEIGHTS, "distill.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".out*"))
