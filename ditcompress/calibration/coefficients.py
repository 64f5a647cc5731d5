"""Closed-form scheduler coefficients from the trajectories of the original model, no image decoded.

`gain` (the correlated term of PTQD, He et al. 2023, arXiv 2305.10657): c_eps[i] = <v_fp, v_q> / <v_q, v_q> at the
original's own states, c_x = 1. `trajectory` (ours): step by step the pair (c_eps[i], c_x[i]) that brings the next state
of the compressed model closest to the original's, given the pairs of the steps before.

Both are written as 1 + correction with the correction proportional to the difference of the models, so a model
against itself gives exactly 1.0 at every step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Reporter, Silent
from .conditions import Conditions
from .trajectory import Sampling, generator, initial_noise, predict_branches, prepare

METHODS = ("trajectory", "gain")
PROBE = 2.0**-4  # relative step of the difference quotients; a step without clipping is affine, so any would do
RIDGE = 1e-3  # pulls towards 1 where output and sample are nearly parallel (the first step from pure noise)
LEAST, MOST = 0.5, 1.5  # a coefficient outside is no repair of rounding


@dataclass(frozen=True)
class Drive:
    """Everything but the model: `scheduler` is the stock one."""

    adapter: ModuleType
    config: Mapping[str, Any]
    scheduler: Any
    conditions: Conditions
    sampling: Sampling


@dataclass
class _Run:
    """One batch under way: its own scheduler and its state."""

    drive: Drive
    images: Sequence[int]
    sampler: Any
    latents: Tensor

    def output(self, model: nn.Module, index: int) -> Tensor:
        """The guided output at the present state, float32."""
        sampling, conditions, time = self.drive.sampling, self.drive.conditions.take(self.images), self.time(index)
        scales = hasattr(self.sampler, "scale_model_input")
        scaled = self.sampler.scale_model_input(self.latents, time) if scales else self.latents
        guided = conditions.null is not None and sampling.guidance != 1
        timestep = torch.as_tensor(time).to(self.latents.device).expand(len(self.images))
        cond, null = predict_branches(model, self.drive.adapter, scaled, timestep, conditions, guided)
        return cond if null is None else null + sampling.guidance * (cond - null)

    def time(self, index: int) -> Any:
        return self.sampler.timesteps[index]

    def next(self, index: int, output: Tensor, latents: Tensor, *, trial: bool = False) -> Tensor:
        """The state after step `index`; a trial leaves the scheduler as it was. Its noise is that of `sample`."""
        sampler = copy.deepcopy(self.sampler) if trial else self.sampler
        extra: dict[str, Any] = {}
        if "generator" in inspect.signature(sampler.step).parameters:
            extra["generator"] = [generator(self.drive.sampling.seed, image, index) for image in self.images]
        stepped: Tensor = sampler.step(output, self.time(index), latents, **extra, return_dict=False)[0]
        return stepped.float()


def _runs(drive: Drive, indices: Sequence[int], device: torch.device) -> list[_Run]:
    """The batches at their starting noise, as in `sample`."""
    shape, made, size = drive.adapter.latent_shape(drive.config), [], drive.sampling.batch
    for start in range(0, len(indices), size):
        images = list(indices[start : start + size])
        sampler = prepare(drive.scheduler, drive.sampling.steps, drive.adapter, drive.config)
        noise = initial_noise(shape, drive.sampling.seed, images).to(device)
        made.append(_Run(drive, images, sampler, noise * float(getattr(sampler, "init_noise_sigma", 1.0))))
    return made


def gain(
    original: nn.Module, compressed: nn.Module, drive: Drive, indices: Sequence[int], reporter: Reporter | None = None
) -> tuple[list[float], list[float]]:
    """Least squares of the original's output on the compressed one's, at the original's states."""
    runs, found = _runs(drive, indices, next(original.parameters()).device), []
    with (reporter or Silent()).task("search", drive.sampling.steps) as advance, torch.no_grad():
        for index in range(drive.sampling.steps):
            top = bottom = 0.0
            for run in runs:
                ours, theirs = run.output(compressed, index), run.output(original, index)
                top += _dot(theirs - ours, ours)
                bottom += _dot(ours, ours)
                run.latents = run.next(index, theirs, run.latents)
            found.append(_bounded(1.0 + (top / bottom if bottom > 0 else 0.0)))
            advance(1)
    return found, [1.0] * len(found)


def trajectory(
    original: nn.Module, compressed: nn.Module, drive: Drive, indices: Sequence[int], reporter: Reporter | None = None
) -> tuple[list[float], list[float]]:
    """Greedy least squares of x_fp(i+1) on the compressed model's own step: (c_eps, c_x)."""
    device = next(original.parameters()).device
    targets, runs = _runs(drive, indices, device), _runs(drive, indices, device)
    gains, carried = [], []
    with (reporter or Silent()).task("search", drive.sampling.steps) as advance, torch.no_grad():
        for index in range(drive.sampling.steps):
            matrix, right = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
            outputs = []
            for target, run in zip(targets, runs, strict=True):
                target.latents = target.next(index, target.output(original, index), target.latents)
                outputs.append(run.output(compressed, index))
                _accumulate(matrix, right, run, index, outputs[-1], target.latents)
            a, b = _solve(matrix, right)
            for run, output in zip(runs, outputs, strict=True):
                run.latents = run.next(index, _times(output, a), _times(run.latents, b))
            gains.append(a)
            carried.append(b)
            advance(1)
    return gains, carried


def _accumulate(matrix: Tensor, right: Tensor, run: _Run, index: int, output: Tensor, target: Tensor) -> None:
    """Normal equations of target - step(v, x) on the derivatives of step(a v, b x) by a and b."""
    x = run.latents
    base = run.next(index, output, x, trial=True)
    columns = [
        (run.next(index, output * (1 + PROBE), x, trial=True) - base) / PROBE,
        (run.next(index, output, x * (1 + PROBE), trial=True) - base) / PROBE,
    ]
    for i, column in enumerate(columns):
        right[i] += _dot(target - base, column)
        for j, other in enumerate(columns):
            matrix[i, j] += _dot(column, other)


def _solve(matrix: Tensor, right: Tensor) -> tuple[float, float]:
    """1 + the ridge solution, with the ridge relative to each column's own size; where one coefficient meets its
    bound, the other is solved for again."""
    ridged = matrix + RIDGE * torch.diag(matrix.diagonal()) + 1e-30 * torch.eye(2, dtype=torch.float64)
    a, b = (_bounded(1.0 + value) for value in torch.linalg.solve(ridged, right).tolist())
    if a in (LEAST, MOST):
        b = _bounded(1.0 + float((right[1] - ridged[1, 0] * (a - 1.0)) / ridged[1, 1]))
    elif b in (LEAST, MOST):
        a = _bounded(1.0 + float((right[0] - ridged[0, 1] * (b - 1.0)) / ridged[0, 0]))
    return a, b


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first.double() * second.double()).sum())


def _bounded(value: float) -> float:
    return min(max(value, LEAST), MOST)
