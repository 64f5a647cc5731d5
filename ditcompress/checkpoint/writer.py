"""Output appears whole or not at all: it is built in a hidden sibling folder and renamed when its manifest is written.

The order: lock, clean up after killed runs, check the target, build, manifest, fsync, rename the old result aside, the
new one in, remove the old one. A kill between the two renames leaves the old result under its hidden name; the next
run puts it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DitcompressError
from ._files import OTHER, open_regular
from ._files import os_errors as os_errors
from ._shards import ShardWriter as ShardWriter  # the door for everything that writes
from ._shards import damaged as damaged
from ._shards import load_atomic as load_atomic
from ._shards import save_atomic as save_atomic
from .manifest import NAME as MANIFEST
from .manifest import changed, is_ours, write_manifest
from .reader import Checkpoint


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
    _check_place(target, inputs)
    _check_space(target, planned_bytes)
    with os_errors(target):
        _make_parent(target)
        with _locked(target):
            _recover(target)
            _check_free(target, overwrite)  # under the lock: another run may just have finished
            partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:12]}")
            partial.mkdir()
            try:
                yield partial
                write_manifest(partial, manifest)
                _publish(partial, target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


def _check_place(target: Path, inputs: Sequence[Path]) -> None:
    """Not a link, not the root, and neither an input nor around or inside one."""
    if not target.name:
        raise DitcompressError("E501", target, "is the root folder", OTHER)
    if target.is_symlink():
        raise DitcompressError("E402", target, "is a symbolic link", "give the folder itself")
    real = target.resolve()
    for given in inputs:
        source = Path(given).resolve()
        if real == source:
            raise DitcompressError("E501", target, "is the input", OTHER)
        if source in real.parents and source.is_dir():
            raise DitcompressError("E501", target, "lies inside the input", OTHER)
        if real in source.parents:
            raise DitcompressError("E501", target, "contains the input", OTHER)


def _check_space(target: Path, planned_bytes: int) -> None:
    existing = next(folder for folder in target.parents if folder.exists())
    needed, free = int(planned_bytes * 1.05), shutil.disk_usage(existing).free
    if needed > free:
        what = f"needs {needed} bytes, {free} are free"
        raise DitcompressError("E601", target, what, f"free some space, or {OTHER}")


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise DitcompressError("E603", target, "a parent of it is a file", OTHER) from None


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    filled = not target.is_dir() or any(target.iterdir())
    if filled and not is_ours(target):
        raise DitcompressError("E501", target, "exists and is no result of ditcompress", OTHER)
    if filled and not overwrite:
        raise DitcompressError("E501", target, "exists already", "give --overwrite or another --out")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """An flock beside the target; the kernel frees it however the process ends."""
    path = target.with_name(f".{target.name}.lock")
    if path.is_symlink():
        raise DitcompressError("E402", path, "is a symbolic link", "remove it")
    handle = _lock(path, target)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while we hold it: see _lock
        os.close(handle)


def _lock(path: Path, target: Path) -> int:
    """A handle that holds the lock. A holder removes the file, so ours must still be the one of that name."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BlockingIOError:
            os.close(handle)
            raise DitcompressError(
                "E502", target, "another run is writing it", "wait for it, or choose another --out"
            ) from None
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _siblings(target: Path, kind: str) -> list[Path]:
    return sorted(p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}.{kind}-"))


def _recover(target: Path) -> None:
    """Clean up after killed runs, under the lock: a result set aside comes back when nothing replaced it."""
    for partial in _siblings(target, "partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for old in _siblings(target, "old"):
        if not target.exists() and is_ours(old):
            os.rename(old, target)
        else:
            shutil.rmtree(old, ignore_errors=True)


def _publish(partial: Path, target: Path) -> None:
    """Make everything durable, then swap the folders by renaming."""
    below = sorted(partial.rglob("*"))
    for path in [*(p for p in below if p.is_file()), *(p for p in below if p.is_dir()), partial]:
        _sync(path)
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:12]}")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException:
        if old.exists() and not target.exists():
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


