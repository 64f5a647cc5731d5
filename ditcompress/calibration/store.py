"""Statistics on disk: one safetensors file and one JSON file with the fingerprint of what they describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..checkpoint.writer import save_atomic
from ..errors import DitcompressError
from .collect import CalibrationSettings
from .conditions import Conditions
from .statistics import Statistics, flatten, unflatten

TENSORS, META = "statistics.safetensors", "statistics.json"
VERSION = 2  # of what the numbers mean; raise it to have statistics gathered anew


def fingerprint(model: str, scheduler: Any, conditions: Conditions, settings: CalibrationSettings) -> dict[str, Any]:
    """What decides the statistics, by field."""
    config = {k: v for k, v in dict(scheduler.config).items() if isinstance(v, (str, int, float, bool, type(None)))}
    return {
        "version": VERSION,
        "model": model,
        "scheduler": {"class": type(scheduler).__name__, **config},
        "conditions": conditions.digest,
        "settings": asdict(settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def save_statistics(folder: Path, statistics: Statistics) -> None:
    """Write both files into `folder`; equal statistics give equal bytes."""
    save_atomic(folder / TENSORS, flatten(statistics))
    (folder / META).write_text(json.dumps({"version": VERSION, **statistics.meta}, indent=2, sort_keys=True) + "\n")


def load_statistics(folder: Path, expected: Mapping[str, Any] | None = None) -> Statistics:
    """Read them back; E331 when a file is damaged, or names the field of `expected` that differs."""
    try:
        meta = json.loads((folder / META).read_text())
        tensors = load_file(folder / TENSORS)
    except Exception as error:
        raise DitcompressError(
            "E331", folder, f"holds no whole statistics ({type(error).__name__})", "calibrate again"
        ) from None
    if meta.get("version", 1) != VERSION:
        raise DitcompressError("E331", folder, "made by another version of ditcompress", "calibrate again")
    for name, value in (expected or {}).items():
        if meta.get(name) != value:
            raise DitcompressError("E331", folder, f"made with another {name}", "calibrate again")
    return unflatten(tensors, meta)
