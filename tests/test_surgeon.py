"""Optimal brain surgeon in turns is what leaving out all that went at once gives."""

from __future__ import annotations

import pytest
import torch

from ditcompress import surgeon
from ditcompress.surgeon import Surgeon, damped, turns


def problem(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear (5, columns) and the Gram matrix of its inputs, float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    x[:, 1:] += x[:, :-1]  # neighbours are alike
    return torch.randn(5, columns, generator=generator, dtype=torch.float64), x.T @ x


@pytest.mark.parametrize(("size", "start"), [(1, 0), (4, 2)])
@pytest.mark.parametrize("held", [1, 3, 256])
def test_errors_after_removals_are_those_of_the_linear_refitted_without_them(
    size: int, start: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgeon, "HELD", held)
    weight, gram = problem(42)
    before, all_ = weight.clone(), damped(gram, 1e-3)
    left, own = list(range((42 - start) // size)), Surgeon(weight, gram, 1e-3, start)
    for gone in ([3], [0, 5], [1], [7, 2, 4]):
        own.remove(gone, size)
        left = [unit for unit in left if unit not in gone]
        found = own.errors(left, size)
        out = {start + unit * size + k for unit in range((42 - start) // size) if unit not in left for k in range(size)}
        rest = torch.tensor([column for column in range(42) if column not in out])
        inverse = torch.linalg.inv(all_[rest][:, rest])
        fitted = before @ all_[:, rest] @ inverse
        for unit, error in zip(left, found.tolist(), strict=True):
            place = [rest.tolist().index(start + unit * size + k) for k in range(size)]
            part = fitted[:, place]
            wanted = (part @ torch.linalg.inv(inverse[place][:, place]) @ part.T).trace()
            assert error == pytest.approx(float(wanted), rel=1e-8)
    assert torch.equal(weight, before)


def test_turns_do_not_depend_on_how_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(60)
    found = []
    for held in (1, 7, 256):
        monkeypatch.setattr(surgeon, "HELD", held)
        found.append(turns([Surgeon(weight, gram, 1e-3)], 60, 1, 3))
    assert all(torch.equal(found[0].argsort(), other.argsort()) for other in found)
    assert all(torch.allclose(found[0], other, rtol=1e-9) for other in found) and int(found[0].isinf().sum()) == 1
