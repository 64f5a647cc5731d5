"""Teacher-student losses by name; each is relative, so that weights between them mean the same for every model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over samples of the squared error over the squared norm of the teacher's, in any prediction type."""
    error = (student - teacher).flatten(1).square().sum(1)
    return (error / teacher.flatten(1).square().sum(1).clamp_min(1e-12)).mean()


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks of the relative squared error of their outputs (VQ4DiT's L_d, normalised)."""
    parts = [(s - t).square().sum() / t.square().sum().clamp_min(1e-12) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()


class BlockOutputs:
    """The outputs of a model's blocks during a forward pass, in order."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.found: list[Tensor] = []
        self.handles = [model.get_submodule(name).register_forward_hook(self._keep) for name in blocks]

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        self.found += [part for part in parts if isinstance(part, Tensor)]

    def take(self) -> list[Tensor]:
        """The outputs since the last call."""
        found, self.found = self.found, []
        return found

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
