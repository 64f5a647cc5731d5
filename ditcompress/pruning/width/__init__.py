"""Width pruning: which heads and neurons a model can do without. One file a method; `narrowing` runs one."""

from ._axes import UNITS, count_of, cut_axes, emptied, kept_units, narrowed_config
from .base import Context, Narrowing, WidthParams, narrowing, registry

__all__ = [
    "UNITS", "Context", "Narrowing", "WidthParams", "count_of", "cut_axes", "emptied", "kept_units",
    "narrowed_config", "narrowing", "registry",
]  # fmt: skip
