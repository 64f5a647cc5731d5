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
from torch import multiprocessing, nn

from ditcompress import api
from ditcompress.distill import trainer
from ditcompress.distill.settings import Settings
from ditcompress.distill.sharded import asked, shard, whole
from ditcompress.distill.student import _check_sharded
from ditcompress.distill.trainer import Plain
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.ranks import ALONE, Ranks

from ..processes import in_two
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


DIVIDED = {**FEW, "steps": 4, "ema": 0.9, "accumulate": 2, "save_every": 2, "checkpointing": True}


def distilled(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A student whose weights are divided, as under `accelerate launch --use_fsdp`."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    try:
        made = api.distill(digits_folder(), folder / "student", folder / "two", **DIVIDED)
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]
    return {"losses": made.history.losses}


def states(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A run of divided weights that goes on from a state of its own, and from that of one process."""
    facts: dict[str, Any] = {}
    for name in ("whole", "own"):
        journal = folder / name
        journal.mkdir(exist_ok=True)
        ranks.share(None)
        losses = []
        for steps in (3, 6):
            task = Fit(ranks, divided=True)
            losses = list(trainer.train(task, settings(steps), journal=journal, ranks=ranks).losses)
        facts[name] = losses
        facts[f"{name} sum"] = float(whole(task.net[0].weight).double().sum())
        facts["part"] = task.net[0].weight.to_local().numel()
    refused: dict[str, str] = {}
    for name, value in (("FSDP_OFFLOAD_PARAMS", "true"), ("ACCELERATE_USE_FSDP", "true")):
        os.environ[name] = value
    try:
        asked(ranks)
    except DitcompressError as error:
        refused["offload"] = error.code
    del os.environ["FSDP_OFFLOAD_PARAMS"], os.environ["ACCELERATE_USE_FSDP"]
    return {**facts, **refused, "asked": asked(ranks)}


class Fit(Plain):
    """A small regression; each process takes its rows."""

    def __init__(self, ranks: Ranks, divided: bool) -> None:
        torch.manual_seed(0)
        self.ranks, self.net = ranks, nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
        if divided:
            shard(self.net, ["0", "1"])

    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.net.named_parameters())

    def loss(self, step: int, part: int) -> torch.Tensor:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))[self.ranks.rows(4)]
        return self.net(x).square().mean()


def settings(steps: int) -> Settings:
    return Settings(steps=steps, batch=4, learning_rate=1e-2, schedule="constant", ema=0.5, save_every=3)


def test_two_processes_that_divide_the_weights_are_one_and_leave_whole_states(tmp_path: Path) -> None:
    shortened(digits_folder() / "transformer", tmp_path / "student", [0, 4, 8])
    one = api.distill(digits_folder(), tmp_path / "student", tmp_path / "one", **DIVIDED)
    (tmp_path / "whole").mkdir()
    trainer.train(Fit(ALONE, divided=False), settings(3), journal=tmp_path / "whole")
    both = in_two(tmp_path, [states, distilled])
    for facts in both["distilled"]:
        assert facts["losses"] == pytest.approx(list(one.history.losses), rel=1e-4)
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two")]
    assert {n: t.shape for n, t in weights[0].items()} == {n: t.shape for n, t in weights[1].items()}
    far = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    moved = load_file(tmp_path / "student" / WEIGHTS)
    assert far < 0.05 * max((weights[0][name] - moved[name]).abs().max().item() for name in moved)
    task = Fit(ALONE, divided=False)
    wanted = list(trainer.train(task, settings(6)).losses)
    for facts in both["states"]:
        assert facts["whole"] == pytest.approx(wanted, rel=1e-5) and facts["own"] == pytest.approx(wanted, rel=1e-5)
        assert facts["own sum"] == pytest.approx(float(task.net[0].weight.detach().double().sum()), rel=1e-5)
        assert facts["part"] in (14, 21) and facts["offload"] == "E203" and facts["asked"] is False
    state = torch.load(tmp_path / "own" / "training.pt", weights_only=True)
    assert state["parameters"]["0.weight"].shape == (5, 7) and state["averages"]["0.weight"].shape == (5, 7)


def test_what_is_not_divided_is_refused() -> None:
    with pytest.raises(DitcompressError, match=r"E205 .*--lora: cannot be divided"):
        _check_sharded(nn.Linear(2, 2), 4)
    _check_sharded(nn.Linear(2, 2), 0)


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
