"""Tensors to safetensors files, streamed: memory holds one tensor, the disk no more than the result.

Data are written as they come, to the very file that will hold them; when a file is whole its data are moved back by the
length of the header, last part first. The bytes depend on nothing but names, order, dtypes, shapes and values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DitcompressError, printable
from ._files import os_errors
from ._folder import STEM
from .header import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PART = 1 << 24


class ShardWriter:
    """Streams tensors into one safetensors file, or several with an index when they outgrow `max_shard_bytes`.

    `metadata` is stored as one JSON text under the key `ditcompress`, beside the `format` that diffusers asks for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stem: str = STEM,
        max_shard_bytes: int = 5 * 2**30,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.stem, self.limit = Path(folder), stem, max_shard_bytes
        self.metadata = _texts(metadata)
        self._shards: list[tuple[Path, dict[str, Any]]] = []
        self._table: dict[str, Any] = {}
        self._names: set[str] = set()
        self._offset = 0
        self._held = 0  # offset up to which the open file grows whatever the limit
        self._file: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; a name may be added once. E318 for a dtype that safetensors files do not hold."""
        if name in self._names:
            raise ValueError(f"tensor {name} was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._offset and self._offset + size > max(self.limit, self._held):
            self._close()
        if self._file is None:
            self._file = open(self.folder / f".{self.stem}-{len(self._shards):05d}.data", "w+b")  # noqa: SIM115
        self._names.add(name)
        self._table[name] = _fields(name, tensor, self._offset)
        _write(self._file, tensor)
        self._offset += size

    def keep_together(self, size: int) -> None:
        """The tensors added next, `size` bytes in all, go to one file, even if that makes it larger than the limit."""
        if self._offset and self._offset + size > self.limit:
            self._close()
        self._held = self._offset + size

    def _close(self) -> None:
        """Put the header in front of the data of the open shard."""
        assert self._file is not None
        with self._file as file:
            _insert(file, _header(self._table, self.metadata))
        self._shards.append((Path(file.name), self._table))
        self._file, self._table, self._offset, self._held = None, {}, 0, 0

    def finish(self) -> list[Path]:
        """Give the files their names and write the index where there are several; the files in order."""
        if self._file is not None:
            self._close()
        count, files, total = len(self._shards), [], 0
        weight_map: dict[str, str] = {}
        for number, (data, table) in enumerate(self._shards, 1):
            name = f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            os.rename(data, self.folder / name)
            files.append(self.folder / name)
            weight_map |= dict.fromkeys(table, name)
            total += sum(fields["data_offsets"][1] - fields["data_offsets"][0] for fields in table.values())
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return files


def save_atomic(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """One safetensors file, renamed into place when it is whole and on the disk. E601 on a full disk."""
    table: dict[str, Any] = {}
    offset = 0
    for name in sorted(tensors):
        table[name] = _fields(name, tensors[name], offset)
        offset = table[name]["data_offsets"][1]
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with os_errors(path):
            with open(part, "wb") as file:
                file.write(_header(table, _texts(metadata)))
                for name in table:
                    _write(file, tensors[name])
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_atomic(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of such a file and its metadata; E503 for one that was damaged since."""
    try:
        with safe_open(str(path), "pt") as file:
            facts = json.loads((file.metadata() or {}).get("ditcompress", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> DitcompressError:
    """E503 for a file that an interrupted run should go on from."""
    return DitcompressError("E503", path, f"is damaged ({type(error).__name__})", "give --restart to begin anew")


def _texts(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    own = {} if metadata is None else {"ditcompress": json.dumps(metadata, sort_keys=True)}
    return {**own, "format": "pt"}


def _fields(name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    if tensor.dtype not in _NAMES:
        raise DitcompressError("E318", printable(name, 100), f"{tensor.dtype} cannot be stored", "convert it first")
    stop = start + tensor.numel() * tensor.element_size()
    return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}


def _header(table: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _insert(file: BinaryIO, head: bytes) -> None:
    """Move the contents of `file` back by len(head), the last part first, and write `head` before them."""
    size = file.seek(0, os.SEEK_END)
    for start in reversed(range(0, size, _PART)):
        file.seek(start)
        part = file.read(min(_PART, size - start))
        file.seek(start + len(head))
        file.write(part)
    file.seek(0)
    file.write(head)
