"""Files and JSON from strangers: regular files inside the folder that was given, strict JSON of modest size."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DitcompressError, printable

MOST_CONFIG_BYTES = 8 << 20
MOST_INDEX_BYTES = 64 << 20  # 200 000 names of 300 characters
MOST_DEPTH = 32
COPY_AGAIN = "copy the file again"
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
OTHER = "choose another --out"
_LINKED = "give the folder with the files themselves (cp -rL)"


def label(path: Path) -> str:
    """Folder and file name, short enough that an error line keeps both."""
    return f"{printable(path.parent.name, 40)}/{printable(path.name, 70)}"


def place(file: Path, tensor: str) -> str:
    """File and tensor; the folder is left out so that both names fit into one line."""
    return f"{printable(file.name, 50)}: {printable(tensor, 68)}"


def more(names: list[str]) -> str:
    """', and 3 more' after the first of some names."""
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def regular_file(path: Path, root: Path | None = None) -> os.stat_result:
    """The file's status. E311 when it is missing, E402 when it is a folder, pipe or device, or lies outside `root`.

    Links are followed only to files below `root` (default: the file's own folder) or, in a download cache of the
    Hub (models--X/snapshots/REV, all links), below that model's blobs.
    """
    try:
        real = path.resolve(strict=True)
        status = os.stat(real)
    except FileNotFoundError:
        raise DitcompressError("E311", label(path), "the file is missing", COPY_AGAIN) from None
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, no right to look
        raise DitcompressError("E311", label(path), f"cannot be opened ({error})", COPY_AGAIN) from None
    if not any(real.is_relative_to(place) for place in _allowed((root or path.parent).resolve())):
        raise DitcompressError("E402", label(path), f"leads outside its folder, to {real}", _LINKED)
    if not stat.S_ISREG(status.st_mode):
        raise DitcompressError("E402", label(path), "is not a regular file", "put the file itself in the folder")
    return status


def _allowed(root: Path) -> list[Path]:
    """`root`, and the blobs of the model when `root` is part of a Hub cache."""
    caches = [
        place.parent.parent / "blobs"
        for place in (root, *root.parents)
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")
    ]
    return [root, *caches]


def open_regular(path: Path, root: Path | None = None) -> BinaryIO:
    """Open for unbuffered reading what `regular_file` accepts; E301 without the right to read it."""
    regular_file(path, root)
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DitcompressError("E301", label(path), f"cannot be read ({error.strerror})", "allow reading it") from None


def read_bounded(path: Path, most: int, root: Path | None = None) -> bytes:
    """A whole small file; E320 when it is larger than `most` bytes."""
    size = regular_file(path, root).st_size
    if size > most:
        raise DitcompressError("E320", label(path), f"{size} bytes, at most {most} are read", "restore the original")
    with open_regular(path, root) as file:
        return file.read(most)


def json_object(data: bytes | str, where: str, code: str = "E320") -> dict[str, Any]:
    """A JSON object: UTF-8, no key twice, no NaN, modest depth; anything else is an error `code`."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise DitcompressError(
            code, where, f"is not JSON ({printable(error, 80)})", "restore the original file"
        ) from None
    if not isinstance(value, dict):
        raise DitcompressError(code, where, "is not a JSON object", "restore the original file")
    if _depth(value) > MOST_DEPTH:
        raise DitcompressError(code, where, f"is nested deeper than {MOST_DEPTH}", "restore the original file")
    return value


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _depth(value: Any) -> int:
    """Depth of nesting, without recursion."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            stack += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list):
            stack += [(child, depth + 1) for child in item]
    return deepest


@contextmanager
def os_errors(where: Path) -> Iterator[None]:
    """Full disks (E601) and places that cannot be written (E603) as errors of ours."""
    try:
        yield
    except OSError as error:
        named = label(Path(os.fsdecode(error.filename))) if isinstance(error.filename, (str, bytes)) else where
        if error.errno in _FULL:
            raise DitcompressError("E601", named, "the disk is full", f"free some space, or {OTHER}") from None
        if error.errno in _DENIED:
            raise DitcompressError("E603", named, f"cannot be written ({error.strerror})", OTHER) from None
        raise
