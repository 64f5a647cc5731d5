"""Model families: what is specific to one architecture, one file each; `generic` serves every other diffusers class.

A family module exports the names in `registry.exports`. `adapter_for` finds the module of a class, `build_meta` the
empty model of a checked configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..registry import Registry
from ._account import Entry, account
from ._config import build_meta, class_of, known_classes, with_defaults
from ._depth import Depth, Unit, depth_of, renamed, renumbered, shortened

__all__ = [
    "Depth",
    "Entry",
    "Unit",
    "account",
    "adapter_for",
    "build_meta",
    "class_of",
    "depth_of",
    "known_classes",
    "registry",
    "renamed",
    "renumbered",
    "shortened",
    "with_defaults",
]

registry = Registry(
    "ditcompress.models",
    "model family",
    (
        "CLASSES",
        "layout",
        "latent_shape",
        "default_scheduler",
        "random_conditions",
        "null_conditions",
        "default_guidance",
        "predict",
        "tiny",
    ),
)


def adapter_for(model_class: str | Mapping[str, Any]) -> ModuleType:
    """The family of a class name, or of a configuration; `generic` where no family names the class.

    Prefer the configuration: old checkpoints call DiT and PixArt alike "Transformer2DModel", and only the
    configuration tells them apart. Raises E321 for a class that diffusers does not have and E403 for remote code.
    """
    name = class_of(model_class if isinstance(model_class, Mapping) else {"_class_name": model_class})
    for family in registry.all().values():
        if name in family.CLASSES:
            return family
    return registry.get("generic")
