"""Methods that measure for long go on where they were killed, with the same result, and say how far they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ditcompress import prune
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.pruning import Context, fusegpt
from ditcompress.pruning.width import Context as WidthContext

from .models import deep
from .test_methods import context, few

WIDTH = ["samples=2", "steps=3", "timesteps=2", "batch=2"]
CASES: dict[str, dict[str, Any]] = {
    "oracle-greedy": {"ratio": 0.5, "method": "oracle-greedy", "overrides": few("oracle_greedy")},
    "fusegpt": {"ratio": 0.5, "method": "fusegpt", "overrides": few("fusegpt")},
    "laptop-diff": {"ratio": 0.5, "method": "laptop-diff", "overrides": few("laptop_diff")},
    "prune-best": {"ratio": 0.5, "method": "prune-best", "overrides": few("prune_best"), "width_overrides": WIDTH},
    "linear-ffn": {"width_ratio": 0.5, "width_method": "linear-ffn", "width_overrides": WIDTH},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "original"
    deep("dit").save_pretrained(folder)  # type: ignore[operator]
    return folder


@contextmanager
def measuring(monkeypatch: pytest.MonkeyPatch, most: int = 10**9) -> Iterator[list[str]]:
    """Lists what is really measured inside; the one after `most` of them is never finished."""
    done: list[str] = []
    real = Context.remembered

    def remembered(self: Context, kind: str, units: Any, measure: Callable[[], Any]) -> Any:
        def counted() -> Any:
            if len(done) == most:
                raise KeyboardInterrupt
            done.append(json.dumps([kind, *units]))
            return measure()

        return real(self, kind, units, counted)

    with monkeypatch.context() as patched:
        patched.setattr(Context, "remembered", remembered)
        yield done


def contents(folder: Path) -> dict[str, bytes]:
    names = ("diffusion_pytorch_model.safetensors", "prune.json", "config.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_measures_only_what_is_left(
    name: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CASES[name]
    with measuring(monkeypatch) as whole:
        prune(original, out=tmp_path / "whole", **options)
    most = len(whole) - 2
    assert most > 0
    out, work = tmp_path / "out", tmp_path / ".out.work"
    with measuring(monkeypatch, most) as first, pytest.raises(KeyboardInterrupt):
        prune(original, out=out, **options)
    assert work.is_dir() and not out.exists()
    (file,) = work.rglob("trials.jsonl")
    file.write_bytes(file.read_bytes() + b'["[\\"torn')  # as a crash of the machine may leave it
    with pytest.raises(DitcompressError, match="E503"):
        prune(original, out=out, **options, seed=1)
    with pytest.raises(DitcompressError, match="E503"):
        prune(original, out=out, **options, dtype="bfloat16")
    with measuring(monkeypatch) as second:
        prune(original, out=out, **options)
    assert first == whole[:most] and second == whole[most:]
    assert contents(out) == contents(tmp_path / "whole") and not work.exists()


def test_a_run_that_was_killed_before_it_measured_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with measuring(monkeypatch, 0), pytest.raises(KeyboardInterrupt):
        prune(original, out=tmp_path / "out", **CASES["oracle-greedy"])
    assert list(tmp_path.iterdir()) == []


def test_measurements_of_one_run_are_made_once_and_keep_every_bit(tmp_path: Path) -> None:
    made = context("dit", deep("dit"))
    assert isinstance(made, Context) and WidthContext.remembered is Context.remembered
    made.journal = tmp_path
    value = [1 / 3, 1e-300, [0.1 + 0.2]]
    assert made.remembered("x", ["a"], lambda: value) == value
    assert made.remembered("x", ["a"], lambda: pytest.fail("measured twice")) == value
    again = context("dit", deep("dit"))
    again.journal = tmp_path
    assert again.remembered("x", ["a"], lambda: pytest.fail("measured twice")) == value
    assert again.remembered("x", ["a", "b"], lambda: 2) == 2 and again.remembered("y", ["a"], lambda: 3) == 3
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3


class Counting(Silent):
    """Remembers what every task was told."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, list[Any]] = {}

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        row = self.tasks.setdefault(description, [total, 0, ""])

        def advance(units: int = 1, said: str = "") -> None:
            row[1], row[2] = row[1] + units, said

        yield advance


@pytest.mark.parametrize("method", ["oracle-greedy", "fusegpt"])
def test_progress_counts_every_sweep(method: str) -> None:
    reporter = Counting()
    facts = prune(deep("dit"), 0.6, method=method, overrides=few(method.replace("-", "_")), reporter=reporter).facts
    assert len(facts["removed"]) == 3
    assert reporter.tasks["greedy removals"] == [3 + 2, 3 + 2, "3 of 3"]
    assert reporter.tasks["single removals"][:2] == [4, 4]
    assert fusegpt.NEEDS == ("probes", "training")
