"""One description of a diffusion transformer that serves every method: blocks, sites and axes.

A `Site` is one linear. An `Axis` is one hidden dimension: the rows of the sites that write it and the columns of
the sites that read it. Linears that read the same axes share a Gram matrix and a smoothing vector; `fold` says
which producer rows absorb a scale; a cut removes units from every site of an axis; an expert split partitions it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROLES = ("qkv", "attn_out", "ffn_in", "ffn_out", "modulation", "time_embedding", "embedding", "head", "other")


@dataclass(frozen=True)
class Fold:
    """Rows `start:stop` of `tensor` that must change when the axis is divided by s (shape (stop-start,)).

    `rule` "divide": rows /= s. `rule` "one_plus": rows hold a scale used as (1 + scale), so rows <- (rows + 1) / s - 1;
    it applies to biases only (the matching weight rows are plain "divide").
    """

    tensor: str
    start: int
    stop: int
    rule: str = "divide"


@dataclass(frozen=True)
class Axis:
    """One hidden dimension of `size` channels in units of `unit_size` (head width for heads, 1 for neurons).

    `unit`: "head", "neuron" or "channel". `fold`: producer rows that can absorb a per-channel division exactly;
    empty means smoothing stays online. `cut`: whole units can be removed from all writers and readers.
    """

    name: str
    size: int
    unit: str
    unit_size: int = 1
    fold: tuple[Fold, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Site:
    """One linear: `name` is its module path. `reads` are the axes along its columns, `writes` along its rows, in
    order of concatenation; "" stands for a dimension that no axis describes (the residual stream)."""

    name: str
    role: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    block: str = ""  # module path of its block, "" outside the blocks
    in_features: int = 0
    out_features: int = 0

    @property
    def input_key(self) -> str:
        """Name of this site's input: sites with the same key share statistics and smoothing."""
        return "+".join(self.reads) if all(self.reads) else self.name + ":in"


@dataclass(frozen=True)
class Layout:
    """Sites in forward order, axes by name, and the module paths of the blocks in forward order."""

    sites: tuple[Site, ...]
    axes: Mapping[str, Axis]
    blocks: tuple[str, ...]

    def by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}
