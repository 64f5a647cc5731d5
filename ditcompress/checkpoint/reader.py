"""Checkpoints: validated headers first, tensors when asked for. Nothing is trusted before it is checked.

Accepted: a diffusers model folder (one file or shards), a pipeline folder (its transformer), one .safetensors file
with config.json beside it or in its metadata, and the original DiT or SiT .pt (see legacy.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import Reporter, Silent
from ..errors import DitcompressError, printable, some
from .header import COPY_AGAIN, TensorEntry, read_header, regular_file

MOST_CONFIG_BYTES = 8 << 20
MOST_DEPTH = 32
STEM = "diffusion_pytorch_model"
_SHARD = re.compile(r"^(?P<stem>.+)-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, sizes and dtypes have been checked; its data are read tensor by tensor.

    `path` is what was given, `folder` holds config.json and weights, `pipeline` is the pipeline folder or None,
    `component` the name of `folder` in it.
    """

    path: Path
    folder: Path
    pipeline: Path | None
    component: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    snapshot: Mapping[Path, tuple[int, int, int]]
    memory: Mapping[str, Tensor] | None = None  # converted legacy checkpoints are held in memory

    @property
    def class_name(self) -> str:
        return str(self.config.get("_class_name", ""))

    @property
    def quantization(self) -> dict[str, Any] | None:
        return self.config.get("quantization_config")

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.tensors.values())

    @property
    def scheduler_folder(self) -> Path | None:
        """The folder with the checkpoint's own scheduler, or None."""
        places = [
            self.pipeline,
            self.folder,
            self.folder.parent if (self.folder.parent / "model_index.json").is_file() else None,
        ]
        for place in places:
            if place is not None and (place / "scheduler" / "scheduler_config.json").is_file():
                return place / "scheduler"
        return None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and the contents of every weight file, in name order."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self.files, key=lambda f: f.name):
            digest.update(file.name.encode())
            with open(file, "rb") as stream:
                while part := stream.read(1 << 24):
                    digest.update(part)
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """One tensor in its own dtype, writable; E315 for a name that is not there, E312 when the file shrank."""
        entry = self.tensors.get(name)
        if entry is None:
            raise DitcompressError("E315", self.folder.name, f"tensor {name} is missing", COPY_AGAIN)
        if self.memory is not None:
            return self.memory[name].clone()
        length = entry.stop - entry.start
        if length == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = bytearray(length)
        view = memoryview(data)
        with open(entry.file, "rb", buffering=0) as file:
            done = 0
            while done < length:  # preadv returns at most 2 GB at once
                got = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], entry.start + done)
                if got == 0:
                    raise DitcompressError(
                        "E312", f"{entry.file.name}: {name}", "the file shrank while it was read", COPY_AGAIN
                    )
                done += got
        return torch.frombuffer(data, dtype=torch.uint8).view(entry.dtype).reshape(entry.shape)

    def verify_unchanged(self) -> None:
        """E324 when a file was replaced or written to since it was opened."""
        for file, before in self.snapshot.items():
            if _mark(file) != before:
                raise DitcompressError(
                    "E324", file.name, "changed while it was being read", "run again on a file at rest"
                )


