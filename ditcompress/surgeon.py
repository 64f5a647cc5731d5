"""Optimal brain surgeon: columns of a linear's input go, and those that stay make up for them.

With C = sum of w x x^T over tokens x with weights w, removing the columns P of W and refitting the rest raises the
squared output error by tr(W_P ([C^-1]_PP)^-1 W_P^T); the compensation is W_K -= W_P ([C^-1]_PP)^-1 [C^-1]_PK (Hassibi
and Stork 1993; for structures OBS-Diff, arXiv 2510.06751, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Surgeon:
    """A linear (rows, K), float64, that loses units of its columns; unit u is `size` columns from start + u * size on.
    `gram` (K, K) is C, `damp` the share of its mean diagonal that is added."""

    def __init__(self, weight: Tensor, gram: Tensor, damp: float, start: int = 0) -> None:
        self.weight = weight
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damp)))
        self.start, self.columns = start, list(range(gram.shape[0]))

    def _places(self, units: Sequence[int], size: int) -> Tensor:
        where = {column: place for place, column in enumerate(self.columns)}
        return torch.tensor([[where[self.start + unit * size + k] for k in range(size)] for unit in units])

    def errors(self, units: Sequence[int], size: int) -> Tensor:
        """tr(W_P ([C^-1]_PP)^-1 W_P^T) of each unit, (units,)."""
        index = self._places(units, size).to(self.weight.device)
        blocks = self.inverse[index[:, :, None], index[:, None, :]]  # (units, size, size)
        own = self.weight.T[index]  # (units, size, rows)
        return (own * torch.linalg.solve(blocks, own)).sum((1, 2)).cpu()

    def remove(self, units: Sequence[int], size: int) -> None:
        """Compensate the other columns and forget these."""
        gone = self._places(units, size).flatten().to(self.weight.device)
        rest = torch.ones(len(self.columns), dtype=torch.bool, device=gone.device)
        rest[gone] = False
        pull = torch.linalg.solve(self.inverse[gone[:, None], gone], self.inverse[gone])[:, rest]  # (gone, rest)
        self.weight = self.weight[:, rest] - self.weight[:, gone] @ pull
        self.inverse = self.inverse[rest][:, rest] - self.inverse[rest][:, gone] @ pull
        self.columns = [column for column, stays in zip(self.columns, rest.tolist(), strict=True) if stays]


def turns(readers: Sequence[Surgeon], count: int, size: int, chunk: int) -> Tensor:
    """Error (count,) float64 that each unit's removal adds when its turn comes, `chunk` of the least at a time, always
    rising along the turns; the last that is left is infinite. Errors of several readers are added."""
    result, left, worst = torch.full((count,), math.inf, dtype=torch.float64), list(range(count)), 0.0
    while len(left) > 1 and readers:
        errors = torch.stack([reader.errors(left, size) for reader in readers]).sum(0)
        order = torch.argsort(errors, stable=True)[: min(chunk, len(left) - 1)].tolist()
        for place in order:
            worst = max(math.nextafter(worst, math.inf), float(errors[place]))
            result[left[place]] = worst
        gone = {left[place] for place in order}
        for reader in readers:
            reader.remove(sorted(gone), size)
        left = [unit for unit in left if unit not in gone]
    return result


def damped(gram: Tensor, damp: float) -> Tensor:
    """C with `damp` of its mean diagonal added; a channel that is always zero gets the mean."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean().clamp_min(1e-30))
    return gram + torch.diag(torch.where(diagonal > 0, damp * mean, mean))


def refitted(target: Tensor, gram: Tensor, columns: Tensor, damp: float) -> Tensor:
    """(rows, K): `target` fitted on `columns` alone, zero elsewhere. It is damped towards `target` itself, so that
    directions in which the data say nothing stay as they were."""
    gram = damped(gram, damp)
    part = gram[columns]
    solved = torch.linalg.solve(part[:, columns], part @ target.T).T
    return torch.zeros_like(target).index_copy_(1, columns, solved)
