"""switch-dit: experts that the timestep chooses mask the input of every block (arXiv 2403.09176; runtime/task_mask.py).

The experts start at zero, so that the model is as it was until it is trained; training adds the diffusion prior loss
(mixture/_prior.py, weight 1). This gives capacity to timesteps, it does not remove any work.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from ..errors import DitcompressError
from ..formats.base import StrictParams
from ..models.base import Layout
from ..routed import TIMED, RoutedPart, family
from ..runtime.moe import Routed
from .base import Importance, Numbers

NEEDS: tuple[str, ...] = ()
NUMBERS = Numbers(experts=3, shared=0, active=2)


class Params(StrictParams):
    """`std`: standard deviation of the gates' weights."""

    std: float = Field(0.02, gt=0)


def routed(
    model: nn.Module, layout: Layout, numbers: Numbers, params: Params, importance: Importance
) -> dict[str, RoutedPart]:
    """A mask on every block."""
    family(model, TIMED)
    if numbers.shared:
        raise DitcompressError("E203", f"--shared {numbers.shared}", "the block itself always runs", "give --shared 0")
    experts, active = numbers.experts or 0, numbers.active or 0
    if not 0 < active <= experts:
        what = f"there are {experts} experts"
        raise DitcompressError("E203", f"--active {active}", what, f"give 1 to {max(1, experts)}")
    return {block: RoutedPart(kind="mask", count=experts, active=active) for block in layout.blocks}


def begin(part: Routed, params: Params, generator: torch.Generator) -> None:
    """Gates at random, experts at zero."""
    weight = part.router.weight
    weight.copy_(torch.randn(weight.shape, generator=generator) * params.std)