def _mark(file: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return (-1, -1, -1)
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def open_checkpoint(path: str | Path, *, allow_compressed: bool = True) -> Checkpoint:
    """Check and open a checkpoint; every fault is an E3xx or E4xx that names file, tensor and remedy."""
    path = Path(path)
    if not path.exists():
        raise DitcompressError("E301", path, "there is nothing here", "give a diffusers folder or a .safetensors file")
    if path.is_dir():
        checkpoint = _open_folder(path)
    elif path.suffix == ".safetensors":
        checkpoint = _open_single(path)
    elif path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        checkpoint = _open_legacy(path)
    else:
        raise DitcompressError(
            "E302", path, "is neither a folder nor .safetensors nor .pt", "give a diffusers model folder"
        )
    _check_quantization(checkpoint, allow_compressed)
    return checkpoint


def _open_folder(path: Path) -> Checkpoint:
    pipeline, component, folder = None, "", path
    if (path / "model_index.json").is_file():
        pipeline, component = path, _component(path)
        folder = path / component
    elif not (path / "config.json").is_file():
        raise DitcompressError(
            "E302", path, "has neither config.json nor model_index.json", "give a diffusers model folder"
        )
    config = read_config(folder / "config.json")
    files, index = _weight_files(folder)
    tensors = _gather(files, index, folder)
    used = [folder / "config.json", *files]
    return Checkpoint(path, folder, pipeline, component, config, tensors, tuple(files), {f: _mark(f) for f in used})


def _component(pipeline: Path) -> str:
    """The name of the transformer's folder in a pipeline."""
    index = read_config(pipeline / "model_index.json")
    for name in ("transformer", "dit", "prior"):
        if name in index and (pipeline / name / "config.json").is_file():
            return name
    raise DitcompressError(
        "E302", pipeline / "model_index.json", "names no transformer", "give the model folder itself"
    )


def _open_single(path: Path) -> Checkpoint:
    entries, metadata = read_header(path)
    beside = path.with_name("config.json")
    if "ditcompress" in metadata:
        config = _json_object(metadata["ditcompress"], f"{path.name}: metadata").get("config", {})
    elif beside.is_file():
        config = read_config(beside)
    else:
        raise DitcompressError(
            "E302", path, "no config.json beside it says what model this is", "put config.json beside it"
        )
    _check_config(config, path.name)
    return Checkpoint(path, path.parent, None, "", config, dict(sorted(entries.items())), (path,), {path: _mark(path)})


def _open_legacy(path: Path) -> Checkpoint:
    from .legacy import load_legacy

    before = _mark(path)
    config, state = load_legacy(path)
    entries = {
        name: TensorEntry(name, t.dtype, tuple(t.shape), path, 0, t.numel() * t.element_size())
        for name, t in sorted(state.items())
    }
    return Checkpoint(path, path.parent, None, "", config, entries, (path,), {path: before}, state)


# --- config.json -----------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a small regular file; E320 for anything else, E403 for remote code."""
    try:
        size = regular_file(path).st_size
    except DitcompressError as error:
        if error.code == "E311":
            raise DitcompressError("E320", path.name, "the file is missing", COPY_AGAIN) from None
        raise
    if size > MOST_CONFIG_BYTES:
        raise DitcompressError("E320", path.name, f"{size} bytes, more than {MOST_CONFIG_BYTES}", COPY_AGAIN)
    config = _json_object(path.read_bytes().decode("utf-8", "replace"), path.name)
    if path.name == "config.json":
        _check_config(config, path.name)
    return config


def _json_object(text: str, where: str) -> dict[str, Any]:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DitcompressError(
            "E320", where, f"is not JSON ({printable(error, 80)})", "restore the original file"
        ) from None
    if not isinstance(value, dict) or _depth(value) > MOST_DEPTH:
        raise DitcompressError("E320", where, "is not a JSON object of modest depth", "restore the original file")
    return value


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            stack += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list):
            stack += [(child, depth + 1) for child in item]
    return deepest


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if "auto_map" in config or isinstance(config.get("_class_name"), list):
        raise DitcompressError(
            "E403", where, "asks for code from the folder to be run", "use a model class that diffusers ships"
        )
    if not isinstance(config.get("_class_name"), str):
        raise DitcompressError(
            "E320", f"{where}: _class_name", "names no model class", "restore the original config.json"
        )


def _check_quantization(checkpoint: Checkpoint, allow_compressed: bool) -> None:
    quantization = checkpoint.quantization
    if quantization is None:
        kinds = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
        packed = [n for n, e in checkpoint.tensors.items() if e.dtype in kinds]
        if packed:
            raise DitcompressError(
                "E322",
                f"{checkpoint.tensors[packed[0]].file.name}: {packed[0]}",
                "holds packed or 8-bit weights",
                "give the original checkpoint",
            )
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "ditcompress" or not allow_compressed:
        by = printable(method, 40)
        raise DitcompressError(
            "E322",
            "config.json: quantization_config",
            f"this model is already quantized by {by}",
            "give the original checkpoint",
        )


