"""Where tensors come from: a checkpoint on disk, or a diffusers model in memory with the same few methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

COPIES = "ditcompress_shared"  # of a model in which modules stand in several places: those that are not stored


class TensorSource(Protocol):
    """What compression reads: a configuration and tensors by name."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def class_name(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Shape:
    """The header of a tensor in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class ModuleSource:
    """A diffusers model in memory as a source; the model is not changed by reading from it."""

    pipeline: Path | None = None
    scheduler_folder: Path | None = None

    def __init__(self, model: nn.Module) -> None:
        config = dict(model.config)  # type: ignore[arg-type]
        self.config: dict[str, Any] = {**config, "_class_name": type(model).__name__}
        state = model.state_dict()
        copies = tuple(f"{path}." for path in getattr(model, COPIES, ()))
        self._state = {name: tensor for name, tensor in state.items() if not (copies and name.startswith(copies))}
        self.tensors = {name: Shape(t.dtype, tuple(t.shape)) for name, t in sorted(self._state.items())}

    @property
    def class_name(self) -> str:
        return str(self.config["_class_name"])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and the names, dtypes, shapes and bytes of every tensor."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for name, shape in self.tensors.items():
            digest.update(f"{name} {shape}".encode())
            digest.update(self._state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        return self._state[name].detach().clone()
