"""Output appears whole or not at all: it is built in a hidden sibling folder and renamed when its manifest is written.

Shards are streamed: tensor data go to a temporary file as they come, the header is put in front when the shard closes,
so memory never holds more than one tensor. The bytes depend on nothing but names, dtypes, shapes and values.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import DitcompressError
from .header import DTYPES
from .manifest import changed, is_ours, write_manifest
from .reader import STEM

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EROFS, errno.EPERM)


@contextmanager
def os_errors(where: Path) -> Iterator[None]:
    """Full disks and missing rights as errors of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DitcompressError(
                "E601", where, "the disk is full", "free some space, or choose another --out"
            ) from None
        if error.errno in _DENIED:
            raise DitcompressError("E603", where, "cannot be written", "choose another --out") from None
        raise


@contextmanager
def output_folder(
    target: Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    planned_bytes: int = 0,
    manifest: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """A folder to build in; it becomes `target` when the block ends without an exception, and is removed otherwise.

    An existing target is replaced only with `overwrite` and only when it is a result of ours (E501). One writer at a
    time (E502). `manifest` goes into manifest.json beside the list of files.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite, inputs)
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if planned_bytes * 1.05 > free:
        raise DitcompressError("E601", target, f"needs {planned_bytes} bytes, {free} are free", "choose another --out")
    with _locked(target), os_errors(target):
        for stale in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)  # left by a killed run; we hold the lock
        partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:12]}")
        partial.mkdir()
        try:
            yield partial
            write_manifest(partial, manifest)
            _publish(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _check_target(target: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    if target.is_symlink():
        raise DitcompressError("E402", target, "is a symbolic link", "give the folder itself")
    for given in inputs:
        source = Path(given).resolve()
        if target.resolve() == source or (source in target.resolve().parents and source.is_dir()):
            raise DitcompressError("E501", target, "lies inside the input", "choose another --out")
        if target.resolve() in source.parents:
            raise DitcompressError("E501", target, "contains the input", "choose another --out")
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not is_ours(target)):
        raise DitcompressError("E501", target, "exists and is no result of ditcompress", "choose another --out")
    if any(target.iterdir()) and not overwrite:
        raise DitcompressError("E501", target, "exists already", "give --overwrite or another --out")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """An flock beside the target; the kernel frees it however the process ends."""
    path = target.with_name(f".{target.name}.lock")
    with os_errors(target):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise DitcompressError(
            "E502", target, "another run is writing it", "wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(handle)


def _publish(partial: Path, target: Path) -> None:
    """Make everything durable, then swap the folders by renaming."""
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            _sync(path)
    for folder in [*(p for p in partial.rglob("*") if p.is_dir()), partial]:
        _sync(folder)
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:12]}")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- tensors ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Streams tensors into one safetensors file, or several with an index when they outgrow `max_shard_bytes`.

    `metadata` is stored as one JSON text (two keys would make the library's own byte order random).
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
        self.metadata = {"format": "pt"}
        if metadata is not None:
            self.metadata["ditcompress"] = json.dumps(metadata, sort_keys=True)
        self._shards: list[tuple[Path, dict[str, Any]]] = []
        self._table: dict[str, Any] = {}
        self._names: set[str] = set()
        self._offset = 0
        self._data: Any = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; a name may be added once."""
        if name in self._names:
            raise ValueError(f"tensor {name} was added twice")
        data = tensor.detach().contiguous().cpu()
        size = data.numel() * data.element_size()
        if self._data is not None and self._offset + size > self.limit and self._offset:
            self._close()
        if self._data is None:
            path = self.folder / f".{self.stem}-{len(self._shards):05d}.data"
            self._data = open(path, "wb")  # noqa: SIM115 - closed in _close, across calls
        self._names.add(name)
        stop = self._offset + size
        self._table[name] = {
            "dtype": _NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self._offset, stop],
        }
        if size:
            self._data.write(data.flatten().view(torch.uint8).numpy().data)
        self._offset = stop

    def _close(self) -> None:
        self._data.close()
        self._shards.append((Path(self._data.name), self._table))
        self._data, self._table, self._offset = None, {}, 0

    def finish(self) -> list[Path]:
        """Put the headers in front and write the index where there are several shards; the files in order."""
        if self._data is not None:
            self._close()
        count = len(self._shards)
        files: list[Path] = []
        weight_map: dict[str, str] = {}
        for number, (data, table) in enumerate(self._shards):
            name = (
                f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{number + 1:05d}-of-{count:05d}.safetensors"
            )
            _with_header(self.folder / name, table, self.metadata, data)
            files.append(self.folder / name)
            weight_map |= dict.fromkeys(table, name)
        if count > 1:
            total = sum(
                t["data_offsets"][1] - t["data_offsets"][0] for _, table in self._shards for t in table.values()
            )
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return files


def _with_header(path: Path, table: Mapping[str, Any], metadata: Mapping[str, str], data: Path) -> None:
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **table}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as out, open(data, "rb") as body:
        out.write(len(header).to_bytes(8, "little"))
        out.write(header)
        shutil.copyfileobj(body, out, 1 << 24)
    data.unlink()


def save_atomic(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """One small safetensors file, renamed into place when whole."""
    text = {"ditcompress": json.dumps(metadata, sort_keys=True)} if metadata is not None else None
    body = save({name: tensors[name].detach().contiguous().cpu() for name in sorted(tensors)}, text)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with os_errors(path):
            part.write_bytes(body)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def copy_pipeline(pipeline: Path, partial: Path, component: str) -> None:
    """Copy model_index.json and the folder of every other component; links are refused (E402)."""
    for path in sorted(pipeline.iterdir()):
        if (
            path.name == component
            or path.name.startswith(".")
            or not (path.is_dir() or path.name == "model_index.json")
        ):
            continue
        if path.is_symlink() or any(p.is_symlink() for p in path.rglob("*")):
            raise DitcompressError("E402", path, "holds symbolic links", "copy the pipeline with its files (cp -rL)")
        if path.is_dir():
            shutil.copytree(path, partial / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, partial / path.name)


# --- resumable work --------------------------------------------------------------------------------------------------


def work_folder(target: Path, marks: Mapping[str, Any], restart: bool = False) -> Path:
    """`.<name>.work` beside the target, for the finished parts of an interrupted run.

    It belongs to one fingerprint `marks`; E503 names what changed since, `restart` begins anew.
    """
    folder = target.with_name(f".{target.name}.work")
    marks = json.loads(json.dumps(marks))
    with os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        note = folder / "fingerprint.json"
        if folder.is_dir() and not restart and note.is_file():
            try:
                found = json.loads(note.read_text())
            except ValueError:
                found = {"fingerprint": "unreadable"}
            if found != marks:
                raise DitcompressError(
                    "E503",
                    folder,
                    f"an interrupted run differs in {changed(found, marks)}",
                    "give --restart, or another --out",
                )
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        note.write_text(json.dumps(marks, sort_keys=True))
    return folder


def remove_work(folder: Path | None) -> None:
    """The parts are not needed any more."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