def copy_rest(checkpoint: Checkpoint, partial: Path) -> None:
    """What a written model needs beside itself: its pipeline's other components, or else its own scheduler."""
    if checkpoint.pipeline:
        copy_pipeline(checkpoint.pipeline, partial, checkpoint.component)
    elif checkpoint.scheduler_folder:
        name = "scheduler_config.json"
        (partial / "scheduler").mkdir(exist_ok=True)
        (partial / "scheduler" / name).write_bytes((checkpoint.scheduler_folder / name).read_bytes())


def copy_pipeline(pipeline: Path, partial: Path, component: str) -> None:
    """Copy model_index.json and the folder of every other component.

    Only regular files inside the pipeline are copied (E402), with the rights of the umask.
    """
    shown = sorted(p for p in pipeline.iterdir() if not p.name.startswith(".") and p.name != component)
    for path in shown:
        if path.is_dir():
            for source in sorted(path.rglob("*")):
                if source.is_symlink() or not source.is_dir():
                    _copy(source, partial / source.relative_to(pipeline), pipeline)
        elif path.name == "model_index.json":
            _copy(path, partial / path.name, pipeline)


def copy_result(folder: Path, partial: Path) -> None:
    """Copy a model or pipeline folder, without hidden files and its manifest, which the new folder gets anew.

    Copies, not links: a change to one folder must not reach into the other. Only regular files inside it (E402).
    """
    for source in sorted(folder.rglob("*")):
        inside = source.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not hidden and inside.as_posix() != MANIFEST and (source.is_symlink() or not source.is_dir()):
            _copy(source, partial / inside, folder)


def linked(folder: Path, target: Path, leave: Sequence[str] = ()) -> None:
    """Put the files of a work folder into a new one as well, without a second copy where the file system can."""

    def put(source: str, place: str) -> None:
        try:
            os.link(source, place)
        except OSError:
            shutil.copy2(source, place)

    shutil.copytree(folder, target, copy_function=put, ignore=shutil.ignore_patterns(*leave), dirs_exist_ok=True)


def emptied(folder: Path) -> None:
    """Remove what is in a folder."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _copy(source: Path, target: Path, root: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source, root) as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)


# --- resumable work --------------------------------------------------------------------------------------------------


def work_folder(target: Path, marks: Mapping[str, Any], restart: bool = False) -> Path:
    """`.<name>.work` beside the target, for the finished parts of an interrupted run.

    It belongs to one fingerprint `marks` (JSON values); E503 names what changed since, `restart` begins anew. Call it
    while `output_folder` holds the lock of the target.
    """
    target = Path(os.path.abspath(target))
    folder = work_of(target)
    marks = json.loads(json.dumps(marks))
    if folder.is_symlink():
        raise DitcompressError("E402", folder, "is a symbolic link", "remove it")
    with os_errors(folder):
        _make_parent(target)
        note = folder / "fingerprint.json"
        if note.is_file() and not restart:
            found = _read_note(note)
            if found != marks:
                what = f"an interrupted run differs in {changed(found, marks)}"
                raise DitcompressError("E503", folder, what, "give --restart, or another --out")
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        part = folder / "fingerprint.part"
        part.write_text(json.dumps(marks, sort_keys=True))
        os.replace(part, note)  # a killed run leaves a whole fingerprint or none
    return folder


def work_of(target: Path) -> Path:
    """Where the work folder of a target is."""
    return target.with_name(f".{target.name}.work")


def _read_note(note: Path) -> dict[str, Any]:
    try:
        found = json.loads(note.read_text())
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"fingerprint.json": "unreadable"}


def remove_work(folder: Path | None) -> None:
    """The parts are not needed any more."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def kept_work(folder: Path | None) -> Iterator[None]:
    """When the block fails, its work folder stays only if there is something in it to go on from."""
    try:
        yield
    except BaseException:
        if folder is not None and not any(p.is_file() and p.name != "fingerprint.json" for p in folder.rglob("*")):
            remove_work(folder)
        raise
