"""The one trainer: a loop over a task's loss, resumable to the same bits.

Everything random is drawn from (seed, step), so a run that was killed goes on from its last state and ends with the
weights of an uninterrupted one (on a CPU). A state holds the trained tensors, the optimiser and the moving averages.
Of several processes each trains on its part of the batch; gradients are averaged, the first one writes the states.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint.writer import damaged, os_errors
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..ranks import ALONE, Ranks
from .settings import Settings
from .sharded import divided, is_shard, part_like, whole

Log = Callable[[int, float, float], None]  # step, loss, learning rate


class Task(Protocol):
    """What is trained."""

    def parameters(self) -> Mapping[str, Tensor]:
        """The trained tensors by name, in a fixed order."""

    def rates(self) -> Mapping[str, float]:
        """Learning rates of those that have one of their own."""

    def loss(self, step: int, part: int) -> Tensor:
        """The loss of one batch; `part` counts the batches that are accumulated."""

    def after_step(self, step: int) -> None:
        """What follows an update."""

    def extra(self) -> dict[str, Tensor]:
        """Other tensors of the state (masks, counters)."""

    def restore(self, extra: Mapping[str, Tensor]) -> None:
        """Take `extra` back."""


class Plain:
    """The parts of a task that most leave empty."""

    def rates(self) -> Mapping[str, float]:
        return {}

    def after_step(self, step: int) -> None:
        """Nothing follows an update."""

    def extra(self) -> dict[str, Tensor]:
        return {}

    def restore(self, extra: Mapping[str, Tensor]) -> None:
        """There is nothing else."""


@dataclass(frozen=True)
class History:
    """Losses of all steps, also those before an interruption."""

    losses: tuple[float, ...]


def rate_at(step: int, settings: Settings) -> float:
    """Factor of the learning rate at a step, from 0."""
    rise = max(1, round(settings.warmup * settings.steps))
    if step < rise:
        return (step + 1) / rise
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, settings.steps - rise)))


def train(
    task: Task, settings: Settings, *, journal: Path | None = None, reporter: Reporter | None = None,
    ranks: Ranks = ALONE, log: Log | None = None,
) -> History:  # fmt: skip
    """Train to the last step; the task's tensors then hold the result (the averages with `ema`).

    E703 when the loss or a gradient is not finite: the last good state is put back and stays in `journal`.
    """
    parameters = task.parameters()
    optimizer = optimizer_of(settings, _groups(task, settings))
    averages = {name: tensor.detach().clone() for name, tensor in parameters.items()} if settings.ema else {}
    losses = _load(journal, task, optimizer, averages)
    with (reporter or Silent()).task("train", settings.steps) as advance:
        advance(len(losses))
        for step in range(len(losses), settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * rate_at(step, settings)
            value = _step(task, settings, optimizer, step, ranks)
            if not math.isfinite(value):
                kept = len(_load(journal, task, optimizer, averages))
                said = f"; the state of step {kept} is kept" if kept else ""
                raise DitcompressError(
                    "E703", f"training step {step}", "the loss is not finite", f"lower the learning rate{said}"
                )
            losses.append(value)
            task.after_step(step)
            for name, average in averages.items():
                average.lerp_(parameters[name].detach(), 1 - min(settings.ema, (step + 1) / (step + 10)))
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                if ranks.first or any(map(is_shard, parameters.values())):
                    _save(journal, task, optimizer, averages, losses, ranks.first)
                ranks.share(None)
            if log is not None:
                log(step, value, settings.learning_rate * rate_at(step, settings))
            advance(1, f"loss {value:.3g}")
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)
    return History(tuple(losses))


def optimizer_of(settings: Settings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, or that of bitsandbytes with 8-bit moments; E205 where its kernels do not run on the tensors' device."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    device = groups[0]["params"][0].device
    try:
        from bitsandbytes.optim import AdamW8bit

        trial = torch.ones(8192, device=device, requires_grad=True)
        trial.grad = torch.ones_like(trial)
        AdamW8bit([trial], lr=1e-3).step()
    except Exception as error:
        what = f"does not run on {device.type} here ({type(error).__name__})"
        raise DitcompressError("E205", "--optimizer adamw8bit", what, "use adamw") from None
    return AdamW8bit(groups, weight_decay=settings.weight_decay)  # type: ignore[no-any-return]


def _groups(task: Task, settings: Settings) -> list[dict[str, Any]]:
    own = task.rates()
    by_rate: dict[float, list[Tensor]] = {}
    for name, tensor in task.parameters().items():
        by_rate.setdefault(own.get(name, settings.learning_rate), []).append(tensor)
    return [{"params": tensors, "lr": rate, "base": rate} for rate, tensors in by_rate.items()]


def _step(task: Task, settings: Settings, optimizer: torch.optim.Optimizer, step: int, ranks: Ranks) -> float:
    """One update; the mean loss of all processes. NaN, and nothing is changed, where it or a gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for part in range(settings.accumulate):
        loss = task.loss(step, part) / settings.accumulate
        loss.backward()
        total += loss.item()
    total = ranks.mean(total, tensors[0].device)
    if not math.isfinite(total):
        return math.nan
    ranks.mean_([p.grad for p in tensors if p.grad is not None and not is_shard(p.grad)])
    norm = whole(nn.utils.clip_grad_norm_(tensors, settings.clip))
    if not bool(norm.isfinite()):
        return math.nan
    optimizer.step()
    return total


def _save(
    journal: Path | None, task: Task, optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor],
    losses: Sequence[float], first: bool = True,
) -> None:  # fmt: skip
    """One file, renamed into place; its losses are in it, so that it is whole or not there. Where tensors are divided
    all processes come, and the `first` one writes."""
    if journal is None:
        return
    state = {
        "parameters": whole(task.parameters(), first),
        "optimizer": whole(optimizer.state_dict(), first),
        "averages": whole(averages, first),
        "extra": task.extra(),
        "losses": json.dumps(list(losses)),
    }
    if not first:
        return
    part = journal / "training.part"
    with os_errors(part), open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, journal / "training.pt")


def _load(
    journal: Path | None, task: Task, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]
) -> list[float]:
    """Put the last state back; the losses up to it, [] where there is none."""
    if journal is None or not (journal / "training.pt").exists():
        return []
    file = journal / "training.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise damaged(file, error) from None
    with torch.no_grad():
        for name, tensor in task.parameters().items():
            tensor.copy_(part_like(state["parameters"][name], tensor))
        for name in averages:
            averages[name].copy_(part_like(state["averages"][name], averages[name]))
    rates = [group["base"] for group in optimizer.param_groups]
    optimizer.load_state_dict(divided(state["optimizer"], optimizer))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["base"] = rate  # a run that diverged may go on with a lower one
    task.restore(state["extra"])
    return list(json.loads(state["losses"]))
