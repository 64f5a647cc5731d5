"""Ternary weights: the absmean definition, the least squares fit, and both packings."""

from __future__ import annotations

import pytest
import torch

from ditcompress.formats import ternary as fmt


def weight() -> torch.Tensor:
    return torch.randn(32, 96, generator=torch.Generator().manual_seed(0))


def error(w: torch.Tensor, params: fmt.Params, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted squared error of the rows."""
    grid = fmt.fit(w, params, importance)
    squared = (fmt.value(fmt.code(w, grid, params), grid, params) - w).square()
    return (squared if importance is None else squared * importance).sum(1)


def test_absmean_is_that_of_bitnet() -> None:
    """BitNet b1.58, equations 1 to 3."""
    w = weight()
    params = fmt.Params(layout="tensor")
    grid = fmt.fit(w, params)
    gamma = w.abs().mean()
    assert torch.allclose(grid.scale, gamma)
    assert torch.equal(fmt.code(w, grid, params), (w / (gamma + 1e-9)).round().clamp(-1, 1).int())


def test_a_short_last_group_has_the_mean_of_its_own_members() -> None:
    w = weight()[:, :50]
    grid = fmt.fit(w, fmt.Params(layout="group", group=32))
    assert torch.allclose(grid.scale[:, 1], w[:, 32:].abs().mean(1))


@pytest.mark.parametrize("layout", ["tensor", "row", "group"])
@pytest.mark.parametrize("weighted", [False, True])
def test_least_squares_is_never_worse_than_absmean(layout: str, weighted: bool) -> None:
    w = weight()
    importance = torch.linspace(0.1, 4, 96) if weighted else None
    plain, better = (
        error(w, fmt.Params(layout=layout, group=32, fit=fit), importance).sum() for fit in ("absmean", "least_squares")
    )
    assert better < plain


def test_least_squares_comes_close_to_the_best_scale() -> None:
    """The best of all scales, by brute force: any scale is the mean of the largest |w| for some count."""
    w = weight()
    sizes = w.abs().sort(1, descending=True).values.double()
    counts = torch.arange(1, 97)
    best = w.double().square().sum(1) - (sizes.cumsum(1).square() / counts).amax(1)
    assert torch.all(error(w, fmt.Params(fit="least_squares")) < 1.03 * best)


def test_ternary_values_are_found_exactly() -> None:
    w = torch.randint(-1, 2, (8, 40), generator=torch.Generator().manual_seed(0)) * 0.3
    assert error(w, fmt.Params(fit="least_squares")).max() < 1e-9


@pytest.mark.parametrize("columns", [1, 4, 5, 33])
def test_base3_holds_five_codes_in_a_byte(columns: int) -> None:
    digits = torch.randint(0, 3, (7, columns), generator=torch.Generator().manual_seed(0))
    packed = fmt._pack_base3(digits)
    assert packed.shape == (7, -(-columns // 5)) and packed.max() <= 242
    assert torch.equal(fmt._unpack_base3(packed, columns), digits)


def test_base3_is_the_smaller_packing() -> None:
    sizes = {p: fmt.layout(fmt.Params(packing=p), (64, 100))["qweight"][0] for p in ("bits", "base3")}
    assert sizes == {"bits": (64, 25), "base3": (64, 20)}
