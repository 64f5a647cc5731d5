"""Two processes with half of the batch each are one process with all of it; the first one writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from ditcompress import api
from ditcompress.evaluation.digits import digits_folder

from .models import cached, shortened

FEW: dict[str, Any] = {"steps": 6, "batch": 8, "images": 5, "sample_steps": 4, "refresh": 3, "device": "cpu",
                       "learning_rate": 1e-3, "loss": "output=1,normalised=0.1,features=0.1,direction=0.1"}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def train(rank: int, folder: str, options: dict[str, Any]) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = api.distill(digits_folder(), Path(folder) / "student", Path(folder) / "two", **options)
    (Path(folder) / f"losses-{rank}.json").write_text(json.dumps(result.history.losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("data", ["trajectories", "latents"])
def test_two_processes_are_one(tmp_path: Path, data: str) -> None:
    options = dict(FEW)
    if data == "latents":
        options |= {"data": str(cached(tmp_path / "latents")), "loss": "output=1,task=0.2", "accumulate": 2}
    shortened(digits_folder() / "transformer", tmp_path / "student", [0, 4, 8])
    one = api.distill(digits_folder(), tmp_path / "student", tmp_path / "one", **options)
    multiprocessing.spawn(train, (str(tmp_path), options), nprocs=2)
    found = [json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] == pytest.approx(list(one.history.losses), rel=1e-4)
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two")]
    far = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    moved = load_file(tmp_path / "student" / WEIGHTS)
    assert far < 0.05 * max((weights[0][name] - moved[name]).abs().max().item() for name in moved)
    assert not list(tmp_path.glob(".two*"))


def test_a_launcher_s_environment_is_joined_and_errors_reach_every_process(tmp_path: Path) -> None:
    shortened(digits_folder() / "transformer", tmp_path / "student", [0, 6])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    few = ["--steps", "2", "--batch", "4", "--images", "2", "--sample-steps", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "ditcompress", "distill", str(digits_folder()), str(tmp_path / "student"),
               "-o", str(tmp_path / "out"), *few]  # fmt: skip
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def both() -> list[tuple[int, str, str]]:
        children = [
            subprocess.Popen(command, env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]  # fmt: skip
        said = [child.communicate(timeout=200) for child in children]
        return [(child.returncode, *texts) for child, texts in zip(children, said, strict=True)]

    (code, out, _), (other, silence, _) = both()
    assert (code, other) == (0, 0) and "2 steps" in out and silence == ""
    assert (tmp_path / "out" / WEIGHTS).exists()
    assert [result[0] for result in both()] == [5, 5]  # the output exists
