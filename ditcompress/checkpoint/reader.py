"""Checkpoints: validated headers first, tensors when asked for. Nothing is trusted before it is checked.

Accepted: a diffusers model folder (one file or shards), a pipeline folder (its transformer), one .safetensors file
with config.json beside it or in its metadata, and the original DiT or SiT .pt (see legacy.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import Reporter, Silent
from ..errors import DitcompressError, printable
from ._files import COPY_AGAIN, json_object, label, more, place
from ._folder import check_config, component_of, gather, read_config, weight_files
from .header import TensorEntry, read_header, read_tensor
from .legacy import load_legacy

_PACKED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
ORIGINAL = "give the original checkpoint"

Mark = tuple[int, int, int, int]  # size, mtime, inode, ctime


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, sizes and dtypes have been checked; its data are read tensor by tensor.

    `path` is what was given, `folder` holds config.json and weights, `pipeline` is the pipeline folder or None,
    `component` the name of `folder` in it. `snapshot` is the state of every file when it was opened.
    """

    path: Path
    folder: Path
    pipeline: Path | None
    component: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    snapshot: Mapping[Path, Mark]
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
        parent = self.folder.parent
        places = [self.pipeline, self.folder, parent if (parent / "model_index.json").is_file() else None]
        for folder in places:
            if folder is not None and (folder / "scheduler" / "scheduler_config.json").is_file():
                return folder / "scheduler"
        return None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and the contents of every weight file, in name order."""
        return self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self.files, key=lambda f: f.name):
            digest.update(file.name.encode())
            with open(file, "rb") as stream:
                while part := stream.read(1 << 24):
                    digest.update(part)
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """One tensor in its own dtype, writable. E315 for a name that is not there, E324 when its file changed."""
        entry = self.tensors.get(name)
        if entry is None:
            raise DitcompressError("E315", label(self.folder), f"tensor {printable(name, 60)} is missing", COPY_AGAIN)
        if self.memory is not None:
            return self.memory[name].clone()
        return read_tensor(entry, self.snapshot[entry.file][:3])

    def verify_unchanged(self) -> None:
        """E324 when a file was replaced or written to since it was opened.

        A change of ctime alone (a new link, a chmod, a restored mtime) is settled by hashing again, if it was hashed.
        """
        touched = False
        for file, before in self.snapshot.items():
            now = _mark(file)
            if now[:3] != before[:3]:
                raise _changed(file)
            touched |= now != before
        if touched and "fingerprint" in self.__dict__ and self._digest() != self.fingerprint:
            raise _changed(self.folder)


def _changed(path: Path) -> DitcompressError:
    return DitcompressError("E324", label(path), "changed while it was in use", "run again on a file at rest")


def _mark(file: Path) -> Mark:
    try:
        status = os.stat(file)
    except OSError:
        return (-1, -1, -1, -1)
    return (status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


def open_checkpoint(path: str | Path, *, allow_compressed: bool = True) -> Checkpoint:
    """Check and open a checkpoint; every fault is an E3xx or E4xx that names file, tensor and remedy."""
    path = Path(path)
    try:
        there, folder = path.exists(), path.is_dir()
    except OSError as error:  # a parent that may not be looked into, a name too long
        raise DitcompressError("E301", path, f"cannot be read ({error.strerror})", "check the path") from None
    if not there:
        raise DitcompressError("E301", path, "there is nothing here", "give a diffusers folder or a .safetensors file")
    if folder:
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
        pipeline, component = path, component_of(path)
        folder = path / component
    elif not (path / "config.json").exists():
        raise DitcompressError(
            "E302", path, "has neither config.json nor model_index.json", "give a diffusers model folder"
        )
    config_file = folder / "config.json"
    snapshot = {config_file: _mark(config_file)}
    config = read_config(config_file, path)
    files, index = weight_files(folder, path)
    snapshot |= {file: _mark(file) for file in files}
    tensors = gather(files, index, path)
    return Checkpoint(path, folder, pipeline, component, config, tensors, tuple(files), snapshot)


def _open_single(path: Path) -> Checkpoint:
    beside = path.with_name("config.json")
    snapshot = {path: _mark(path)}
    entries, metadata = read_header(path)
    if "ditcompress" in metadata:
        where = f"{label(path)}: metadata"
        config = json_object(metadata["ditcompress"], where).get("config")
        if not isinstance(config, dict):
            raise DitcompressError("E320", where, "holds no model configuration", "export the result again")
        check_config(config, where)
    elif beside.exists():
        snapshot[beside] = _mark(beside)
        config = read_config(beside)
    else:
        raise DitcompressError(
            "E302", path, "no config.json beside it says what model this is", "put config.json beside it"
        )
    if not entries:
        raise DitcompressError("E315", label(path), "the file holds no tensor", COPY_AGAIN)
    return Checkpoint(path, path.parent, None, "", config, dict(sorted(entries.items())), (path,), snapshot)


def _open_legacy(path: Path) -> Checkpoint:
    before = _mark(path)
    config, state = load_legacy(path)
    entries = {
        name: TensorEntry(name, t.dtype, tuple(t.shape), path, 0, t.numel() * t.element_size())
        for name, t in sorted(state.items())
    }
    return Checkpoint(path, path.parent, None, "", config, entries, (path,), {path: before}, state)


def _check_quantization(checkpoint: Checkpoint, allow_compressed: bool) -> None:
    """E322 for a model that is compressed already, E318 for weights that are no floating-point numbers."""
    if checkpoint.quantization is not None:
        fields: Any = checkpoint.quantization
        method = fields.get("quant_method") if isinstance(fields, dict) else None
        if not (_readable(fields, method) and (allow_compressed or _unpacked(fields))):
            what = f"this model is already quantized by {printable(method or 'an unnamed method', 40)}"
            raise DitcompressError("E322", f"{label(checkpoint.folder)}: quantization_config", what, ORIGINAL)
        return
    for name, entry in checkpoint.tensors.items():
        where = place(entry.file, name)
        kind = str(entry.dtype).removeprefix("torch.")
        if entry.dtype in _PACKED:
            raise DitcompressError("E322", where, f"is {kind}: the model is already quantized", ORIGINAL)
        if not entry.dtype.is_floating_point and name.endswith((".weight", ".bias")):
            raise DitcompressError("E318", where, f"a weight of dtype {kind}", "convert it to float32 or bfloat16")


def _readable(fields: Any, method: Any) -> bool:
    """Whether we can decode what this method stores: our own form, and that of bitsandbytes."""
    widths = ("load_in_4bit", "load_in_8bit")
    return method == "ditcompress" or (method == "bitsandbytes" and any(fields.get(key) is True for key in widths))


def _unpacked(fields: Any) -> bool:
    """Whether this is a model of ours with layers of other forms and no packed weight: it can be quantized."""
    ours = fields.get("quant_method") == "ditcompress"
    structure = ("experts", "routed", "shapes", "linear", "text", "shared")
    return ours and not fields.get("layers") and any(fields.get(key) for key in structure)


# --- against the model -----------------------------------------------------------------------------------------------


def check_tensors(source: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Names and shapes must be exactly those of the model: E315 missing, E316 extra, E317 shape."""
    tensors = source.tensors
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing:
        where = label(source.folder) if isinstance(source, Checkpoint) else "model"
        remedy = "copy the checkpoint again, or correct config.json"
        raise DitcompressError("E315", where, f"tensor {printable(missing[0], 80)} is missing{more(missing)}", remedy)
    if extra:
        what = f"has no place in the model{more(extra)}"
        raise DitcompressError("E316", _where(source, extra[0]), what, "config.json belongs to another model")
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != tuple(shape):
            what = f"shape {found}, config.json says {tuple(shape)}"
            raise DitcompressError("E317", _where(source, name), what, "correct config.json")


def check_finite(source: Any, reporter: Reporter | None = None) -> None:
    """E319 names the first tensor with a NaN or an infinity."""
    reporter = reporter or Silent()
    names = list(source.tensors)
    with reporter.task("check weights", len(names)) as advance:
        for name in names:
            tensor = source.read(name)
            if tensor.is_floating_point():
                finite = torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float())  # 8 bits: no kernel
                if not bool(finite.all()):
                    what = f"{int((~finite).sum())} of {tensor.numel()} values are NaN or infinite"
                    raise DitcompressError("E319", _where(source, name), what, "restore the tensor from its origin")
            advance(1)


def _where(source: Any, name: str) -> str:
    return place(source.tensors[name].file if isinstance(source, Checkpoint) else Path("model"), name)
