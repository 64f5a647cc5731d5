"""What a number format is: pure functions over one weight matrix, and the record of what they store.

A format module exports `Params` and five functions; GPTQ, learned rounding and plain rounding use them alike.

    fit(weight, params, importance)  -> grid       scales and zeros, already rounded to how they are stored
    code(weight, grid, params)       -> codes      nearest code of each element, int32, any subset of columns
    value(codes, grid, params)       -> weight     float32
    pack(codes, grid, params)        -> tensors    exactly what goes to disk
    unpack(tensors, params, shape)   -> codes, grid
    layout(params, shape)            -> {suffix: (shape, dtype)} of the stored tensors, no data needed

A format may also export

    refit(weight, codes, grid, params, hessian) -> grid or None   the best scales or codebook for given codes
    is_int8(params) -> bool                whether the decoded weight is INT8 (out, in) times a scale a row, exactly
    as_int8(tensors, params, shape) -> (codes, scale)              in that form, scale (out, 1), for integer products
    width(params) -> int                   columns that are coded together (vectors); 1 where it is missing
    Nearest(grid, params, metrics) -> (column, target) -> (index, values)   with width: the nearest vectors in metrics
    draft(params) -> params                those under which errors are estimated in a fraction of the time
    stackable(params, rows) -> bool        whether weights with `rows` rows can be stacked; yes where it is missing
    stack(grids, shape) -> grid            one grid for weights of `shape`, one under the other; `stack_rows` by default

weight: (out, in) float32. A grid is a mapping of tensors that broadcast against (out, in) when expanded by the
format. `code` and `value` take `columns` of a matrix of a given `shape`: a slice, or for rows that stand at columns of
their own a tensor (out, n) of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..plan import WeightSpec
from ..registry import Registry


class StrictParams(BaseModel):
    """Parameters from a recipe: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


registry = Registry("ditcompress.formats", "format", ("Params", "fit", "code", "value", "pack", "unpack", "layout"))


@dataclass(frozen=True)
class PackedWeight:
    """One weight matrix as stored: `tensors` are exactly the bytes on disk, keyed by suffix."""

    spec: WeightSpec
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def stored_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales and zeros included."""
        return 8 * self.stored_bytes / (self.shape[0] * self.shape[1])


def resolve(spec: WeightSpec) -> tuple[ModuleType, Any]:
    """The format module and its validated parameters."""
    module = registry.get(spec.format)
    return module, module.Params(**spec.params)


def stored_layout(spec: WeightSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{suffix: (shape, dtype)} of the tensors a weight of `shape` is stored as."""
    module, params = resolve(spec)
    return module.layout(params, shape)


def is_int8(spec: WeightSpec) -> bool:
    """Whether `as_int8` can be asked for."""
    module, params = resolve(spec)
    return hasattr(module, "is_int8") and bool(module.is_int8(params))


def dequantize(spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The float32 matrix that the stored tensors stand for."""
    module, params = resolve(spec)
    codes, grid = module.unpack(tensors, params, shape)
    return module.value(codes, grid, params)


def stackable(spec: WeightSpec, rows: int) -> bool:
    """Whether weights with `rows` rows can be coded as one matrix, one under the other."""
    module, params = resolve(spec)
    return not hasattr(module, "stackable") or bool(module.stackable(params, rows))


def stack_rows(grids: Sequence[Any], shape: tuple[int, int]) -> Any:
    """One grid for weights of `shape`, one under the other; what a weight's rows share is repeated for each."""

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.expand(shape[0], -1) if len(part) == 1 else part for part in parts])

    found = {field.name: [getattr(grid, field.name) for grid in grids] for field in fields(grids[0])}
    return replace(grids[0], **{name: joined(parts) for name, parts in found.items() if parts[0] is not None})
