"""Teacher-student losses by name; each is relative, so that weights between them mean the same for every model.

But for `feature_loss` they are means over samples, so that processes with a part of the batch each can average them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DitcompressError
from ..registry import nearest

SIGMA = 2.0  # TinyFusion: 2 is best, 0.1 diverges, 4 is no worse


def output_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over samples of the squared error over the squared norm of the teacher's, in any prediction type, times
    `weights` (n,) where these are given."""
    error = (student - teacher).flatten(1).square().sum(1)
    relative = error / teacher.flatten(1).square().sum(1).clamp_min(1e-12)
    return (relative if weights is None else relative * weights).mean()


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks of the relative squared error of their outputs (VQ4DiT's L_d, normalised)."""
    parts = [(s - t).square().sum() / t.square().sum().clamp_min(1e-12) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()


def plain_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """BK-SDM's sum of squared errors over all blocks, in units of the teacher's: blocks weigh by their energy."""
    error = torch.stack([_squares(s - t) for s, t in zip(student, teacher, strict=True)])  # (blocks, samples)
    return (error.sum(0) / torch.stack([_squares(t) for t in teacher]).sum(0).clamp_min(1e-12)).mean()


def normalised_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """LAPTOP-Diff's: each block's squared error over the squared norm of the teacher's there, mean over blocks."""
    return torch.stack([output_loss(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def masked_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """`normalised_features` without massive activations: values beyond SIGMA standard deviations of the teacher's
    sample are left out in both (TinyFusion section 3.3 masks each by its own: a student's outlier costs nothing)."""
    parts = []
    for found, wanted in zip(student, teacher, strict=True):
        flat = wanted.flatten(1)
        mask = (flat - flat.mean(1, keepdim=True)).abs() < SIGMA * flat.std(1, keepdim=True)
        parts.append(output_loss(found.flatten(1) * mask, flat * mask))
    return torch.stack(parts).mean()


def direction_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """PPCL's: squared distance of unit vectors, one for each token: 2 (1 - cosine), mean over tokens and blocks."""
    parts = [
        (nn.functional.normalize(s, dim=-1) - nn.functional.normalize(t, dim=-1)).square().sum(-1).mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).mean()


def _squares(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)


FEATURES: Mapping[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "features": plain_features,
    "normalised": normalised_features,
    "masked": masked_features,
    "direction": direction_features,
}
NAMES = ("output", "clean", "task", *FEATURES)


def parse_loss(text: str) -> dict[str, float]:
    """`output=1,masked=0.1` as weights by name, without zeros; E201 for an unknown name, E203 for a bad weight."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if name not in NAMES:
            raise DitcompressError("E201", f"--loss {text}", f"there is no loss {name!r}", nearest(name, list(NAMES)))
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = -1.0
        if not 0 <= weight < float("inf") or name in found:
            raise DitcompressError(
                "E203", f"--loss {text}", f"{part!r} is no weight", "for example output=1,masked=0.1"
            )
        found[name] = weight
    found = {name: weight for name, weight in found.items() if weight}
    if not found:
        raise DitcompressError("E203", f"--loss {text}", "every weight is 0", "for example output=1")
    return found


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
