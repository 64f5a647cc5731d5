"""Scales shared by the formats: which weights share one, how it is stored, and the search for the best.

Layouts of a matrix (N, K): one scale per `tensor`; per `row`; per `group` of consecutive input columns in a row; per
`column_group` of rows that share an input column (only `int`, for DiTAS). A last group may be shorter.

Stored as float32, bfloat16 or float16, or as `uint8`: eight bits for each group times a float16 for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScaleType = Literal["float32", "float16", "bfloat16", "uint8"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Below it a stored scale keeps too few digits (float16: 4 bits are left), or its reciprocal overflows.
SMALLEST = {"float32": 2.0**-100, "bfloat16": 2.0**-100, "float16": 2.0**-20, "uint8": 2.0**-20}
_LARGEST = torch.finfo(torch.float16).max


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


def expand(values: Tensor, layout: str, group: int, shape: tuple[int, int], columns: slice) -> Tensor:
    """Grid values broadcastable against the weight columns `columns`."""
    if layout == "group" and columns.start // group == (columns.stop - 1) // group:
        return values[:, columns.start // group, None]
    if layout == "group":
        index = torch.arange(columns.start, columns.stop, device=values.device) // group
        return values[:, index]
    if layout == "column_group":
        return values[torch.arange(shape[0], device=values.device) % values.shape[0]][:, columns]
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


def whole(columns: int, part: slice | None) -> slice:
    """The range of columns meant by `part`; None is all of them."""
    return slice(0, columns) if part is None else part


def row_scales(scale: Tensor, kind: str) -> Tensor | None:
    """The float16 row scale under which `scale` fits eight bits; None unless scales are two-level."""
    if kind != "uint8":
        return None
    low = SMALLEST[kind]
    return (scale.amax(1, keepdim=True) / 255).clamp(low, _LARGEST).to(torch.float16).float()


def rounded(scale: Tensor, kind: str, row: Tensor | None) -> Tensor:
    """Scales as they will be read back, float32."""
    if row is not None:
        return torch.round(scale / row).clamp(1, 255) * row
    if kind == "float16":
        scale = scale.clamp_max(_LARGEST)
    return scale.to(DTYPES[kind]).float()


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
    for candidate in candidates:
        error = (decode(groups, candidate) - groups).square().mul(cost).sum(-1)
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
    if kind == "uint8":
        return {"scale": (grid, torch.uint8), "row_scale": ((grid[0], 1), torch.float16)}
    return {"scale": (grid, DTYPES[kind])}


def store(scale: Tensor, row: Tensor | None, kind: str) -> dict[str, Tensor]:
    """The stored scales, as `declare` declares them."""
    if row is None:
        return {"scale": scale.to(DTYPES[kind])}
    return {"scale": torch.round(scale / row).to(torch.uint8), "row_scale": row.to(torch.float16)}


def load(tensors: Mapping[str, Tensor], kind: str) -> Grid:
    """The inverse of `store`."""
    row = tensors["row_scale"].float() if kind == "uint8" else None
    scale = tensors["scale"].float()
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
