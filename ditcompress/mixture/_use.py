"""What expert layers cost and how they are used: operations of a token, share of the tokens of each expert, over all
states and by timestep and class (the analyses of DiT-MoE, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.data import Batch
from ..experts import ExpertLayer
from ..measures import ratio_db
from ..models.base import Layout
from ..routed import RoutedPart, width_of
from ..runtime.blocks import member_of, members
from ..runtime.moe import MoEFeedForward, Routing, routed_parts

MOST_CLASSES = 32  # rows of the table by class: those that most states have


def token_operations(layer: MoEFeedForward) -> tuple[int, int]:
    """Operations of one token, two for each multiply and add, in the dense layer and in this one with its router."""

    def products(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters() if p.dim() == 2)

    shared, each = 2 * products(layer.shared), 2 * products(layer.experts[0])
    dense = shared + (1 if layer.copies else len(layer.experts)) * each
    if layer.dense is not None:
        dense = round(layer.dense * each)
    return dense, shared + layer.active * each + 2 * layer.router.weight.numel()


def linear_operations(
    layout: Layout, specs: Mapping[str, ExpertLayer], routed: Mapping[str, RoutedPart]
) -> tuple[int, int]:
    """Operations of the blocks' linears for one token, before and after, on average over the routing and without the
    routers' own; `layout` is the dense model's. The products of the attention itself are not counted."""
    runs, names = dict.fromkeys(layout.blocks, 1.0), {site.name for site in layout.sites}
    kept = {f"{path}.": spec.active_neurons / spec.neurons for path, spec in specs.items()}
    extra = 0.0
    for path, part in routed.items():
        if part.kind == "blocks":
            owner, _, first = path.rpartition(".")
            runs |= {f"{owner}.{int(first) + n}": part.active / part.count for n in range(part.count)}
        elif part.kind == "groups":
            if f"{path}.to_add_out" not in names:  # keys and values of a text without outputs: every group has all
                kept |= {f"{path}.add_q_proj": 0.0, f"{path}.add_": 1.0}
            kept[f"{path}."] = part.active / part.count
        elif part.kind == "heads":
            if f"{path}.to_add_out" not in names:
                kept[f"{path}.add_q_proj"] = 0.0
            share = (len(part.shared) + part.active) / (len(part.shared) + part.count)
            kept |= {f"{path}.to_out.": share, f"{path}.to_add_out": share}
        else:
            extra += 2 * part.active * width_of(layout, path) ** 2
    dense = active = 0.0
    for site in layout.sites:
        if site.block:
            operations = 2 * site.in_features * site.out_features
            share = next((value for prefix, value in kept.items() if site.name.startswith(prefix)), 1.0)
            dense += operations
            active += operations * share * runs[site.block]
    return round(dense), round(active + extra)


class Use:
    """Counts the choices of every layer of a model while it runs on batches; `close` takes the counters off."""

    def __init__(self, model: nn.Module) -> None:
        self.layers, self.members = routed_parts(model), members(model)
        self.mass = {path: torch.zeros(m.count, dtype=torch.float64) for path, m in self.layers.items()}
        self.rows: dict[str, list[Tensor]] = {path: [] for path in self.layers}  # (n, E) choices by sample
        self.none, self.tokens = dict.fromkeys(self.layers, 0), dict.fromkeys(self.layers, 0)
        self.times: list[Tensor] = []
        self.classes: list[Tensor] = []
        self.size = 0
        for path, layer in self.layers.items():
            layer.seen = self._keeper(path)

    def _keeper(self, path: str) -> Callable[[Routing], None]:
        experts, member = len(self.mass[path]), member_of(path, self.members)

        def keep(found: Routing) -> None:
            rows = torch.arange(self.size) if member is None or member.rows is None else member.rows.cpu()
            chosen = found.chosen.detach().reshape(len(rows), -1).cpu()
            counts = torch.zeros(len(rows), experts + 1, dtype=torch.float64)  # the last column: no expert
            counts.scatter_add_(1, chosen % (experts + 1), torch.ones(chosen.shape, dtype=torch.float64))
            self.rows[path][-1][rows] += counts[:, :experts]
            self.none[path] += int((found.chosen < 0).all(-1).sum())
            self.tokens[path] += len(found.chosen)
            self.mass[path] += found.probabilities.detach().double().sum(0).cpu()

        return keep

    def next(self, batch: Batch) -> None:
        """What runs from now on are the n states of `batch`."""
        self.size = len(batch.latents)
        for path, rows in self.rows.items():
            rows.append(torch.zeros(self.size, len(self.mass[path]), dtype=torch.float64))
        self.times.append(batch.timestep.reshape(-1).expand(self.size).double().cpu())
        labels = batch.cond.get("class_labels")
        if labels is not None:
            self.classes.append(labels.reshape(-1).cpu())

    def close(self) -> None:
        """Leave the layers without counters."""
        for layer in self.layers.values():
            layer.seen = None

    def by_layer(self) -> dict[str, dict[str, Any]]:
        """Share of the assignments of each expert, the load of the busiest and of the idlest against an even one, the
        balance loss (1 is even), and the share of tokens that no expert took."""
        use = {}
        for path in self.layers:
            experts = len(self.mass[path])
            share = _share(torch.cat([torch.zeros(1, experts, dtype=torch.float64), *self.rows[path]]))
            mean = self.mass[path] / self.mass[path].sum().clamp_min(1e-20)
            use[path] = {
                "use": [round(float(value), 6) for value in share],
                "busiest": float(share.max()) * experts,
                "idlest": float(share.min()) * experts,
                "balance": float(experts * (share * mean).sum()),
                "without": self.none[path] / max(1, self.tokens[path]),
            }
        return use

    def tables(self) -> dict[str, dict[str, Any]]:
        """ "timestep" and, of class-conditional models, "class": the `values` and, by layer, the share of every expert
        (values, experts). Layers that never route have no rows."""
        found = {"timestep": self._table(torch.cat(self.times), None)}
        if self.classes:
            found["class"] = self._table(torch.cat(self.classes), MOST_CLASSES)
        return found

    def _table(self, keys: Tensor, most: int | None) -> dict[str, Any]:
        values, counts = keys.unique(return_counts=True)
        if most is not None and len(values) > most:
            values = values[counts.argsort(descending=True, stable=True)[:most]].sort().values
        layers = {
            path: [[round(float(x), 4) for x in _share(torch.cat(rows)[keys == value])] for value in values]
            for path, rows in self.rows.items()
            if any(bool(part.any()) for part in rows)
        }
        return {"values": [round(v, 4) for v in values.tolist()], "layers": layers}


def _share(rows: Tensor) -> Tensor:
    return rows.sum(0) / rows.sum().clamp_min(1)


@torch.no_grad()
def measured(
    dense: nn.Module, sparse: nn.Module, adapter: Any, batches: Sequence[Batch]
) -> tuple[float, dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Output SQNR in dB (of the mean relative squared error), the use of each layer's experts, and the same by timestep
    and class (see `Use`)."""
    use, errors = Use(sparse), []
    try:
        for batch in batches:
            use.next(batch)
            y = adapter.predict(dense, batch.latents, batch.timestep, batch.cond).float().flatten(1)
            z = adapter.predict(sparse, batch.latents, batch.timestep, batch.cond).float().flatten(1)
            errors.append((z - y).square().sum(1) / y.square().sum(1).clamp_min(1e-20))
    finally:
        use.close()
    return ratio_db(float(torch.cat(errors).mean())), use.by_layer(), use.tables()
