"""The journal of the block loop: one file of tensors and one of records for each finished unit."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


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


# the tensors of a block (or of what stands outside of them), its records, and each site's scheme
Unit = tuple[dict[str, Tensor], list[LayerRecord], dict[str, dict[str, Any]]]


def is_stored(journal: Path, number: int) -> bool:
    """The records file is renamed into place last, so its presence means that both are whole."""
    return (journal / f"unit-{number:05d}.json").exists()


def load_unit(journal: Path, number: int) -> Unit:
    facts = json.loads((journal / f"unit-{number:05d}.json").read_text())
    records = [LayerRecord(**{**r, "shape": tuple(r["shape"])}) for r in facts["records"]]
    return load_file(journal / f"unit-{number:05d}.safetensors"), records, facts["schemes"]


def save_unit(journal: Path, number: int, unit: Unit) -> None:
    tensors, records, schemes = unit
    base = journal / f"unit-{number:05d}"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{base}.part")
    os.replace(f"{base}.part", f"{base}.safetensors")
    Path(f"{base}.part").write_text(json.dumps({"records": [asdict(r) for r in records], "schemes": schemes}))
    os.replace(f"{base}.part", f"{base}.json")