# --- weight files ----------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The weight files in name order and the index's weight map, or None for a single file."""
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    single = folder / f"{STEM}.safetensors"
    present = sorted(p for p in folder.iterdir() if p.name.endswith(".safetensors") and not p.name.startswith("."))
    if len(indices) > 1:
        raise DitcompressError(
            "E314", folder, f"{len(indices)} index files: {some(i.name for i in indices)}", "keep one of them"
        )
    if indices:
        weight_map = _read_index(indices[0])
        names = sorted(set(weight_map.values()))
        stale = [p.name for p in present if p.name not in names]
        if stale:
            raise DitcompressError(
                "E313",
                f"{folder.name}/{stale[0]}",
                "the index does not list this file",
                "remove the file or restore its index",
            )
        for name in names:
            regular_file(_inside(folder, name, indices[0].name))
        return [folder / name for name in names], weight_map
    if not present:
        raise DitcompressError(
            "E311", folder / f"{STEM}.safetensors", "the folder holds no safetensors weights", COPY_AGAIN
        )
    if any(_SHARD.match(p.name) for p in present):
        raise DitcompressError("E314", folder, "shards without an index file", f"copy {STEM}.safetensors.index.json")
    if len(present) > 1:
        stale_name = next(p.name for p in present if p != single)
        raise DitcompressError(
            "E313", f"{folder.name}/{stale_name}", "more than one weight file", "keep one variant in the folder"
        )
    return present, None


def _inside(folder: Path, name: str, where: str) -> Path:
    """`folder/name` for a plain file name; E402 for anything that leads elsewhere."""
    plain = name == os.path.basename(name) and name not in ("", ".", "..") and "\\" not in name and name.isprintable()
    if not plain or not name.endswith(".safetensors"):
        raise DitcompressError(
            "E402", where, f"names the file {printable(name, 60)}", "shards must be plain names in the folder"
        )
    return folder / name


def _read_index(path: Path) -> dict[str, str]:
    index = read_config(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise DitcompressError("E314", path.name, "has no weight_map of tensor to file", COPY_AGAIN)
    return weight_map


def _gather(files: list[Path], weight_map: Mapping[str, str] | None, folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of every file; index and shards must name the same ones."""
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        entries, _ = read_header(file)
        for name, entry in entries.items():
            if name in tensors:
                raise DitcompressError(
                    "E314", f"{file.name}: {name}", f"stands in {tensors[name].file.name} too", COPY_AGAIN
                )
            if weight_map is not None and weight_map.get(name) != file.name:
                said = weight_map.get(name, "no file")
                raise DitcompressError(
                    "E314", f"{file.name}: {name}", f"the index says {printable(said, 60)}", COPY_AGAIN
                )
            tensors[name] = entry
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing and weight_map is not None:
        raise DitcompressError(
            "E315", weight_map[missing[0]], f"tensor {missing[0]} is in the index, not in the file", COPY_AGAIN
        )
    if not tensors:
        raise DitcompressError("E315", folder, "the weight files hold no tensor", COPY_AGAIN)
    return dict(sorted(tensors.items()))


# --- against the model -----------------------------------------------------------------------------------------------


def check_tensors(source: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Names and shapes must be exactly those of the model: E315 missing, E316 extra, E317 shape."""
    tensors = source.tensors
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    where = source.folder if isinstance(source, Checkpoint) else "model"
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DitcompressError(
            "E315", where, f"tensor {missing[0]} is missing{more}", "copy the checkpoint again, or correct config.json"
        )
    if extra:
        file = tensors[extra[0]].file.name if isinstance(source, Checkpoint) else "model"
        more = f", and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise DitcompressError(
            "E316", file, f"tensor {extra[0]} has no place in the model{more}", "config.json belongs to another model"
        )
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != tuple(shape):
            file = tensors[name].file.name if isinstance(source, Checkpoint) else "model"
            raise DitcompressError(
                "E317", f"{file}: {name}", f"shape {found}, config.json says {tuple(shape)}", "correct config.json"
            )


def check_finite(source: Any, reporter: Reporter | None = None) -> None:
    """E319 names the first tensor with a NaN or an infinity."""
    reporter = reporter or Silent()
    names = list(source.tensors)
    with reporter.task("check weights", len(names)) as advance:
        for name in names:
            tensor = source.read(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                file = source.tensors[name].file.name if isinstance(source, Checkpoint) else "model"
                raise DitcompressError(
                    "E319", f"{file}: {name}", f"{bad} values are NaN or infinite", "restore the tensor from its origin"
                )
            advance(1)
