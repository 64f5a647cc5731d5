"""The journal of the block loop: one file for each finished unit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint.writer import load_atomic, save_atomic


@dataclass(frozen=True)
class LayerRecord:
    """What was done to one linear. `bits`: stored bits per weight, scales and low-rank factors included."""

    site: str
    role: str
    block: str
    shape: tuple[int, int]
    format: str
    bits: float
    stored_bytes: int
    smooth: str
    rank: int
    weight_sqnr_db: float | None
    reason: str


VERSION = 2  # of the files; an interrupted run of another one begins anew

# the tensors of a block (or of what stands outside of them), its records, and each site's scheme
Unit = tuple[dict[str, Tensor], list[LayerRecord], dict[str, dict[str, Any]]]


def is_stored(journal: Path, number: int) -> bool:
    """The file is renamed into place, so its presence means that it is whole."""
    return _file(journal, number).exists()


def load_unit(journal: Path, number: int) -> Unit:
    tensors, facts = load_atomic(_file(journal, number))
    records = [LayerRecord(**{**r, "shape": tuple(r["shape"])}) for r in facts["records"]]
    return tensors, records, facts["schemes"]


def save_unit(journal: Path, number: int, unit: Unit) -> None:
    tensors, records, schemes = unit
    save_atomic(_file(journal, number), tensors, {"records": [asdict(r) for r in records], "schemes": schemes})


def _file(journal: Path, number: int) -> Path:
    return journal / f"unit-{number:05d}.safetensors"
