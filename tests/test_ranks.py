"""Processes of a launcher: one that is lost is an error of the others, and only the first one speaks."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from ditcompress import api
from ditcompress.cli import app
from ditcompress.errors import DitcompressError
from ditcompress.ranks import ALONE, Ranks, joined
from ditcompress.recipe import load_recipe


def _left(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with joined(torch.device("cpu")) as (ranks, _):
        ranks.agree(None)
        if rank == 1:
            os._exit(0)  # as when the system kills it, but without a word to the test
        try:
            with ranks.together():
                pass
        except DitcompressError as error:
            Path(folder, "line").write_text(error.line())
    os._exit(0)


def test_a_process_that_is_lost_is_named_as_the_cause(tmp_path: Path) -> None:
    multiprocessing.start_processes(_left, (str(tmp_path),), nprocs=2, start_method="fork")
    assert (tmp_path / "line").read_text().startswith("error[E605 process-lost]: a process: ended without a word")


def test_alone_nothing_is_exchanged() -> None:
    assert ALONE.lead(lambda: 3) == ALONE.agree(3) == 3 and ALONE.own([1, 2]) == [1, 2] and ALONE.collect(4) == [4]
    with pytest.raises(ValueError, match="odd"), ALONE.together():
        raise ValueError("odd")
    other = Ranks(1, 3)
    other.leave()
    assert other.first and other.agree(5) == 5


def test_work_that_is_not_shared_is_refused_under_a_launcher(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DitcompressError, match=r"E203.*one process"):
        api.run_recipe(tiny_dit, load_recipe("tiny-w4a8"), dry_run=True)
    with pytest.raises(DitcompressError, match=r"E203.*one process"):
        api.demo()
    commands: list[Callable[[], object]] = [
        lambda: api.prune(tiny_dit, 0.5), lambda: api.moe(tiny_dit), lambda: api.plug(tiny_dit, tiny_dit),
        lambda: api.bench([tiny_dit]), lambda: api.q_sched(tiny_dit, tiny_dit, out, steps=4),
        lambda: api.sample(tiny_dit, out), lambda: api.export(tiny_dit, out),
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(DitcompressError, match=r"E203.*one process"):
            command()


def _called(rank: int, folder: str, arguments: list[str], port: int) -> None:
    """`ditcompress` in one of two processes of a launcher, its output in files."""
    where = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()})
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w"), ["ditcompress", *arguments]
    code = app.run()
    Path(folder, f"code-{rank}").write_text(str(code))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def test_the_first_process_speaks_for_all(tiny_dit: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    few = ["--set", "calibration.samples=2", "--set", "calibration.steps=2", "--device", "cpu", "--json", "--quiet"]
    for code in (0, 5):  # the second time the output exists
        command = ["calibrate", str(tiny_dit), "-o", str(tmp_path / "result"), *few]
        multiprocessing.start_processes(_called, (str(tmp_path), command, port), nprocs=2, start_method="fork")
        said = {name: (tmp_path / name).read_text() for rank in (0, 1) for name in (f"out-{rank}", f"err-{rank}")}
        assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == [str(code)] * 2
        assert said["out-1"] == said["err-1"] == ""
        if code == 0:
            assert json.loads(said["out-0"])["inputs"] > 0 and said["err-0"] == ""
            for name in said:
                (tmp_path / name).unlink()
    assert json.loads(said["err-0"])["error"]["code"] == "E501" and said["err-0"].count("\n") == 1
