"""Low-rank training: y + B A x beside every linear of the blocks, merged into the weights at the end.

LoRA (Hu et al. 2021) with alpha equal to the rank, so that its scale is 1. Vectors (norms, biases) of the blocks are
trained as they are: nearly free, and what pruning shifted most.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..calibration.trajectory import generator


def linears(model: nn.Module, blocks: Sequence[str], skip: Collection[str] = ()) -> dict[str, nn.Linear]:
    """The linears inside `blocks` by name, without those of the modules `skip`."""
    inside, without = tuple(f"{block}." for block in blocks), tuple(f"{name}." for name in skip)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and not f"{name}.".startswith(without)
    }


class Adapters:
    """Factors `down` (rank, in) and `up` (out, rank) of every linear inside `blocks`; `up` begins at zero.

    Their product counts `scale` times. Parts of the modules `skip` have none. While `enabled` is False the model is as
    it was."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], rank: int, seed: int, scale: float = 1.0,
        skip: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.scale, self.enabled = model, scale, True
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.handles: list[Any] = []
        for name, module in linears(model, blocks, skip).items():
            self._add(name, module, rank, seed)

    def _add(self, name: str, linear: nn.Linear, rank: int, seed: int) -> None:
        draw = generator(seed, len(self.factors), 3_000_000)
        rank = min(rank, *linear.weight.shape)
        down = torch.randn(rank, linear.in_features, generator=draw) * linear.in_features**-0.5
        device = linear.weight.device
        pair = (
            down.to(device).requires_grad_(True),
            torch.zeros(linear.out_features, rank, device=device, requires_grad=True),
        )
        self.factors[name] = pair

        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.enabled:
                return output
            change = functional.linear(functional.linear(arguments[0].to(pair[0].dtype), pair[0]), pair[1])
            return output + (self.scale * change).to(output.dtype)

        self.handles.append(linear.register_forward_hook(hook))

    def parameters(self) -> dict[str, Tensor]:
        """The factors by name."""
        found: dict[str, Tensor] = {}
        for name, (down, up) in self.factors.items():
            found |= {f"{name}.lora_down": down, f"{name}.lora_up": up}
        return found

    def merge(self) -> list[str]:
        """Put W + B A into the linears and remove the adapters; the names of the changed weights."""
        changes = self.changes()
        self.remove()
        with torch.no_grad():
            for name, change in changes.items():
                weight: Any = self.model.get_submodule(name).weight
                weight.add_(change.to(weight.dtype))
        return [f"{name}.weight" for name in changes]

    @torch.no_grad()
    def changes(self) -> dict[str, Tensor]:
        """What the adapters add to the weight (out, in) of each linear."""
        return {name: self.scale * (up @ down) for name, (down, up) in self.factors.items()}

    def remove(self) -> None:
        """Take the adapters off; the model is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.factors = [], {}
