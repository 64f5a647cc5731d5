"""T0, integrity: the files are whole, a fresh process with plain diffusers loads them to the same model, outputs are
finite, no layer is dead or constant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .. import bnb
from ..checkpoint.manifest import read_manifest, verify_manifest
from ..errors import DitcompressError
from . import _fresh
from .layers import LayerOutput
from .subject import Subject


@dataclass(frozen=True)
class Check:
    """One finding. `passed` None: could not be checked, `detail` says why."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Fresh:
    """What a process of its own found: the digest of the tensors, bytes that loading them took, and at the highest
    with one forward pass (above the imports). `error` in words where plain from_pretrained failed."""

    digest: str = ""
    resident: int | None = None
    peak: int | None = None
    error: str = ""


def fresh_processes(subject: Subject) -> dict[str, Fresh]:
    """Both models loaded by stock `from_pretrained` in new processes, at the same time."""
    started = {
        name: _start(checkpoint.folder, model, subject)
        for name, checkpoint, model in (
            ("original", subject.source, subject.original),
            ("compressed", subject.result, subject.compressed),
        )
        if (checkpoint.folder / "config.json").is_file()
    }
    return {name: _finish(process) for name, process in started.items()}


def _start(folder: Path, model: nn.Module, subject: Subject) -> subprocess.Popen[str]:
    batch = max(subject.settings.cost_batches, default=1)
    name = type(model).__name__
    command = [sys.executable, "-m", _fresh.__name__, str(folder.resolve()), name, subject.settings.dtype, str(batch)]
    package = str(Path(__file__).resolve().parents[2])  # found even where the package is not installed
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _finish(process: subprocess.Popen[str]) -> Fresh:
    try:
        out, err = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        process.kill()
        return Fresh(error="it did not end within half an hour")
    lines = [line for line in out.splitlines() if line.startswith("facts ")]
    if process.returncode or not lines:
        return Fresh(error=(err.strip().splitlines() or ["no message"])[-1][:160])
    facts = json.loads(lines[0].removeprefix("facts "))
    return Fresh(facts["digest"], facts["resident"], facts["peak"])


def fresh_check(subject: Subject, found: Fresh | None) -> Check:
    """Stock `from_pretrained` in a new process gives bit-identical tensors to the model evaluated here."""
    if found is None:
        return Check("fresh process", None, "a single file is not loadable by from_pretrained")
    if bnb.used(subject.result.config):
        return _foreign_check(found)
    if found.error:
        return Check("fresh process", False, f"plain from_pretrained failed: {found.error}")
    same = found.digest == _fresh.state_digest(subject.compressed)
    return Check("fresh process", same, "plain diffusers loads bit-identical tensors" if same else "tensors differ")


def _foreign_check(found: Fresh) -> Check:
    """bitsandbytes keeps its own packed tensors in the model, so loading is all that can be compared."""
    if "No GPU found" in found.error:
        return Check("fresh process", None, "diffusers loads bitsandbytes models on a GPU only, there is none here")
    if found.error:
        return Check("fresh process", False, f"plain from_pretrained failed: {found.error}")
    return Check("fresh process", True, "plain diffusers loads it")


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


def checks(
    subject: Subject, layers: list[LayerOutput], finite: bool, shift: int, fresh: Mapping[str, Fresh]
) -> list[Check]:
    """All T0 checks, in order of reading."""
    dead = [layer.name for layer in layers if layer.dead]
    found = [manifest(subject.result.path if subject.result.path.is_dir() else subject.result.folder)]
    if subject.settings.fresh_process:
        found.append(fresh_check(subject, fresh.get("compressed")))
    found.append(
        Check("finite outputs", finite, "every output is finite" if finite else "NaN or infinity in the outputs")
    )
    said = f"it answers to the timestep {'after' if shift > 0 else 'before'} the one it is given"
    found.append(Check("timestep", shift == 0, said if shift else "the model answers to the timestep it is given"))
    text = f"constant output: {', '.join(dead[:3])}" if dead else "no layer is dead or constant"
    found.append(Check("live layers", not dead, text))
    return found


def broken(found: list[Check]) -> bool:
    return any(check.passed is False for check in found)


def to_json(found: list[Check]) -> list[dict[str, object]]:
    return json.loads(json.dumps([{"name": c.name, "passed": c.passed, "detail": c.detail} for c in found]))
