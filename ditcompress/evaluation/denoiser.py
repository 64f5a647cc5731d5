"""T2, the denoiser: teacher-forced error of the prediction on the original's own held-out trajectories, by timestep.

The cheapest sensitive probe there is. The worst timestep is usually at low noise, where the signal is small, so the
curve is always reported, and the mean is weighted by how strongly the sampler uses each prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.schedulers import sampler_weights
from ..calibration.trajectory import StepRecord, prepare
from ..console import Reporter
from ..measures import ratio_db
from ..ranks import ALONE, Ranks
from ..result import Measurement
from .intervals import bca_interval
from .subject import Subject

SHIFTED = 8  # inputs that are also compared with the neighbouring timesteps


@dataclass(frozen=True)
class Probe:
    """Errors of one branch at the probed steps: `noise` and `signal` (steps, inputs) are squared norms, `dot` the inner
    products of both predictions. `shifted` (steps, 3): mean relative error against the original at one timestep less,
    at the same and at one more (NaN where that leaves the schedule)."""

    steps: list[int]
    timesteps: list[float]
    weights: np.ndarray  # (steps,) squared sampler coefficient
    noise: np.ndarray
    signal: np.ndarray
    dot: np.ndarray
    cosine: np.ndarray
    shifted: np.ndarray


def probed_steps(total: int, wanted: int) -> list[int]:
    """`wanted` step indices spread over the trajectory, first and last included."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(wanted, total))})


def probe(subject: Subject, reporter: Reporter, ranks: Ranks = ALONE, *, brief: bool = False) -> dict[str, Probe]:
    """The errors on `settings.inputs` held-out inputs, for the conditional and, under guidance, the null branch;
    `brief`: of the conditional branch alone, without the comparison with neighbouring timesteps.

    Of several processes each runs its images of every batch, and the first one has the result (the others: nothing)."""
    settings = subject.settings
    ready = partial(prepare, subject.scheduler, settings.steps, subject.adapter, subject.config)
    times, weights = sampler_weights(subject.scheduler, settings.steps, ready)
    chosen = probed_steps(len(times), settings.timesteps)
    images = max(1, math.ceil(settings.inputs / len(chosen)))
    branches = ["cond"] + (["null"] if subject.conditions.null is not None and not brief else [])
    tables: list[Tensor] = []  # a batch each: (inputs, branches, steps, 7)
    with reporter.task("denoiser (T2)", images) as advance:
        size = subject.sampling().batch
        for start in range(0, images, size):
            indices = list(range(start, min(start + size, images)))
            with ranks.together():
                own = ranks.own(indices)
                made = _of_images(subject, own, chosen, branches, 0 if brief else SHIFTED) if own else None
            table = ranks.undealt(made)
            if table is not None:
                tables.append(table)
            advance(len(indices))
    if not ranks.first:
        return {}
    return {
        branch: Probe(
            chosen,
            [times[step] for step in chosen],
            weights[chosen],
            *_columns([[table[:, place, step] for table in tables] for step in range(len(chosen))]),
            _mean_shifts(tables[0][:SHIFTED, place, :, 4:]),
        )
        for place, branch in enumerate(branches)
    }


def _of_images(subject: Subject, indices: list[int], chosen: list[int], branches: list[str], shifted: int) -> Tensor:
    """(inputs, branches, steps, 7) on the CPU: the columns of `_errors` and, for the images below `shifted`, of
    `_shifted`."""
    records: dict[int, StepRecord] = {}

    def keep(record: StepRecord) -> None:
        if record.index in chosen:
            records[record.index] = record

    subject.sample(subject.original, indices, on_step=keep)
    few = [index for index in indices if index < shifted]
    table = torch.full((len(indices), len(branches), len(chosen), 7), math.nan, dtype=torch.float64)
    for step, number in enumerate(chosen):
        for place, branch in enumerate(branches):
            table[:, place, step, :4] = _errors(subject, records[number], indices, branch)
            if few:
                table[: len(few), place, step, 4:] = _shifted(subject, records[number], few, branch)
    return table


def _mean_shifts(table: Tensor) -> np.ndarray:
    """(steps, 3) means of `_shifted` values (inputs, steps, 3)."""
    return np.array([[float(column.contiguous().mean()) for column in step.T] for step in table.unbind(1)])


