"""Figures take most of the time of converting a tiny model: they are drawn where tests look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from ditcompress.report import plots

HEAT_MAP = plots.heat_map
LOOKED_AT = {"test_stages": ("stage_losses",)}


@pytest.fixture(scope="module", autouse=True)
def few_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """An empty picture in the place of every figure of moe.html that the module's tests do not ask for."""
    kept = LOOKED_AT.get(request.module.__name__.rpartition(".")[2], ())
    with pytest.MonkeyPatch.context() as patch:
        for name in {"heat_map", "stage_losses"} - {*kept}:
            patch.setattr(plots, name, lambda *args: "data:,")
        yield


@pytest.fixture(scope="module")
def drawn() -> Callable[[], AbstractContextManager[None]]:
    """A context inside which heat maps are drawn."""

    @contextmanager
    def real() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "heat_map", HEAT_MAP)
            yield

    return real
