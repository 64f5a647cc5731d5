"""Ways to damage a checkpoint, and the check that every fault is said in one useful line."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditcompress.errors import CODES, DitcompressError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def failure(run: Callable[[], object], code: str, *mentions: str) -> DitcompressError:
    """`run` must fail with `code`, in one printable line that holds every one of `mentions` and a remedy."""
    with pytest.raises(DitcompressError) as caught:
        run()
    error, line = caught.value, caught.value.line()
    assert error.code == code, line
    assert line.startswith(f"error[{code} {CODES[code]}]: ") and line.isprintable() and len(line) <= 400, line
    assert len(error.remedy) >= 8 and error.remedy in line
    for text in mentions:
        assert text in line, (text, line)
    return error


def shard(folder: Path, count: int = 2) -> list[Path]:
    """Split the weights of a folder into an indexed checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, files, weight_map = sorted(tensors), [], {}
    for number in range(count):
        part = names[number::count]
        file = folder / f"diffusion_pytorch_model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return files


def change_index(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: list, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def in_child(run: Callable[[], object]) -> int:
    """The exit status of `run` in a forked child: that of its error, 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            run()
            status = 0
        except DitcompressError as error:
            status = int(error.code[1]) * 10 + int(error.code[3])  # E502 -> 52
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
