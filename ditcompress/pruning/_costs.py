"""What the removal of each unit saves: parameters, operations of one forward pass, or measured seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from ..models import Depth, account
from ..models.base import Layout
from ..offload import device_of

MEASURES = ("params", "flops", "latency")
REPEATS = 9


def parameters(model: nn.Module, layout: Layout) -> dict[str, float]:
    """Parameters of each block."""
    counts = dict.fromkeys(layout.blocks, 0.0)
    for entry in account(model, layout):
        if entry.block:
            counts[entry.block] += entry.params
    return counts


def operations(model: nn.Module, blocks: Sequence[str], forward: Callable[[], Any]) -> dict[str, float]:
    """Floating-point operations of each block in one forward pass: two for each multiply and add."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    counts = counter.get_flop_counts()
    root = type(model).__name__
    return {block: float(sum(counts.get(f"{root}.{block}", {}).values())) for block in blocks}


def seconds(model: nn.Module, blocks: Sequence[str], forward: Callable[[], Any]) -> dict[str, float]:
    """Median time of each block over REPEATS forward passes after one to warm up."""
    started: dict[str, float] = {}
    found: dict[str, list[float]] = {block: [] for block in blocks}
    device = device_of(model)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, now())

    def end(name: str) -> Callable[..., None]:
        return lambda *_: found[name].append(now() - started[name])

    handles = []
    for name in blocks:
        block = model.get_submodule(name)
        handles += [block.register_forward_pre_hook(begin(name)), block.register_forward_hook(end(name))]
    try:
        with torch.no_grad():
            for _ in range(REPEATS + 1):
                forward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: median(times[1:]) for name, times in found.items()}


def unit_costs(depth: Depth, by_block: Mapping[str, float]) -> dict[str, float]:
    """Cost of each unit: the sum over its blocks."""
    return {unit.name: sum(by_block[block] for block in unit.blocks) for unit in depth.units}