def _columns(found: list[list[Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, inputs) arrays of the columns of `_errors`."""
    table = np.stack([torch.cat(parts).numpy() for parts in found])
    return table[..., 0], table[..., 1], table[..., 2], table[..., 3]


def _errors(subject: Subject, record: StepRecord, indices: list[int], branch: str) -> Tensor:
    """(inputs, 4): squared error, squared signal, inner product and cosine of each input at one step."""
    index = torch.tensor(indices)
    timestep = torch.as_tensor(record.timestep).expand(len(indices))
    latents, null = record.model_input, branch == "null"
    reference = subject.predict(subject.original, latents, timestep, index, null).double().flatten(1)
    output = subject.predict(subject.compressed, latents, timestep, index, null).double().flatten(1)
    noise, signal = (output - reference).square().sum(1), reference.square().sum(1)
    dot = (output * reference).sum(1)
    cosine = dot / (output.norm(dim=1) * reference.norm(dim=1)).clamp_min(1e-300)
    return torch.stack([noise, signal, dot, cosine], 1)


def _shifted(subject: Subject, record: StepRecord, indices: list[int], branch: str) -> Tensor:
    """(inputs, 3): relative error of the compressed prediction against the original at timestep - 1, + 0 and + 1."""
    index, last = torch.tensor(indices), float(subject.scheduler.config.get("num_train_timesteps", 1000)) - 1
    latents, time = record.model_input[: len(indices)], float(record.timestep)

    def predict(model: nn.Module, at: float) -> Tensor:
        timestep = torch.full((len(indices),), at).to(record.timestep.dtype)
        return subject.predict(model, latents, timestep, index, branch == "null").double().flatten(1)

    output = predict(subject.compressed, time)
    found = torch.full((len(indices), 3), math.nan, dtype=torch.float64)
    for column, shift in enumerate((-1, 0, 1)):
        if 0 <= time + shift <= last:
            reference = predict(subject.original, time + shift)
            found[:, column] = (output - reference).square().sum(1) / reference.square().sum(1)
    return found


def off_by_one(found: dict[str, Probe]) -> int:
    """-1 or +1 where the compressed model answers to the timestep before or after the one it is given, else 0: at most
    steps its error against that neighbour is under half of its error against the original at the same timestep."""
    table = np.concatenate([p.shifted for p in found.values()])
    for shift, column in ((-1, 0), (1, 2)):
        known = ~np.isnan(table[:, column])
        closer = table[known, column] < 0.5 * table[known, 1]
        if known.any() and closer.mean() >= 0.75:
            return shift
    return 0


def measurements(found: dict[str, Probe], seed: int) -> list[Measurement]:
    """The sampler-weighted SQNR (over inputs and branches) and that of the worst probed timestep."""
    noise = np.concatenate([p.noise for p in found.values()], 1)
    signal = np.concatenate([p.signal for p in found.values()], 1)
    first = next(iter(found.values()))
    images = noise.shape[1]
    identical = not noise.any()
    finite = np.isfinite(noise).all()
    weights = first.weights if first.weights.sum() > 0 else np.ones_like(first.weights)
    table = np.concatenate([noise, signal]).T  # (inputs, 2 * steps)

    def weighted(rows: np.ndarray) -> float:
        n, s = rows[:, : len(weights)].mean(0), rows[:, len(weights) :].mean(0)
        return ratio_db(float((weights * n).sum() / (weights * s).sum()))

    per_step = [ratio_db(float((n / s).mean())) for n, s in zip(noise, signal, strict=True)]
    worst = int(np.argmin(per_step))
    value = low = high = None
    if finite and not identical:
        value = weighted(table)
        low, high = bca_interval(table, weighted, seed) if images > 1 else (None, None)
    worst_value = None if identical or not finite else per_step[worst]
    worst_low = worst_high = None
    if worst_value is not None and images > 1:
        ratios = (noise[worst] / signal[worst])[:, None]
        worst_low, worst_high = bca_interval(ratios, lambda r: ratio_db(float(r.mean())), seed)
    gain = None
    gain_low = gain_high = None
    if finite and not identical:
        gain, gain_low, gain_high = _gain_error(found, weights, seed)
    label = f"SQNR at the worst timestep (t = {first.timesteps[worst]:.0f})"
    return [
        Measurement("sqnr_weighted", "denoiser SQNR, sampler-weighted", "T2", "dB", True, value, low, high,
                    n=noise.size, identical=identical, note="" if finite else "outputs are not finite"),
        Measurement("gain_error", "gain of the denoiser, off by", "T2", "%", False, 0.0 if identical else gain,
                    gain_low, gain_high, n=images, identical=identical),
        Measurement("sqnr_worst", label, "T2", "dB", True, worst_value, worst_low, worst_high, n=images,
                    identical=identical),
    ]  # fmt: skip


def _gain_error(found: dict[str, Probe], weights: np.ndarray, seed: int) -> tuple[float, float, float]:
    """How far the sampler-weighted slope of the compressed prediction over the original's is from 1, in per cent.

    Rounding adds noise but hardly any gain; a wrong scale shows here long before it shows in an SQNR.
    """
    dot = np.concatenate([p.dot for p in found.values()], 1)
    signal = np.concatenate([p.signal for p in found.values()], 1)
    steps = len(weights)

    def slope(rows: np.ndarray) -> float:
        d, s = rows[:, :steps].mean(0), rows[:, steps:].mean(0)
        return 100 * (float((weights * d).sum() / (weights * s).sum()) - 1)

    table = np.concatenate([dot, signal]).T
    value = slope(table)
    low, high = bca_interval(table, slope, seed) if len(table) > 1 else (math.nan, math.nan)
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return abs(value), least, max(abs(low), abs(high))


def curve(found: dict[str, Probe]) -> list[dict[str, Any]]:
    """SQNR over timesteps with the 5 to 95 % band over inputs, one record a branch and timestep."""
    rows = []
    for branch, p in found.items():
        for place, time in enumerate(p.timesteps):
            ratios = np.percentile(
                p.noise[place] / p.signal[place], (95, 50, 5)
            )  # before dB: zeros become infinite there
            low, middle, high = (ratio_db(float(r)) for r in ratios)
            rows.append(
                {
                    "branch": branch,
                    "timestep": time,
                    "sqnr_db": ratio_db(float((p.noise[place] / p.signal[place]).mean())),
                    "p05": low,
                    "p50": middle,
                    "p95": high,
                    "cosine": float(p.cosine[place].mean()),
                    "weight": float(p.weights[place]),
                    "n": int(p.noise.shape[1]),
                }
            )
    return rows
