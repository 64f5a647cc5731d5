"""`ditcompress prune` and `inspect --sensitivity` as processes: exit codes, one-line errors, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditcompress.evaluation.digits import digits_folder

from ..commands import run


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--ratio", "1.5"), "E203"),
        (("--ratio", "0.98"), "E203"),
        (("--ratio", "0.5", "--method", "shortgpd"), "E201"),
        ((), "E203"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], code: str, tmp_path: Path) -> None:
    done = run("prune", digits_folder(), *arguments, "--out", tmp_path / "out", "--quiet")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith(f"error[{code}") and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_json_is_what_prune_json_holds_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    asked = ["prune", digits_folder(), "--ratio", "0.5", "--method", "magnitude", "--out", tmp_path / "out", "--json"]
    dry = json.loads(run(*asked, "--dry-run").stdout)
    assert dry.pop("path") is None and list(tmp_path.iterdir()) == []
    found = json.loads(run(*asked).stdout)
    assert found.pop("path") == str(tmp_path / "out")
    assert found == dry == json.loads((tmp_path / "out" / "transformer" / "prune.json").read_text())


def test_sensitivity_prints_a_row_for_every_block() -> None:
    done = run("inspect", digits_folder(), "--sensitivity", "--method", "flux-lite", "--quiet")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {str(i) for i in range(1, 12)} <= {row[0] for row in rows if len(row) == 12}
    assert "cannot go: transformer_blocks.0" in done.stdout
