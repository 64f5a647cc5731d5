"""Other people's networks, never downloaded: local files below --weights-dir, each pinned by its sha256 in SHA256SUMS.

SHA256SUMS is what `sha256sum` prints ("<64 hex digits>  <name>", with names relative to the folder), so a user makes
it with one command and everyone can check it with another.
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch import Tensor

from ..checkpoint.manifest import sha256
from ..errors import printable

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_MOST_BYTES = 16 << 20
MODEL_FILES = (".json", ".txt", ".safetensors", ".model")  # what transformers reads from a model folder


class Unavailable(Exception):
    """A metric that cannot be measured here; its text is the one-line reason."""


def library(name: str, package: str) -> ModuleType:
    """The imported module, or Unavailable with what to install: a broken installation (torchvision beside another torch
    raises RuntimeError, AttributeError...) is no different from a missing one."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"{name} cannot be imported ({first_line(error)}); pip install '{package}'") from None


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, on one line."""
    lines = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 200)


class Place(Protocol):
    """Where weights may be found and where they run: what a metric or an extractor is asked with."""

    @property
    def weights(self) -> Path | None: ...

    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Pinned:
    """A file or a folder below the weights folder whose every used file has the pinned sha256."""

    path: Path
    note: str  # name and the first digits of the sha256 of its largest file: the identity of the extractor


def pinned(place: Place, name: str, most: int = 200) -> Pinned:
    """The file or model folder `name`, checked against SHA256SUMS; Unavailable otherwise."""
    if place.weights is None:
        raise Unavailable(f"needs {name}: give --weights-dir")
    root = Path(os.path.abspath(place.weights))
    path = root / name
    if not path.exists():
        raise Unavailable(f"{name} is not in the weights folder {printable(place.weights, 80)}")
    files = _model_files(path) if path.is_dir() else [path]
    if not files or len(files) > most:
        raise Unavailable(f"{name} has {len(files)} model files, expected 1 to {most}")
    sums = read_sums(root)
    found = {file: _checked(file, file.relative_to(root).as_posix(), sums) for file in files}
    largest = max(files, key=lambda file: file.stat().st_size)
    return Pinned(path, f"{largest.relative_to(root).as_posix()} sha256 {found[largest][:12]}")


def read_sums(root: Path) -> dict[str, str]:
    """Names and sha256 from SHA256SUMS; Unavailable where it is missing or not in the format of sha256sum."""
    path = root / SUMS
    if not path.is_file():
        raise Unavailable(f"the weights are not pinned: run `sha256sum $(find -L . -type f) > {SUMS}` in their folder")
    if path.stat().st_size > _MOST_BYTES:
        raise Unavailable(f"{SUMS} is over {_MOST_BYTES} bytes")
    sums = {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise Unavailable(f"{SUMS} line {number} is not in the format of sha256sum")
        sums[match[2].removeprefix("./")] = match[1].lower()
    return sums


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a pickle that holds nothing but tensors and plain values."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return plain_pickle(path)


def plain_pickle(path: Path) -> dict[str, Tensor]:
    """torch.load with weights_only: runs no code of the file. Unavailable where the file wants more than that."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Unavailable(f"{path.name} is not a plain pickle of tensors ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise Unavailable(f"{path.name} holds a {type(found).__name__}, not a dictionary of tensors")
    return found


def _model_files(folder: Path) -> list[Path]:
    """Files directly in a model folder; other weight formats beside the safetensors are never opened."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in MODEL_FILES)


def _checked(file: Path, name: str, sums: dict[str, str]) -> str:
    if name not in sums:
        raise Unavailable(f"{name} is not pinned in {SUMS}: run `sha256sum {name} >> {SUMS}`")
    stat = file.stat()
    if _digest(file, stat.st_size, stat.st_mtime_ns) != sums[name]:
        raise Unavailable(f"{name} does not have the sha256 pinned in {SUMS}")
    return sums[name]


@lru_cache(maxsize=1024)
def _digest(file: Path, size: int, changed: int) -> str:
    """Hashed once for all metrics of a run; `size` and `changed` make another content another key."""
    return sha256(file)
