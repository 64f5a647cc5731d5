"""What expert layers cost and how they are used: operations of a token, share of the tokens of each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.data import Batch
from ..measures import ratio_db
from ..runtime.moe import MoEFeedForward, Routing, feed_forwards


def token_operations(layer: MoEFeedForward) -> tuple[int, int]:
    """Operations of one token, two for each multiply and add, in the dense layer and in this one with its router."""

    def products(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters() if p.dim() == 2)

    shared, each = 2 * products(layer.shared), 2 * products(layer.experts[0])
    return shared + len(layer.experts) * each, shared + layer.active * each + 2 * layer.router.weight.numel()


@torch.no_grad()
def measured(
    dense: nn.Module, sparse: nn.Module, adapter: Any, batches: Sequence[Batch]
) -> tuple[float, dict[str, dict[str, Any]]]:
    """Output SQNR in dB (of the mean relative squared error), and per layer the share of the assignments of each
    expert, the load of the busiest against an even one, and the balance loss (1 is even)."""
    layers = feed_forwards(sparse)
    counts = {path: torch.zeros(len(m.experts), dtype=torch.float64) for path, m in layers.items()}
    mass = {path: torch.zeros(len(m.experts), dtype=torch.float64) for path, m in layers.items()}

    def keep(path: str) -> Any:
        def seen(found: Routing) -> None:
            counts[path] += torch.bincount(found.chosen.flatten(), minlength=len(counts[path])).double().cpu()
            mass[path] += found.probabilities.double().sum(0).cpu()

        return seen

    for path, layer in layers.items():
        layer.seen = keep(path)
    errors: list[Tensor] = []
    try:
        for batch in batches:
            y = adapter.predict(dense, batch.latents, batch.timestep, batch.cond).float().flatten(1)
            z = adapter.predict(sparse, batch.latents, batch.timestep, batch.cond).float().flatten(1)
            errors.append((z - y).square().sum(1) / y.square().sum(1).clamp_min(1e-20))
    finally:
        for layer in layers.values():
            layer.seen = None
    use = {}
    for path in layers:
        share = counts[path] / counts[path].sum().clamp_min(1)
        mean = mass[path] / mass[path].sum().clamp_min(1e-20)
        use[path] = {
            "use": [round(float(value), 6) for value in share],
            "busiest": float(share.max()) * len(share),
            "balance": float(len(share) * (share * mean).sum()),
        }
    return ratio_db(float(torch.cat(errors).mean())), use
