"""Time of linears, blocks, a forward pass and a whole sampling of both models, with the packed weights running.

Both models run in turns, so that a busy machine slows both; p50 and p95 are over repeats. A layer that is slower than
the original's is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..runtime.linear import PackedLinear
from .cost import one_forward
from .subject import Subject

REPEATS, LEAST = 15, 3
BUDGET_S = 3.0  # for one row of the table and model; repeats stop there
SAMPLING_S = 20.0  # a whole sampling that would take longer is not run twice
SLOWER = 1.05

Times = dict[str, list[float]]


def speed(subject: Subject) -> dict[str, Any]:
    """The whole table; ratios are original over compressed, above 1 is faster."""
    models = {"original": subject.original, "compressed": subject.compressed}
    forwards = [
        {"batch": batch, **_row(_in_turns({n: one_forward(subject, m, batch) for n, m in models.items()}, subject))}
        for batch in subject.settings.cost_batches
    ]
    batch = max(subject.settings.cost_batches)
    packed = [name for name, m in subject.compressed.named_modules() if isinstance(m, PackedLinear)]
    blocks = list(subject.adapter.layout(subject.original).blocks)
    inside = {name: _inside(subject, model, packed + blocks, batch) for name, model in models.items()}
    linears = [
        {"name": name, **_row({model: times[name] for model, times in inside.items()})}
        for name in packed
        if all(name in times for times in inside.values())
    ]
    per_block = {model: [t for b in blocks for t in times.get(b, [])] for model, times in inside.items()}
    per_linear = {model: [t for n in packed for t in times.get(n, [])] for model, times in inside.items()}
    decoded = [m for m in subject.compressed.modules() if isinstance(m, PackedLinear) and m.decodes]
    return {
        "device": subject.settings.device,
        "dtype": subject.settings.dtype,
        "batch": batch,
        "forward": forwards,
        "ratio": forwards[-1]["ratio"],
        "linear": _row(per_linear) if packed else None,
        "block": _row(per_block) if all(per_block.values()) else None,
        "sampling": _sampling(subject, models, batch, forwards[-1]),
        "slower": [
            {"name": row["name"], "ratio": row["ratio"]}
            for row in sorted(linears, key=lambda row: row["ratio"])
            if row["ratio"] < 1 / SLOWER
        ],
        "linears": len(linears),
        "warning": f"{len(decoded)} of {len(packed)} packed layers decode their weights at each call: "
        "no speed-up is claimed"
        if decoded
        else "",
    }


def _row(times: Times) -> dict[str, Any]:
    """p50 and p95 in seconds of both models, and the ratio of the p50s."""
    found = {
        name: {"p50": float(np.quantile(t, 0.5)), "p95": float(np.quantile(t, 0.95)), "n": len(t)}
        for name, t in times.items()
    }
    return {**found, "ratio": found["original"]["p50"] / max(found["compressed"]["p50"], 1e-12)}


def wait(device: str) -> None:
    """Until a GPU has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _in_turns(runs: dict[str, Callable[[], Any]], subject: Subject) -> Times:
    """Seconds of each run, in turns, after one warm-up; at least LEAST and at most REPEATS of each."""
    times: Times = {name: [] for name in runs}
    began = time.perf_counter()
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            wait(subject.settings.device)
            start = time.perf_counter()
            run()
            wait(subject.settings.device)
            if repeat:
                times[name].append(time.perf_counter() - start)
        if repeat >= LEAST and time.perf_counter() - began > BUDGET_S * len(runs):
            break
    return times


@contextmanager
def timed(model: nn.Module, names: Sequence[str], device: str) -> Iterator[Times]:
    """Seconds of each named module's calls."""
    times: Times = {}
    started: dict[str, float] = {}

    def before(name: str) -> Any:
        def hook(*_: Any) -> None:
            wait(device)
            started[name] = time.perf_counter()

        return hook

    def after(name: str) -> Any:
        def hook(*_: Any) -> None:
            wait(device)
            times.setdefault(name, []).append(time.perf_counter() - started[name])

        return hook

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def _inside(subject: Subject, model: nn.Module, names: Sequence[str], batch: int) -> Times:
    """Seconds of the named modules within forward passes."""
    run, began = one_forward(subject, model, batch), time.perf_counter()
    run()
    with timed(model, [n for n in names if has(model, n)], subject.settings.device) as times:
        for repeat in range(REPEATS):
            run()
            if repeat + 1 >= LEAST and time.perf_counter() - began > BUDGET_S:
                break
    return times


def has(model: nn.Module, name: str) -> bool:
    """Whether the model has a module of this path."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _sampling(
    subject: Subject, models: dict[str, nn.Module], batch: int, forward: dict[str, Any]
) -> dict[str, Any] | None:
    """Seconds of a whole sampling of `batch` images; None (said in the report) where it would take too long."""
    branches = 1 if subject.conditions.null is None else 2
    expected = subject.settings.steps * branches * (forward["original"]["p50"] + forward["compressed"]["p50"])
    if expected > SAMPLING_S:
        return None
    indices = [i % subject.conditions.count for i in range(batch)]
    times: Times = {name: [] for name in models}
    for _ in range(max(1, min(LEAST, int(SAMPLING_S / max(expected, 1e-9))))):
        for name, model in models.items():
            start = time.perf_counter()
            subject.sample(model, indices, batch=batch)
            wait(subject.settings.device)
            times[name].append(time.perf_counter() - start)
    return {"batch": batch, "steps": subject.settings.steps, **_row(times)}
