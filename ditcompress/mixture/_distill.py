"""Routers and experts learn from the dense model: output loss, block features, and balanced use (Dense2MoE, section 3).

    L = output * L_out + features * L_feat + balance * mean over layers of E sum_e f_e P_e

Gates of one carry the gradient of the router's probability straight through, so that training keeps the layer as it
runs. The teacher is the dense model, on states of its own trajectories (distill/data.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..distill.comparison import Imitating
from ..distill.data import Trajectories
from ..models.base import Layout
from ..runtime.moe import Routing, balance_loss, feed_forwards


@dataclass(frozen=True)
class Weights:
    """Weights of the losses, the router's learning rate, whether the shared experts learn too, and whether the balance
    losses of the layers are averaged (Dense2MoE) or added (DiT-MoE)."""

    output: float = 1.0
    features: float = 1.0
    balance: float = 0.01
    router_rate: float = 1e-3
    shared: bool = True
    balance_over: Literal["mean", "sum"] = "mean"


class Experts(Imitating):
    """The training task: the student is the dense model with expert layers; only these are trained, in place."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, layout: Layout, data: Trajectories, weights: Weights, batch: int
    ) -> None:
        super().__init__(teacher, student, data, batch, layout.blocks if weights.features else ())
        self.weights = weights
        self.layers = feed_forwards(student)
        self.routings: list[Routing] = []
        for layer in self.layers.values():
            layer.seen = self.routings.append
        for tensor in self.parameters().values():
            tensor.requires_grad_(True)

    def parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            found |= {f"{path}.router.{name}": getattr(layer.router, name) for name in layer.router.STORED}
            for name, parameter in layer.named_parameters():
                if self.weights.shared or not name.startswith("shared."):
                    found[f"{path}.{name}"] = parameter
        return found

    def rates(self) -> dict[str, float]:
        return {name: self.weights.router_rate for name in self.parameters() if ".router." in name}

    def loss(self, step: int, part: int) -> Tensor:
        weights = self.weights
        self.routings.clear()
        output, features = self.compare(step, part)
        loss = weights.output * output + weights.features * features
        if self.routings and weights.balance:
            parts = [balance_loss(r.probabilities, r.chosen) for r in self.routings]
            every = torch.stack(parts)
            loss = loss + weights.balance * (every.sum() if weights.balance_over == "sum" else every.mean())
        return loss

    def finish(self) -> None:
        """Leave the student as a plain model: no hooks, no gradients."""
        self.release()
        for layer in self.layers.values():
            layer.seen = None
        for tensor in self.parameters().values():
            tensor.requires_grad_(False)
            tensor.grad = None
