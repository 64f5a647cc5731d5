"""The scheduler that drives a checkpoint: its own, a given one, or its family's usual one, said aloud."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers

from ..console import Reporter
from ..errors import DitcompressError
from ..registry import nearest
from ..runtime.coefficients import register


def load_scheduler(config: Mapping[str, Any], folder: Path | None, adapter: ModuleType, reporter: Reporter) -> Any:
    """The scheduler in `folder` (or in its `scheduler/`), else the family's usual one.

    E332 when the file does not parse or names no scheduler of diffusers.
    """
    if folder is None:
        scheduler = adapter.default_scheduler(config)
        reporter.note(f"no scheduler with the checkpoint: {type(scheduler).__name__} of its family is used")
        return scheduler
    path = folder / "scheduler_config.json"
    if not path.is_file() and (folder / "scheduler" / "scheduler_config.json").is_file():
        path = folder / "scheduler" / "scheduler_config.json"
    try:
        fields = json.loads(path.read_text())
        name = str(fields["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DitcompressError(
            "E332", path, "is no scheduler configuration", "give a folder with scheduler_config.json"
        ) from None
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise DitcompressError("E332", path, f"{name} is no scheduler of diffusers", nearest(name, known))
    register()  # a scheduler stored with step coefficients applies them
    try:
        return getattr(diffusers, name).from_config(fields)
    except (TypeError, ValueError, RuntimeError, ImportError, ArithmeticError) as error:
        raise DitcompressError("E332", path, f"does not build ({error})", "restore the original file") from None
