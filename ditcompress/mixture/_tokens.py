"""Which expert every token of sampled images went to: what the page colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.conditions import Conditions
from ..calibration.trajectory import Sampling, StepRecord, sample
from ..runtime.blocks import member_of, members
from ..runtime.heads import HeadRouter
from ..runtime.moe import MoEFeedForward, Routing, routed_parts

LAYERS = 3  # shown: the first, the middle and the last


@dataclass(frozen=True)
class Tokens:
    """Samples (n, channels, height, width) of a model with expert layers, and the first choice of every token
    (n, rows, columns) by layer and timestep, -1 where it met none."""

    images: Tensor
    choices: Mapping[str, Mapping[float, Tensor]]


def grid(tokens: int, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of `tokens` patches of a latent (channels, height, width); None where they are no such grid."""
    if len(shape) != 3:
        return None
    rows = round((tokens * shape[1] / shape[2]) ** 0.5)
    fits = rows > 0 and tokens % rows == 0 and shape[1] % rows == 0 and shape[2] % (tokens // rows) == 0
    return (rows, tokens // rows) if fits else None


def followed(
    model: nn.Module, adapter: ModuleType, config: Mapping[str, Any], scheduler: Any, conditions: Conditions,
    sampling: Sampling, count: int,
) -> Tokens | None:  # fmt: skip
    """Sample `count` images; None where no layer routes tokens that form a grid. Of a guided pass the conditional half
    counts; the first, middle and last step are kept."""
    routed = routed_parts(model)
    layers = {p: m for p, m in routed.items() if isinstance(m, (MoEFeedForward, HeadRouter)) and m.active}
    shape = tuple(adapter.latent_shape(config))
    last: dict[str, tuple[Tensor, Tensor | None]] = {}
    known = members(model)
    kept: dict[str, dict[float, Tensor]] = {}
    steps = {0, sampling.steps // 2, sampling.steps - 1}

    def keeper(path: str) -> Callable[[Routing], None]:
        member = member_of(path, known)

        def keep(found: Routing) -> None:
            rows = None if member is None else member.rows
            last[path] = (found.chosen[:, 0].detach().cpu(), None if rows is None else rows.cpu())

        return keep

    def step(record: StepRecord) -> None:
        passes = 1 if record.null_output is None else 2
        for path, (chosen, rows) in last.items():
            every = passes * len(record.latents)
            rows = torch.arange(every) if rows is None else rows
            whole = torch.full((every, len(chosen) // len(rows)), -1)
            whole[rows] = chosen.reshape(len(rows), -1)
            own = whole[: len(record.latents)]
            place = grid(own.shape[1], shape)
            if record.index in steps and place is not None and own.shape[1] > 1:
                kept.setdefault(path, {})[float(record.timestep.flatten()[0])] = own.reshape(len(own), *place)
        last.clear()

    for path, layer in layers.items():
        layer.seen = keeper(path)
    one_pass = Sampling(sampling.steps, sampling.guidance, sampling.seed, batch=count)
    try:
        images = sample(model, adapter, config, scheduler, conditions, one_pass, indices=range(count), on_step=step)
    finally:
        for layer in layers.values():
            layer.seen = None
    paths = list(kept)
    places = sorted({round(i * (len(paths) - 1) / (LAYERS - 1)) for i in range(LAYERS)}) if paths else []
    return Tokens(images, {paths[i]: kept[paths[i]] for i in places}) if places else None
