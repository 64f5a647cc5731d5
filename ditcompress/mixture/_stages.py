"""Training in stages (Dense2MoE, section 4 and the table of its stages): what learns when, and what runs meanwhile.

1. "shared": shared experts alone, no routed one runs; loss of outputs and of all blocks.
2. "experts": routed experts and their routers, the shared ones frozen; the balance loss is added.
3. "all": also groups of blocks, until now complete, skip some; everything learns that the one-stage training trains,
   and of the groups' blocks only the last ones are compared.

The paper gives no step counts: `--distill-steps` is split by SHARES, rounded, at least one step for every stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ..errors import DitcompressError
from ..runtime.blocks import BlockRouter
from ..runtime.moe import MoEFeedForward, Routed

Name = Literal["shared", "experts", "all"]
NAMES: tuple[Name, ...] = ("shared", "experts", "all")
SHARES = (0.2, 0.3, 0.5)  # ours
ONE = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Stage:
    """`steps` of training after the first `start` ones."""

    name: Name
    steps: int
    start: int


def stages_of(shares: Sequence[float], steps: int) -> list[Stage]:
    """Stages with a share above zero: each ends where the sum of the shares so far is nearest in steps, and has one
    step at least. E203 for fewer steps than stages."""
    wanted = [(name, share) for name, share in zip(NAMES, shares, strict=True) if share > 0]
    if steps < len(wanted):
        what = f"is fewer than the {len(wanted)} stages of the training"
        raise DitcompressError("E203", f"--distill-steps {steps}", what, "or --set training.stages=[0,0,1]")
    total, found, sum_, start = sum(shares), [], 0.0, 0
    for number, (name, share) in enumerate(wanted):
        sum_ += share
        left = len(wanted) - number - 1
        end = min(max(round(steps * sum_ / total), start + 1), steps - left)
        found.append(Stage(name, end - start, start))
        start = end
    return found


def check_stages(shares: Sequence[float], layers: Mapping[str, tuple[int, int]]) -> None:
    """E203 where a stage has nothing to train; `layers`: neurons of the shared expert and number of active routed ones
    of every feed-forward."""
    for place, name in enumerate(NAMES[:2]):
        if shares[place] > 0 and not any(numbers[place] for numbers in layers.values()):
            what = f"no feed-forward has anything that the stage {name!r} could train"
            raise DitcompressError("E203", "training.stages", what, "give 0 for it, or another --shared or --active")


def parts_of(name: Name) -> tuple[str, ...] | None:
    """How the names of the trained tensors inside an expert layer start in a stage; None for all of the training."""
    return {"shared": ("shared.", "bias"), "experts": ("experts.", "router."), "all": None}[name]


@contextmanager
def running(layers: Mapping[str, Routed], name: Name) -> Iterator[None]:
    """Inside, what the stage leaves out does not run, and what it does not yet route runs whole."""
    before = {path: layer.active for path, layer in layers.items()}
    try:
        for layer in layers.values():
            if isinstance(layer, MoEFeedForward) and name == "shared":
                layer.active = 0
            elif isinstance(layer, BlockRouter) and name != "all":
                layer.active = layer.count
        yield
    finally:
        for path, layer in layers.items():
            layer.active = before[path]
