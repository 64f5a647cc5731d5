"""Scales shared by the formats: which weights share one, how it is stored, and the search for the best.

Layouts of a matrix (N, K): one scale per `tensor`; per `row`; per `group` of consecutive input columns in a row; per
`column_group` of rows that share an input column (only `int`, for DiTAS). A last group may be shorter.

Stored as float32, bfloat16 or float16, or in two levels, a whole number for each group times a float16 for each row:
`uint8`, eight bits a group, or `uint4`, four bits a group chosen such that a code times its group's number is an INT8,
so that integer products run the weight without rounding it again (as QServe's progressive groups, arXiv 2405.04532).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._bits import pack_bits, packed_width, unpack_bits

Columns = slice | Tensor  # some columns of all rows, or (N, n) of each row's own
ScaleType = Literal["float32", "float16", "bfloat16", "uint8"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Below it a stored scale keeps too few digits (float16: 4 bits are left), or its reciprocal overflows.
SMALLEST = {"float32": 2.0**-100, "bfloat16": 2.0**-100, "float16": 2.0**-20, "uint8": 2.0**-20, "uint4": 2.0**-20}
INT8_TOP, UINT4_TOP = 127, 16
_LARGEST = torch.finfo(torch.float16).max
PART = 2**19  # values whose candidates are tried together: what stays in a core's cache


@dataclass(frozen=True)
class Grid:
    """`scale` float32 in the shape of the layout; `row_scale` (N, 1) float32 when the scales are two-level."""

    scale: Tensor
    row_scale: Tensor | None = None


def grid_shape(layout: str, group: int, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scales of a matrix of `shape`."""
    rows, columns = shape
    return {
        "tensor": (1, 1),
        "row": (rows, 1),
        "group": (rows, -(-columns // group)),
        "column_group": (-(-rows // group), columns),
    }[layout]


def expand(values: Tensor, layout: str, group: int, shape: tuple[int, int], columns: Columns) -> Tensor:
    """Grid values broadcastable against the weight columns `columns`: a slice, or (N, n) of each row's own."""
    if isinstance(columns, Tensor):
        return _expand_own(values, layout, group, columns)
    if layout == "group" and columns.start // group == (columns.stop - 1) // group:
        return values[:, columns.start // group, None]
    if layout == "group" and columns == slice(0, values.shape[1] * group):
        return values.unsqueeze(-1).expand(-1, -1, group).reshape(values.shape[0], -1)
    if layout == "group":
        index = torch.arange(columns.start, columns.stop, device=values.device) // group
        return values[:, index]
    if layout == "column_group":
        return values[torch.arange(shape[0], device=values.device) % values.shape[0]][:, columns]
    return values


def _expand_own(values: Tensor, layout: str, group: int, columns: Tensor) -> Tensor:
    if layout == "group":
        return values.gather(1, columns // group)
    if layout == "column_group":
        return values[torch.arange(len(columns), device=values.device) % len(values)].gather(1, columns)
    return values


def grouped(weight: Tensor, layout: str, group: int, fill: float = 0.0) -> Tensor:
    """The weight with one group per row of the last dimension: (*grid shape, members), padded with `fill`."""
    rows, columns = weight.shape
    grid_rows, grid_columns = grid_shape(layout, group, (rows, columns))
    pad = torch.nn.functional.pad
    if layout == "group":
        return pad(weight, (0, grid_columns * group - columns), value=fill).reshape(rows, grid_columns, -1)
    if layout == "column_group":  # members: rows o with the same o mod (N / group)
        padded = pad(weight, (0, 0, 0, grid_rows * group - rows), value=fill)
        return padded.reshape(group, grid_rows, columns).permute(1, 2, 0)
    return weight.reshape(grid_rows, 1, -1)


def costs(weight: Tensor, importance: Tensor | None, layout: str, group: int) -> Tensor:
    """What a squared error costs, in the shape of `grouped`: the column's importance, 0 for padding."""
    importance = torch.ones_like(weight[0]) if importance is None else importance.to(weight)
    return grouped(importance.expand_as(weight), layout, group)


def whole(columns: int, part: Columns | None) -> Columns:
    """The range of columns meant by `part`; None is all of them."""
    return slice(0, columns) if part is None else part


def row_scales(scale: Tensor, kind: str, reach: Tensor | float = 1.0) -> Tensor | None:
    """The float16 row scale under which `scale` fits the bits of a group; None unless scales are two-level.

    `reach`: the largest magnitude of a code, in the shape of the scales, which bounds `uint4`."""
    if kind not in ("uint8", "uint4"):
        return None
    top = scale.amax(1, keepdim=True)
    row = (
        top / 255
        if kind == "uint8"
        else torch.maximum((scale * reach).amax(1, keepdim=True) / INT8_TOP, top / UINT4_TOP)
    )
    return row.clamp(SMALLEST[kind], _LARGEST).to(torch.float16).float()


def rounded(scale: Tensor, kind: str, row: Tensor | None, reach: Tensor | float = 1.0) -> Tensor:
    """Scales as they will be read back, float32."""
    if row is not None and kind == "uint4":
        most = torch.div(INT8_TOP, torch.as_tensor(reach), rounding_mode="floor").clamp(1, UINT4_TOP).to(scale.device)
        return torch.minimum(torch.round(scale / row), most).clamp_min(1) * row
    if row is not None:
        return torch.round(scale / row).clamp(1, 255) * row
    if kind == "float16":
        scale = scale.clamp_max(_LARGEST)
    return scale.to(DTYPES[kind]).float()


def _rows(tensor: Tensor, part: slice) -> Tensor:
    """Those rows of a tensor that has one for each row of groups, or one for all."""
    return tensor[part] if len(tensor) > 1 else tensor


def least_error(
    groups: Tensor,
    cost: Tensor,
    candidates: Iterable[tuple[Tensor, ...]],
    decode: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
) -> tuple[Tensor, ...]:
    """For each group the candidate (tensors in the shape of the grid) that decodes it with the least squared error.

    The first of equals wins, so a search that begins with the plain choice never does worse than it.
    """
    best: tuple[Tensor, ...] = ()
    least = torch.full_like(groups[..., 0], float("inf"))
    rows = max(1, PART // max(1, groups[:1].numel()))
    parts = [slice(start, start + rows) for start in range(0, len(groups), rows)]
    for candidate in candidates:
        error = torch.empty_like(least)
        for part in parts:
            values, tried = groups[part], tuple(_rows(tensor, part) for tensor in candidate)
            error[part] = (decode(values, tried) - values).square_().mul_(_rows(cost, part)).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best or candidate, strict=True))
    return best


def fit_scale(
    weight: Tensor,
    importance: Tensor | None,
    layout: str,
    group: int,
    kind: str,
    clip: int,
    top: float,
    nearest: Callable[[Tensor], Tensor],
) -> Grid:
    """Absmax scales: the largest magnitude of a group is `top` times its scale.

    `nearest` rounds values in units of the scale to the element grid; `clip` factors from 1 to 0.4 are tried.
    """
    groups = grouped(weight, layout, group)
    full = (groups.abs().amax(-1) / top).clamp_min(SMALLEST[kind])
    row = row_scales(full, kind)
    if clip == 1:
        return Grid(rounded(full, kind, row), row)
    shrunk = (full * f for f in torch.linspace(1.0, 0.4, clip).tolist())
    candidates = ((rounded(s.clamp_min(SMALLEST[kind]), kind, row),) for s in shrunk)

    def decode(values: Tensor, candidate: tuple[Tensor, ...]) -> Tensor:
        scale = candidate[0].unsqueeze(-1)
        return nearest(values / scale) * scale

    return Grid(least_error(groups, costs(weight, importance, layout, group), candidates, decode)[0], row)


def declare(kind: str, grid: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored scales."""
    if kind in ("uint8", "uint4"):
        width = grid[1] if kind == "uint8" else packed_width(grid[1], 4)
        return {"scale": ((grid[0], width), torch.uint8), "row_scale": ((grid[0], 1), torch.float16)}
    return {"scale": (grid, DTYPES[kind])}


def store(scale: Tensor, row: Tensor | None, kind: str) -> dict[str, Tensor]:
    """The stored scales, as `declare` declares them."""
    if row is None:
        return {"scale": scale.to(DTYPES[kind])}
    number = torch.round(scale / row).to(torch.uint8)
    return {"scale": pack_bits(number - 1, 4) if kind == "uint4" else number, "row_scale": row.to(torch.float16)}


def numbers(tensors: Mapping[str, Tensor], groups: int) -> Tensor:
    """The whole numbers 1 to 16 of `uint4` scales, uint8 (N, groups)."""
    return unpack_bits(tensors["scale"], 4, groups) + 1


def load(tensors: Mapping[str, Tensor], kind: str, groups: int = 0) -> Grid:
    """The inverse of `store`; `groups` of a row, which only `uint4` needs."""
    row = tensors["row_scale"].float() if kind in ("uint8", "uint4") else None
    scale = numbers(tensors, groups).float() if kind == "uint4" else tensors["scale"].float()
    return Grid(scale if row is None else scale * row, row)


def refit(weight: Tensor, units: Tensor, hessian: Tensor, layout: str, group: int) -> Tensor | None:
    """The scales, in the shape of the layout, with the least tr((W - SU) H (W - SU)^T) for given codes.

    `units` (N, K) are the values of the codes at scale 1; H (K, K). Rows are independent, so this is one small linear
    system a row (one for all with layout "tensor"). None for the layout "column_group", which ties rows together.
    """
    if layout == "column_group":
        return None
    rows, columns = weight.shape
    count = grid_shape(layout, group, (rows, columns))[1]
    size = group if layout == "group" else columns
    units, target = units.to(hessian.dtype), weight.to(hessian.dtype) @ hessian
    pad = (0, count * size - columns)
    split = torch.nn.functional.pad(units, pad).reshape(rows, count, size)
    right = (split * torch.nn.functional.pad(target, pad).reshape(rows, count, size)).sum(-1)
    normal = torch.empty(rows, count, count, dtype=hessian.dtype, device=hessian.device)
    for g in range(count):
        part = units[:, g * size : (g + 1) * size] @ hessian[g * size : (g + 1) * size]
        normal[:, g] = (split * torch.nn.functional.pad(part, pad).reshape(rows, count, size)).sum(-1)
    if layout == "tensor":
        normal, right = normal.sum(0, keepdim=True), right.sum(0, keepdim=True)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    normal += torch.diag_embed(ridge[:, None].expand(-1, count))
    return torch.linalg.solve_ex(normal, right.unsqueeze(-1)).result.squeeze(-1).float()


def keep_sound(fitted: Tensor | None, scale: Tensor) -> Tensor | None:
    """`fitted` where it is a sane scale (finite, and within a factor of 4 of the old one), else the old one."""
    if fitted is None:
        return None
    sound = torch.isfinite(fitted) & (fitted > scale / 4) & (fitted < scale * 4)
    return torch.where(sound, fitted, scale)
