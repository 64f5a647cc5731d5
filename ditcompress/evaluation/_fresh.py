"""A process of its own: plain `from_pretrained`, one forward pass, then the digest of the tensors and the memory used.

python -m ditcompress.evaluation._fresh FOLDER CLASS DTYPE BATCH
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


def state_digest(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of every tensor of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().contiguous().cpu()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resident() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def highest() -> int | None:
    """Bytes at the process's highest."""
    try:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    except ImportError:
        return None


def _forward(model: nn.Module, folder: Path, batch: int) -> None:
    from ..models import adapter_for

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    adapter = adapter_for(config)
    generator = torch.Generator().manual_seed(0)
    cond = adapter.random_conditions(config, batch, generator)
    latents = torch.randn(batch, *adapter.latent_shape(config), generator=generator)
    with torch.no_grad():
        adapter.predict(model, latents, torch.full((batch,), 0.5), cond)


def main(folder: str, name: str, dtype: str, batch: str) -> dict[str, Any]:
    """What the parent wants to know, as JSON values."""
    import diffusers

    from .. import models  # noqa: F401  (imported before memory is measured; the package entered itself into diffusers)

    torch.set_num_threads(1)
    cls = getattr(diffusers, name)
    before = resident()
    model = cls.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()
    after = resident()
    facts: dict[str, Any] = {}
    try:
        _forward(model, Path(folder), int(batch))
    except Exception as error:
        facts["forward"] = f"{type(error).__name__}: {error}"[:160]
    peak = highest()
    facts["resident"] = None if before is None or after is None else max(after - before, 0)
    facts["peak"] = None if before is None or peak is None else max(peak - before, 0)
    facts["digest"] = state_digest(model)
    return facts


if __name__ == "__main__":
    print("facts " + json.dumps(main(*sys.argv[1:])))
