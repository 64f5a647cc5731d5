"""Decoding to INT8 as one operator of a traced graph on a CPU: the compiler's own loops over packed bits take longer
than the product that follows, ours a tenth of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...formats.base import registry


def described(format: str, params: Any, names: Sequence[str]) -> str:
    """What `as_int8` is told of a weight: its format, parameters and the names of its tensors."""
    return json.dumps([format, params.model_dump(), list(names)])


def as_int8(how: str, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """INT8 codes (out, in) and scales (out, 1) of stored tensors."""
    codes, scale = torch.ops.ditcompress.as_int8(list(stored.values()), how, *shape)
    return codes, scale


@torch.library.custom_op("ditcompress::as_int8", mutates_args=())
def _as_int8(stored: list[Tensor], how: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    module, params, names = _format(how)
    codes, scale = module.as_int8(dict(zip(names, stored, strict=True)), params, (rows, columns))
    return codes.contiguous(), scale.clone()  # no result may be a view of what is stored


@_as_int8.register_fake
def _(stored: list[Tensor], how: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    first = stored[0]
    return first.new_empty(rows, columns, dtype=torch.int8), first.new_empty(rows, 1, dtype=torch.float32)


@functools.cache
def _format(how: str) -> tuple[Any, Any, list[str]]:
    name, params, names = json.loads(how)
    module = registry.get(name)
    return module, module.Params(**params), names
