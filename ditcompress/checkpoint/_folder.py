"""What a checkpoint folder holds: the transformer of a pipeline, its weight files, and their tensors.

Rules: an index and its shards name the same tensors; a weight file that nothing names is an error, because loaders
that read every file they find have taken stale shards for weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DitcompressError, printable, some
from ._files import (
    COPY_AGAIN,
    MOST_CONFIG_BYTES,
    MOST_INDEX_BYTES,
    json_object,
    label,
    more,
    place,
    read_bounded,
    regular_file,
)
from .header import TensorEntry, read_header

STEM = "diffusion_pytorch_model"
COMPONENTS = ("transformer", "dit", "prior")
_LIBRARIES = ("diffusers", "ditcompress")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}(\..+)?\.safetensors")
_INDEX = re.compile(r".+\.safetensors\.index(\.[\w-]+)?\.json")
_VARIANT = re.compile(rf"{STEM}(\.[\w-]+(-\d{{5}}-of-\d{{5}})?|-\d{{5}}-of-\d{{5}}\.[\w-]+)\.safetensors")


def read_config(path: Path, root: Path | None = None) -> dict[str, Any]:
    """config.json: E320 when it is missing or no JSON object, E403 when it wants code to be run."""
    try:
        data = read_bounded(path, MOST_CONFIG_BYTES, root)
    except DitcompressError as error:
        if error.code == "E311":
            raise DitcompressError("E320", label(path), error.what, COPY_AGAIN) from None
        raise
    config = json_object(data, label(path))
    check_config(config, label(path))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """A class must be named by text, and no code of the folder be asked for."""
    if config.get("auto_map") or isinstance(config.get("_class_name"), list):
        raise DitcompressError(
            "E403", where, "asks for code from the folder to be run", "use a model class that diffusers ships"
        )
    if not isinstance(config.get("_class_name"), str):
        raise DitcompressError(
            "E320", f"{where}: _class_name", "names no model class", "restore the original config.json"
        )


def component_of(pipeline: Path) -> str:
    """The name of the transformer's folder in a pipeline; E403 when its class is not one of diffusers."""
    path = pipeline / "model_index.json"
    index = read_config(path)
    for name in COMPONENTS:
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            continue
        if entry[0] not in _LIBRARIES:
            raise DitcompressError(
                "E403", f"{label(path)}: {name}", f"wants the code {entry[0]}", "use a model class that diffusers ships"
            )
        regular_file(pipeline / name / "config.json", pipeline)
        return name
    raise DitcompressError("E302", label(path), "names no transformer", "give the model folder itself")


def weight_files(folder: Path, root: Path) -> tuple[list[Path], Mapping[str, Any] | None]:
    """The weight files in name order and the parsed index, or None for a single file.

    Beside plain names those of a variant (`.fp16.`) may stand; the plain ones are used, as diffusers does.
    """
    found = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    present = [p for p in found if p.name.endswith(".safetensors")]
    plain = [p for p in present if not _VARIANT.fullmatch(p.name)]
    indices = [p for p in found if _INDEX.fullmatch(p.name)]
    plain_indices = [p for p in indices if p.name.endswith(".index.json")]
    if plain or plain_indices:
        present, indices = plain, plain_indices
    if len(indices) > 1:
        names = some(i.name for i in indices)
        raise DitcompressError("E314", label(folder), f"{len(indices)} index files: {names}", "keep one of them")
    if indices:
        return _indexed(folder, root, indices[0], present)
    if not present:
        raise _no_weights(folder, found)
    if any(_SHARD.fullmatch(p.name) for p in present):
        remedy = f"copy {STEM}.safetensors.index.json"
        raise DitcompressError("E314", label(folder), "there are shards without an index file", remedy)
    if len(present) > 1:
        stale = next(p for p in present if p.name != f"{STEM}.safetensors")
        what = f"is one of {len(present)} weight files, and no index says which count"
        raise DitcompressError("E313", label(stale), what, "leave one weight file in the folder")
    return present, None


def _indexed(folder: Path, root: Path, path: Path, present: list[Path]) -> tuple[list[Path], Mapping[str, Any]]:
    """The files that the index names, each a plain name in the folder; no other may lie there."""
    index = json_object(read_bounded(path, MOST_INDEX_BYTES, root), label(path), "E314")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise DitcompressError("E314", label(path), "has no weight_map of tensor to file", COPY_AGAIN)
    names = sorted(set(weight_map.values()))
    for name in names:
        plain = name == os.path.basename(name) and "\\" not in name and name.isprintable() and name[:1] != "."
        if not plain or not name.endswith(".safetensors"):
            what = f"names the file {printable(name, 60)}"
            raise DitcompressError("E402", label(path), what, "shards must be plain names in the folder")
    for file in present:
        if file.name not in names:
            raise DitcompressError(
                "E313", label(file), "the index does not list this file", "remove the file or restore its index"
            )
    for name in names:
        regular_file(folder / name, root)
    return [folder / name for name in names], index


def _no_weights(folder: Path, found: list[Path]) -> DitcompressError:
    pickles = [p for p in found if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        what = f"holds {pickles[0].name} and no safetensors"
        return DitcompressError("E311", label(folder), what, "get the safetensors version of this model")
    path = folder / f"{STEM}.safetensors"
    return DitcompressError("E311", label(path), "the folder holds no safetensors weights", COPY_AGAIN)


def gather(files: list[Path], index: Mapping[str, Any] | None, root: Path) -> dict[str, TensorEntry]:
    """Every tensor of every file in name order; E314 or E315 when index and shards do not name the same ones."""
    weight_map = index["weight_map"] if index is not None else None
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        entries, _ = read_header(file, root)
        for name, entry in entries.items():
            where = place(file, name)
            if name in tensors:
                raise DitcompressError("E314", where, f"stands in {tensors[name].file.name} too", COPY_AGAIN)
            if weight_map is not None and weight_map.get(name) != file.name:
                said = printable(weight_map.get(name, "no file"), 60)
                raise DitcompressError("E314", where, f"the index says {said}", COPY_AGAIN)
            tensors[name] = entry
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing and weight_map is not None:
        where = place(Path(weight_map[missing[0]]), missing[0])
        raise DitcompressError("E315", where, f"in the index, not in the file{more(missing)}", COPY_AGAIN)
    if not tensors:
        raise DitcompressError("E315", label(files[0]), "the weight files hold no tensor", COPY_AGAIN)
    _check_total(index, tensors, files[0].parent)
    return dict(sorted(tensors.items()))


def _check_total(index: Mapping[str, Any] | None, tensors: Mapping[str, TensorEntry], folder: Path) -> None:
    """`metadata.total_size`, where an index has one, is the number of bytes of all tensors."""
    metadata = (index or {}).get("metadata", {})
    said = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    total = sum(entry.stop - entry.start for entry in tensors.values())
    if said is not None and (type(said) not in (int, float) or said != total):
        what = f"total_size is {printable(said, 40)}, the shards hold {total} bytes"
        raise DitcompressError("E314", f"{label(folder)}: index", what, "copy index and shards again from one place")
