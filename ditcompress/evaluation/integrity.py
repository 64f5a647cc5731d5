"""T0, integrity: the files are whole, a fresh process with plain diffusers loads them to the same model, outputs are
finite, no layer is dead or constant."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.manifest import read_manifest, verify_manifest
from ..errors import DitcompressError
from .layers import LayerOutput
from .subject import Subject


@dataclass(frozen=True)
class Check:
    """One finding. `passed` None: could not be checked, `detail` says why."""

    name: str
    passed: bool | None
    detail: str


def state_digest(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of every tensor of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().contiguous().cpu()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_CHILD = """
import sys, json, torch
import ditcompress
import diffusers
from ditcompress.evaluation.integrity import state_digest
torch.set_num_threads(1)
cls = getattr(diffusers, sys.argv[2])
model = cls.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[3]))
print("digest " + state_digest(model))
"""


def fresh_process(subject: Subject) -> Check:
    """Stock `from_pretrained` in a new process gives bit-identical tensors to the model evaluated here."""
    folder, dtype = subject.result.folder, subject.settings.dtype
    if not (folder / "config.json").is_file():
        return Check("fresh process", None, "a single file is not loadable by from_pretrained")
    command = [sys.executable, "-c", _CHILD, str(folder), type(subject.compressed).__name__, dtype]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("digest ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("fresh process", False, f"plain from_pretrained failed: {last[:160]}")
    same = lines[0].split()[1] == state_digest(subject.compressed)
    return Check("fresh process", same, "plain diffusers loads bit-identical tensors" if same else "tensors differ")


def manifest(folder: Path) -> Check:
    """The files are the ones that were written."""
    try:
        read_manifest(folder)
    except DitcompressError as error:
        return Check("manifest", None, error.what)
    try:
        verify_manifest(folder)
    except DitcompressError as error:
        return Check("manifest", False, error.line())
    return Check("manifest", True, "every file has the recorded size and sha256")


def checks(subject: Subject, layers: list[LayerOutput], finite: bool) -> list[Check]:
    """All T0 checks, in order of reading."""
    dead = [layer.name for layer in layers if layer.dead]
    found = [manifest(subject.result.path if subject.result.path.is_dir() else subject.result.folder)]
    if subject.settings.fresh_process:
        found.append(fresh_process(subject))
    found.append(
        Check("finite outputs", finite, "every output is finite" if finite else "NaN or infinity in the outputs")
    )
    text = f"constant output: {', '.join(dead[:3])}" if dead else "no layer is dead or constant"
    found.append(Check("live layers", not dead, text))
    return found


def broken(found: list[Check]) -> bool:
    return any(check.passed is False for check in found)


def to_json(found: list[Check]) -> list[dict[str, object]]:
    return json.loads(json.dumps([{"name": c.name, "passed": c.passed, "detail": c.detail} for c in found]))
