"""Our own reader of the safetensors header: every size is checked before anything is allocated.

File: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data. Offsets
must cover the data from its first to its last byte without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DitcompressError, printable
from ._files import COPY_AGAIN, label, no_duplicates, open_regular, place, regular_file

MOST_HEADER_BYTES = 32 << 20
MOST_TENSORS = 200_000
MOST_NAME = 512
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes `start:stop` of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def read_header(path: Path, root: Path | None = None) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and the metadata of one file. Raises E310 for a header that lies, E312 for a file that was cut."""
    size = regular_file(path, root).st_size
    with open_regular(path, root) as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8:
            raise DitcompressError("E312", label(path), f"file has {size} bytes, needs at least 8", COPY_AGAIN)
        if length > MOST_HEADER_BYTES:
            what = f"header of {length} bytes, at most {MOST_HEADER_BYTES} are read"
            raise DitcompressError("E310", label(path), what, COPY_AGAIN)
        if 8 + length > size:
            raise DitcompressError("E312", label(path), f"file has {size} bytes, header needs {8 + length}", COPY_AGAIN)
        raw = file.read(length)
    if len(raw) < length:
        raise DitcompressError("E312", label(path), f"the header ends {length - len(raw)} bytes early", COPY_AGAIN)
    table = _parse(raw, path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DitcompressError("E310", label(path), "__metadata__ is not a mapping of text", COPY_AGAIN)
    if len(table) > MOST_TENSORS:
        raise DitcompressError(
            "E310", label(path), f"{len(table)} tensors, at most {MOST_TENSORS} are read", COPY_AGAIN
        )
    entries = {name: _entry(name, fields, path, 8 + length) for name, fields in table.items()}
    _check_cover(entries, path, 8 + length, size)
    return entries, metadata


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise DitcompressError("E310", label(path), "header does not start with {", COPY_AGAIN)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DitcompressError(
            "E310", label(path), f"header is not JSON ({printable(error, 80)})", COPY_AGAIN
        ) from None
    if not isinstance(table, dict):
        raise DitcompressError("E310", label(path), "header is not a JSON object", COPY_AGAIN)
    return table


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _entry(name: str, fields: Any, path: Path, base: int) -> TensorEntry:
    where = place(path, name)
    if not name or len(name) > MOST_NAME or not name.isprintable():
        raise DitcompressError("E310", where, "is no legal tensor name", COPY_AGAIN)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise DitcompressError("E310", where, "its entry is not dtype, shape and data_offsets", COPY_AGAIN)
    dtype, shape, offsets = DTYPES.get(str(fields["dtype"])), fields["shape"], fields["data_offsets"]
    if dtype is None:
        raise DitcompressError(
            "E318", where, f"dtype {printable(fields['dtype'], 20)} is not supported", "convert to float32 or bfloat16"
        )
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise DitcompressError("E310", where, "shape or offsets are not counts", COPY_AGAIN)
    start, stop = offsets
    needed = math.prod(shape) * dtype.itemsize
    if stop - start != needed:
        raise DitcompressError("E310", where, f"{stop - start} bytes for a shape that needs {needed}", COPY_AGAIN)
    return TensorEntry(name, dtype, tuple(shape), path, base + start, base + stop)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _check_cover(entries: Mapping[str, TensorEntry], path: Path, base: int, size: int) -> None:
    """Data without holes or overlaps, and a file exactly as long as they need."""
    end = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != end:
            kind = "its data overlap the tensor before" if entry.start < end else "there is a hole before its data"
            raise DitcompressError("E310", place(path, entry.name), kind, COPY_AGAIN)
        end = entry.stop
    if size < end:
        raise DitcompressError("E312", label(path), f"file has {size} bytes, header needs {end}", COPY_AGAIN)
    if size > end:
        raise DitcompressError("E310", label(path), f"{size - end} bytes after the last tensor", COPY_AGAIN)


def read_tensor(entry: TensorEntry, expected: tuple[int, int, int] | None = None) -> Tensor:
    """The data of one tensor, writable, read with pread (a mapped file that shrinks would kill the process).

    E324 when size, time or inode of the file are no longer `expected`; E312 when it ends early; E323 for a boolean
    that is neither 0 nor 1.
    """
    where = place(entry.file, entry.name)
    length = entry.stop - entry.start
    data = bytearray(length)
    view = memoryview(data)
    with open(entry.file, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if expected is not None and (status.st_size, status.st_mtime_ns, status.st_ino) != expected:
            raise DitcompressError("E324", where, "the file changed while it was in use", "run again on a file at rest")
        done = 0
        while done < length:  # preadv returns at most 2 GB at once
            got = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], entry.start + done)
            if got == 0:
                raise DitcompressError("E312", where, f"the file ends {length - done} bytes early", COPY_AGAIN)
            done += got
    if length == 0:  # frombuffer refuses an empty buffer
        return torch.empty(entry.shape, dtype=entry.dtype)
    octets = torch.frombuffer(data, dtype=torch.uint8)
    if entry.dtype == torch.bool and int(octets.max()) > 1:
        raise DitcompressError("E323", where, "a boolean is neither 0 nor 1", COPY_AGAIN)
    return octets.view(entry.dtype).reshape(entry.shape)
