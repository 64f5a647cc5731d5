"""Calibration tokens of feed-forwards with weights that make an error cost what it costs the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.sensitivity import token_weights
from ..distill.data import Trajectories
from ..models.base import Layout
from ..structure import readers


@dataclass(frozen=True)
class Weighed:
    """Inputs of one feed-forward (T, D) and what a squared error of its output costs there (T,)."""

    tokens: Tensor
    weights: Tensor


def weighed_tokens(
    model: nn.Module, layout: Layout, axes: Mapping[str, str], data: Trajectories,
    influence: Callable[[Tensor], Tensor], *, states: int, size: int, tokens: int, seed: int,
) -> dict[str, Weighed]:  # fmt: skip
    """At most about `tokens` of every feed-forward in `axes` (path and neuron axis), drawn from `states` states that
    run `size` at a time. A weight is the sensitivity of the model's output (calibration/sensitivity.py) times the
    `influence` (n,) of the prediction at timesteps (n,)."""
    sites = {path: readers(layout, axis)[0] for path, axis in axes.items()}
    alone = replace(layout, sites=tuple(sites.values()))
    seen: dict[str, list[Tensor]] = {}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in axes}

    def keeper(path: str) -> Any:
        return lambda module, args: seen.setdefault(path, []).append(args[0].detach())

    handles = [model.get_submodule(path).register_forward_pre_hook(keeper(path)) for path in axes]
    try:
        batches = -(-states // size)
        for number in range(batches):
            batch = data.batch(number, min(size, states - number * size))
            scale = influence(batch.timestep)
            seen.clear()
            found = token_weights(
                model, data.adapter, alone, batch.latents, batch.timestep, batch.cond, seed + 1009 * number
            )
            generator = torch.Generator().manual_seed(seed + number)
            for path, site in sites.items():
                for x, (_, weight) in zip(seen[path], found[site.input_key], strict=True):
                    each = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
                    each = each * scale.to(weight.device)[:, None]
                    rows, cost = x.reshape(-1, x.shape[-1]).float().cpu(), each.flatten().cpu()
                    chosen = torch.randperm(len(rows), generator=generator)[: -(-tokens // batches)]
                    kept[path].append((rows[chosen], cost[chosen]))
    finally:
        for handle in handles:
            handle.remove()
    return {path: Weighed(*(torch.cat(part) for part in zip(*parts, strict=True))) for path, parts in kept.items()}
