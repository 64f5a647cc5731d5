"""Groups of blocks for the Mixture of Blocks, and their routers' start (Dense2MoE, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import DitcompressError
from ..models.base import Layout
from ..routed import RoutedPart, family
from ..runtime.blocks import BlockRouter

STD = 0.02  # of the routers' weights at the start


def block_groups(model: nn.Module, layout: Layout, share: float, size: int, alpha: float) -> dict[str, RoutedPart]:
    """Groups of about `size` consecutive blocks of one kind, of which about `share` run: over all groups of a kind the
    number that is nearest, one at least in each. E203 for a share outside (0, 1], E205 for too few blocks."""
    if not 0 < share <= 1:
        raise DitcompressError("E203", f"--blocks-active {share:g}", "is no share of the blocks", "give 0.1 to 1")
    family(model)
    found: dict[str, RoutedPart] = {}
    for owner, count in _lists(model, layout).items():
        groups = max(1, round(count / size))
        ends = [round(i * count / groups) for i in range(groups + 1)]
        due = [round(share * end) for end in ends]
        for first, last, low, high in zip(ends, ends[1:], due, due[1:], strict=False):
            active = min(last - first, max(1, high - low))
            if last - first > 1:
                found[f"{owner}.{first}"] = RoutedPart(kind="blocks", count=last - first, active=active, alpha=alpha)
    if not found:
        raise DitcompressError("E205", type(model).__name__, "has no two blocks in a row", "leave out --blocks-active")
    return found


def _lists(model: nn.Module, layout: Layout) -> dict[str, int]:
    """How many blocks of each list return all of their streams."""
    found: dict[str, int] = {}
    for block in layout.blocks:
        if not getattr(model.get_submodule(block), "context_pre_only", False):
            owner = block.rpartition(".")[0]
            found[owner] = found.get(owner, 0) + 1
    return found


def begin_blocks(router: BlockRouter, generator: torch.Generator) -> None:
    """Random weights: equal scores would send all samples through the first blocks."""
    for part in (router.router, router.condition):
        part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * STD)


def outside_groups(layout: Layout, routed: Mapping[str, RoutedPart]) -> list[str]:
    """Blocks whose outputs a student shares with its teacher: the last of each group, and all outside the groups."""
    inside: set[str] = set()
    for path, part in routed.items():
        if part.kind == "blocks":
            owner, _, first = path.rpartition(".")
            inside |= {f"{owner}.{n}" for n in range(int(first), int(first) + part.count - 1)}
    return [block for block in layout.blocks if block not in inside]
