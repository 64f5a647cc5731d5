"""manifest.json: written last, it says that a result is whole and what each file holds (size and sha256)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DitcompressError, printable, some
from ._files import json_object, read_bounded

MOST_BYTES = 64 << 20

NAME = "manifest.json"
COPY_RESULT = "copy the result again"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def write_manifest(folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Record every file below `folder`; `extra` holds the recipe, seed and input fingerprint."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    value = {"tool": "ditcompress", "version": 1, **(extra or {}), "files": files}
    (folder / NAME).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; E302 when the folder has none of ours."""
    try:
        value = json_object(read_bounded(folder / NAME, MOST_BYTES), NAME)
    except DitcompressError:
        raise DitcompressError("E302", folder, "has no manifest of ditcompress", "give a finished result") from None
    if value.get("tool") != "ditcompress" or not isinstance(value.get("files"), dict):
        raise DitcompressError("E302", folder / NAME, "is not a manifest of ditcompress", "give a finished result")
    return value


def verify_manifest(folder: Path) -> None:
    """E323 names the first file that is missing or whose size or sha256 differs."""
    for name, facts in read_manifest(folder)["files"].items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or "\0" in name:
            raise DitcompressError("E402", f"{folder.name}/{NAME}", f"lists {name}", "compress the original again")
        where = f"{printable(folder.name, 40)}/{printable(name, 70)}"
        if not path.is_file():
            raise DitcompressError("E323", where, "is in the manifest but missing", COPY_RESULT)
        said = facts if isinstance(facts, dict) else {}
        size = path.stat().st_size
        if size != said.get("bytes"):
            raise DitcompressError("E323", where, f"{size} bytes, the manifest says {said.get('bytes')}", COPY_RESULT)
        if sha256(path) != said.get("sha256"):
            raise DitcompressError("E323", where, "its sha256 is not the recorded one", COPY_RESULT)


def is_ours(folder: Path) -> bool:
    """Whether a folder is a finished result of ours (and may be replaced)."""
    try:
        read_manifest(folder)
    except DitcompressError:
        return False
    return True


def changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The names of the fields in which two fingerprints differ."""
    return some(key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key))
