"""Vector codebooks: k-means on data whose answer is known, importance, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditcompress.formats import _kmeans
from ditcompress.formats import vq as fmt
from ditcompress.formats.base import PackedWeight
from ditcompress.plan import WeightSpec


def weight(shape: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def error(w: torch.Tensor, importance: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    """Squared error of every element."""
    params = fmt.Params(**given)
    grid = fmt.fit(w, params, importance)
    return (fmt.value(fmt.code(w, grid, params), grid, params) - w).square()


@pytest.mark.parametrize("row_scale", [False, True])
def test_a_matrix_made_of_codebook_entries_is_found_exactly(row_scale: bool) -> None:
    book = torch.randint(-8, 9, (16, 4), generator=torch.Generator().manual_seed(0)) * 0.25
    codes = torch.randint(0, 16, (64, 12), generator=torch.Generator().manual_seed(1))
    assert error(book[codes].reshape(64, 48), bits=4 if not row_scale else 12, row_scale=row_scale).max() < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_clusters_without_members_are_moved_to_where_they_help(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """All entries start at one point, so all but one are empty."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones_like(x)
    monkeypatch.setattr(_kmeans, "_start", lambda vectors, *_: vectors[:1].repeat(8, 1))
    book = _kmeans.kmeans(x, ones, 8, "random", 30, seed)
    index, distance = _kmeans.nearest(x, ones, book)
    assert len(index.unique()) == 8
    assert distance.mean() < 0.3 * x.var(0).sum()  # one cluster leaves 1.0


def test_the_nearest_entry_is_that_of_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kmeans, "_ELEMENTS", 64)  # many parts
    x, book, weights = weight((50, 3)), weight((16, 3)) * 1.1, weight((50, 3)).abs() + 0.1
    index, distance = _kmeans.nearest(x, weights, book)
    every = ((x[:, None] - book).square() * weights[:, None]).sum(-1)
    assert torch.equal(index, every.argmin(1))
    assert torch.allclose(distance, every.amin(1), atol=1e-5)


def test_more_iterations_never_raise_the_error() -> None:
    errors = [error(weight(), bits=5, iterations=n).sum().item() for n in (0, 2, 10, 40)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    importance = torch.ones(96)
    importance[:32] = 100.0
    plain, weighted = error(weight(), bits=5), error(weight(), importance, bits=5)
    assert weighted[:, :32].mean() < plain[:, :32].mean()
    assert (weighted * importance).sum() < (plain * importance).sum()


def test_a_codebook_for_each_block_of_rows_fits_better() -> None:
    w = weight() * torch.logspace(-2, 0, 64)[:, None]
    assert error(w, bits=4, rows=16).sum() < error(w, bits=4).sum()
    relative = [(error(w, bits=4, row_scale=s).sum(1) / w.square().sum(1)).mean() for s in (False, True)]
    assert relative[1] < relative[0]


def test_a_sample_of_the_vectors_does_nearly_as_well() -> None:
    w = weight((256, 256))
    assert error(w, bits=4, samples=2048).sum() < 1.05 * error(w, bits=4).sum()


def test_the_same_seed_gives_the_same_codebook() -> None:
    one, again, other = (fmt.fit(weight(), fmt.Params(bits=5, seed=seed)).codebook for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_range_that_cuts_a_vector_is_refused() -> None:
    w, params = weight((8, 10)), fmt.Params(bits=2, dim=4)
    grid = fmt.fit(w, params)
    assert fmt.width(params) == 4
    assert fmt.code(w[:, 8:], grid, params, (8, 10), slice(8, 10)).shape == (8, 2)
    for part in (slice(2, 8), slice(0, 6)):
        with pytest.raises(ValueError, match="whole vectors"):
            fmt.code(w[:, part], grid, params, (8, 10), part)


def test_bits_count_indices_and_codebooks() -> None:
    spec = WeightSpec("vq", {"bits": 8, "dim": 4, "rows": 32, "row_scale": True})
    params = fmt.Params(**spec.params)
    w = weight((64, 128))
    grid = fmt.fit(w, params)
    packed = PackedWeight(spec, (64, 128), fmt.pack(fmt.code(w, grid, params), grid, params))
    assert packed.stored_bytes == 64 * 32 + 2 * 256 * 4 * 2 + 64 * 2
