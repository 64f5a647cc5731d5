"""Shared fixtures: tiny models on disk, made once; a cache of its own for every run of the suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics of the tests never mix with those of the user."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block DiT as a plain diffusers folder."""
    from ditcompress.models import dit

    folder = tmp_path_factory.mktemp("models") / "tiny-dit"
    dit.tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(tiny_dit: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    import shutil

    target = tmp_path / "model"
    shutil.copytree(tiny_dit, target)
    return target


@pytest.fixture(scope="session")
def w4a8(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model compressed by the default recipe with little calibration."""
    from ditcompress import api

    out = tmp_path_factory.mktemp("compressed") / "w4a8"
    api.quantize(tiny_dit, "w4a8", out, overrides=["calibration.samples=4", "calibration.steps=4"])
    return out
