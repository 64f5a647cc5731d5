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

HELD = 256  # removed columns whose update of the inverse waits


class Surgeon:
    """A linear (rows, K), float64, that loses units of its columns; unit u is `size` columns from start + u * size on.
    `gram` (K, K) is C, `damp` the share of its mean diagonal that is added.

    What removals take off C^-1 is U^T U, with a row of U for each column that went: rows are held and taken off
    together (`_settle`), so that the large matrix is gone through a few times and not for every turn.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damp: float, start: int = 0) -> None:
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damp)))
        self.weight, self.start = weight.clone(), start
        self.place = torch.arange(len(gram), device=weight.device)  # of every column, -1 for one that went
        self._hold()

    def _hold(self) -> None:
        count = len(self.inverse)
        self.diagonal = self.inverse.diagonal().clone()
        self.held, self.count = self.inverse.new_empty(max(1, min(HELD, count // 4)), count), 0

    def _columns(self, units: Sequence[int], size: int) -> Tensor:
        """(units, size): columns of the whole weight."""
        first = self.start + torch.tensor(units, device=self.place.device) * size
        return first[:, None] + torch.arange(size, device=self.place.device)

    def errors(self, units: Sequence[int], size: int) -> Tensor:
        """tr(W_P ([C^-1]_PP)^-1 W_P^T) of each unit, (units,)."""
        if size > 1:
            self._settle()
        index = self.place[self._columns(units, size)]
        if size == 1:
            return (self.weight.square().sum(0) / self.diagonal)[index[:, 0]].cpu()
        blocks = self.inverse[index[:, :, None], index[:, None, :]]  # (units, size, size)
        own = self.weight.T[index]  # (units, size, rows)
        return (own * torch.linalg.solve(blocks, own)).sum((1, 2)).cpu()

    def remove(self, units: Sequence[int], size: int) -> None:
        """Compensate the other columns and forget these."""
        if self.count + len(units) * size > len(self.held):
            self._settle()
        columns = self._columns(units, size).flatten()
        gone = self.place[columns]
        known = self.held[: self.count]
        rows = self.inverse[gone] - known[:, gone].T @ known
        lower = torch.linalg.cholesky(rows[:, gone])
        new = torch.linalg.solve_triangular(lower, rows, upper=False)  # (gone, columns)
        pull = torch.linalg.solve_triangular(lower, self.weight[:, gone].T, upper=False)
        self.weight.addmm_(pull.T, new, alpha=-1)
        self.diagonal -= new.square().sum(0)
        self.place[columns] = -1
        if len(new) > len(self.held):  # a chunk that is larger than what is held
            self._settle(new)
        else:
            self.held[self.count : self.count + len(new)] = new
            self.count += len(new)

    def _settle(self, more: Tensor | None = None) -> None:
        """Take off what is held (and `more`), and the columns that went."""
        rest = self.place[self.place >= 0]
        if len(rest) == len(self.inverse):
            return
        taken = self.held[: self.count, rest] if more is None else more[:, rest]
        self.inverse = self.inverse[rest][:, rest].addmm_(taken.T, taken, alpha=-1)
        self.weight = self.weight[:, rest]
        self.place[self.place >= 0] = torch.arange(len(rest), device=rest.device)
        self._hold()


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
