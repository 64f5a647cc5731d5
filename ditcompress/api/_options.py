"""Options that several functions take, as what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..calibration.collect import CalibrationSettings
from ..errors import DitcompressError
from ..recipe import Calibration, read_yaml


def pick_device(device: str) -> torch.device:
    """ "auto" is the first accelerator, else the CPU; E604 for a device this machine has not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError):
        raise DitcompressError("E604", f"--device {device}", "is not available here", "use cpu or auto") from None


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype by its name; E203 for another."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = dtype if isinstance(dtype, torch.dtype) else named.get(dtype)
    if found is None:
        raise DitcompressError("E203", f"--dtype {dtype}", "is not known", "use float32, bfloat16 or float16")
    return found


def settings_of(calibration: Calibration, seed: int, grams: bool = True, batch: int = 16) -> CalibrationSettings:
    """The collector's settings for a recipe's `calibration` section."""
    return CalibrationSettings(**calibration.model_dump(), seed=seed, batch=batch, grams=grams)


def method_settings(overrides: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`key=value` texts as parameters of a method."""
    found = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not key or not equals:
            raise DitcompressError("E203", f"{option} {text}", "is not key=value", f"for example {option} samples=8")
        found[key] = read_yaml(raw, f"{option} {key}")
    return found
