"""Routers and experts learn from the dense model: output loss, block features, and balanced use (Dense2MoE, section 3).

    L = output * L_out + clean * L_clean + features * L_feat + balance * mean over layers of E sum_e f_e P_e

Gates of one carry the gradient of the router's probability straight through, so that training keeps the layer as it
runs. The teacher is the dense model, on states of its own trajectories (distill/data.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..distill.comparison import Imitating
from ..distill.data import Data
from ..models.base import Layout
from ..routed import RoutedPart
from ..runtime.blocks import BlockRouter
from ..runtime.heads import GroupRouter, HeadRouter
from ..runtime.moe import MoEFeedForward, Routed, Router, Routing, balance_loss, routed_parts
from ..runtime.task_mask import TaskMask
from ._blocks import outside_groups
from ._prior import STEPS, prior_loss
from ._stages import Name, parts_of


@dataclass(frozen=True)
class Weights:
    """Weights of the losses, the router's learning rate, whether the shared experts learn too, and whether the balance
    losses of the layers are averaged (Dense2MoE) or added (DiT-MoE); `prior` is that of Switch-DiT, for its masks,
    `task` the diffusion loss where the data are real. `everything`: all of the model learns, not its routed parts
    alone. `clean`: of the output loss in units of the clean latents (distill/noising.py)."""

    output: float = 1.0
    features: float = 1.0
    clean: float = 0.0
    balance: float = 0.01
    router_rate: float = 1e-3
    shared: bool = True
    balance_over: Literal["mean", "sum"] = "mean"
    prior: float = 1.0
    task: float = 1.0
    everything: bool = False


class Experts(Imitating):
    """The training task: the student is the dense model with routed parts, trained in place. These are trained, and
    what they route: attentions whose heads are, blocks of a group. In a `stage` before the last (mixture/_stages.py)
    only parts of the feed-forwards are; its batches are those of steps from `start` on."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, layout: Layout, data: Data, weights: Weights, batch: int,
        routed: Mapping[str, RoutedPart] | None = None, stage: Name = "all", start: int = 0,
        clean_weights: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.parts, self.start = parts_of(stage), start
        blocks = outside_groups(layout, routed or {}) if self.parts is None else layout.blocks
        super().__init__(teacher, student, data, batch, blocks if weights.features else ())
        self.clean_weights = clean_weights if weights.clean else None
        self.weights = weights
        self.layers = routed_parts(student)
        self.routings: dict[type, list[Routing]] = {}  # by kind of part: blocks are balanced apart from experts
        for layer in self.layers.values():
            if layer.balanced:
                layer.seen = self.routings.setdefault(type(layer), []).append
        self.masks = [m for m in self.layers.values() if isinstance(m, TaskMask)]
        self.embeddings = self._embeddings() if weights.prior else {}
        for tensor in self.parameters().values():
            tensor.requires_grad_(True)

    @torch.no_grad()
    def _embeddings(self) -> dict[int, Tensor]:
        """Of every timestep (STEPS, D), by what embeds it, which is not trained."""
        device = next(self.student.parameters()).device
        return {id(m.time): m.time.at(torch.arange(STEPS, device=device)) for m in self.masks}

    def parameters(self) -> dict[str, Tensor]:
        if self.weights.everything and self.parts is None:
            return self._inside("")
        found: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            for owner in _trained_with(path, layer) if self.parts is None else ():
                found |= self._inside(owner)
            if self.parts is not None and isinstance(layer, MoEFeedForward):
                starts = tuple(f"{path}.{part}" for part in self.parts)
                found |= {name: tensor for name, tensor in self._inside(path).items() if name.startswith(starts)}
        return found

    def _inside(self, path: str) -> dict[str, Tensor]:
        module = self.student.get_submodule(path)
        found: dict[str, Tensor] = {}
        for name, part in module.named_modules():
            if isinstance(part, Router):
                start = ".".join(filter(None, (path, name)))
                found |= {f"{start}.{stored}": getattr(part, stored) for stored in part.STORED}
        for name, parameter in module.named_parameters():
            if self.weights.shared or not name.startswith("shared."):
                found[".".join(filter(None, (path, name)))] = parameter
        return found

    def rates(self) -> dict[str, float]:
        routers = tuple(f"{path}." for path, m in self.student.named_modules() if isinstance(m, Router))
        return {name: self.weights.router_rate for name in self.parameters() if name.startswith(routers)}

    def loss(self, step: int, part: int) -> Tensor:
        weights = self.weights
        for found in self.routings.values():
            found.clear()
        output, features = self.compare(self.start + step, part)
        loss = weights.output * output + weights.features * features
        if self.clean is not None:
            loss = loss + weights.clean * self.clean
        if self.task is not None:
            loss = loss + weights.task * self.task
        for kind, found in self.routings.items() if weights.balance else ():
            if not found or (self.parts is not None and kind is not MoEFeedForward):
                continue  # nothing is routed (all active, or none), or not yet
            every = torch.stack([balance_loss(r.probabilities, r.chosen) for r in found])
            loss = loss + weights.balance * (every.sum() if weights.balance_over == "sum" else every.mean())
        if self.masks and weights.prior:
            gates = [m.probabilities(self.embeddings[id(m.time)]) for m in self.masks]
            loss = loss + weights.prior * prior_loss(gates, self.masks[0].active)
        return loss

    def finish(self) -> None:
        """Leave the student as a plain model: no hooks, no gradients."""
        self.release()
        for layer in self.layers.values():
            layer.seen = None
        for tensor in self.parameters().values():
            tensor.requires_grad_(False)
            tensor.grad = None


def _trained_with(path: str, layer: Routed) -> list[str]:
    """Modules that learn with a routed part: itself, or the attention or the blocks that it belongs to."""
    owner = path.rpartition(".")[0]
    if isinstance(layer, (HeadRouter, GroupRouter)):
        return [owner]
    if isinstance(layer, BlockRouter):
        blocks, _, first = owner.rpartition(".")
        return [f"{blocks}.{int(first) + place}" for place in range(layer.count)]
    return [path]
