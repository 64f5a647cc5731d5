"""Where every parameter is: linears by role, and all that tools for linears overlook (convolutions, norms, tables)."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from ._table import block_of
from .base import Layout


class Entry(NamedTuple):
    """One parameter: its name, its role, the path of its block ("" outside) and its number of elements.

    `role` is one of base.ROLES for a linear's weight and bias, else "conv", "norm", "table" (an embedding) or "raw".
    """

    name: str
    role: str
    block: str
    params: int


def _kind(module: nn.Module) -> str:
    name = type(module).__name__.lower()
    if "conv" in name:
        return "conv"
    if "norm" in name:
        return "norm"
    return "table" if isinstance(module, nn.Embedding) else "raw"


def account(model: nn.Module, layout: Layout | None = None) -> list[Entry]:
    """One entry per parameter in model order; the counts add up to the model's parameters exactly.

    `layout`: the model's, where the caller has it; otherwise its family's is computed.
    """
    if layout is None:
        from . import adapter_for

        layout = adapter_for(type(model).__name__).layout(model)
    roles = {site.name: site.role for site in layout.sites}
    modules = dict(model.named_modules())

    def entry(name: str, parameter: nn.Parameter) -> Entry:
        owner = name.rpartition(".")[0]
        role = roles.get(owner) or _kind(modules[owner])
        return Entry(name, role, block_of(name, layout.blocks), parameter.numel())

    return [entry(name, parameter) for name, parameter in model.named_parameters()]


def by_role(entries: list[Entry]) -> dict[str, int]:
    """Parameters per role, the largest first."""
    total: Counter[str] = Counter()
    for entry in entries:
        total[entry.role] += entry.params
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
