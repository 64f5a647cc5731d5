"""UDFC: channels that go are put together again from those that stay, by the weights alone (arXiv 2308.07209).

A channel j of an axis is described by its rows in the writers (weights and biases). The combination s of the rows that
stay, s = argmin |w_j - W_K^T s|^2 + lambda |s|^2, is folded into the reader, W2[:, K] += W2[:, j] s^T. That is exact
between two linear layers and a guess behind an activation or an attention. No data are read, so the result can be
quantized by any recipe. The units that go are those of least magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...models.base import Axis
from ...structure import spans, unit_channels, writers
from .base import Context, WidthParams, places
from .magnitude import magnitudes

NEEDS: tuple[str, ...] = ()


class Params(WidthParams):
    """`ridge`: lambda in units of the mean squared norm of a channel's rows."""

    ridge: float = Field(0.1, gt=0)


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """The norm of every unit, (units,), as `magnitude` gives it."""
    return {axis.name: magnitudes(context.layout, axis, context.read) for axis in axes}


def rewrite(
    context: Context, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]], params: Params
) -> dict[str, Tensor]:
    """The readers' weights with what went folded into the columns that stay."""
    tensors: dict[str, Tensor] = {}
    for axis in axes:
        if axis.name not in kept:
            continue
        stay = unit_channels(axis, kept[axis.name])
        gone = torch.tensor(sorted(set(range(axis.size)) - set(stay.tolist())))
        mix = combination(rows(context, axis), stay, gone, params.ridge)
        for module, start, _ in places(context.layout, axis):
            name = f"{module}.weight"
            weight = tensors[name] if name in tensors else context.read(name).double()
            weight = weight.index_add(1, start + stay, weight[:, start + gone] @ mix)
            tensors[name] = weight.index_fill(1, start + gone, 0.0)
    return {name: tensor.float() for name, tensor in tensors.items()}


def rows(context: Context, axis: Axis) -> Tensor:
    """Everything that makes a channel, (channels, features), float64: its rows and biases in all writers."""
    parts, state = [], context.model.state_dict()
    for site in writers(context.layout, axis.name):
        weight = context.read(f"{site.name}.weight").double()
        bias = context.read(f"{site.name}.bias").double() if f"{site.name}.bias" in state else None
        for start, stop in spans(context.layout, site.writes, weight.shape[0], axis.name):
            parts.append(weight[start:stop])
            parts += [] if bias is None else [bias[start:stop, None]]
    return torch.cat(parts, dim=1)


def combination(rows: Tensor, stay: Tensor, gone: Tensor, ridge: float) -> Tensor:
    """Coefficients (gone, stay) with which the rows that stay come nearest to those that go."""
    own = rows[stay]
    damping = ridge * own.square().sum(1).mean().clamp_min(1e-30)
    gram = own @ own.T + damping * torch.eye(len(stay), dtype=own.dtype)
    return torch.linalg.solve(gram, own @ rows[gone].T).T
