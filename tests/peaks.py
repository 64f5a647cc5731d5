"""A process of its own that measures peaks: run with a folder of models, prints a JSON table.

Imports and one small run come first; then every case is a fork, so that all start from the same resident set, and the
system's account of the fork is read. The model is DiT-like, of blocks that make up nearly all of it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import sized, write_random
from ditcompress import api
from ditcompress.api import _memory
from ditcompress.api._quantized import checked_plan
from ditcompress.api.calibration import settings_of
from ditcompress.loading import open_model
from ditcompress.models import adapter_for
from ditcompress.offload import load_to_run
from ditcompress.pruning import method
from ditcompress.recipe import Calibration, load_recipe

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}
MEDIUM = {"num_attention_heads": 8, "attention_head_dim": 64, "sample_size": 16, "num_embeds_ada_norm": 10}
FEW = {"samples": 4, "steps": 2}
SETS = [f"calibration.{key}={value}" for key, value in FEW.items()]


def peak(run: Callable[[], Any]) -> int:
    """Most bytes resident while a fork runs it."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def calibrated(folder: Path, way: str, weighting: str) -> None:
    api.calibrate(folder, overrides=[*SETS, f"calibration.weighting={weighting}"], offload=way)


def quantized(folder: Path, way: str, recipe: str) -> None:
    sets = [*SETS, "calibration.weighting=none"] if load_recipe(recipe).calibration else []
    out = folder.with_name(f"{folder.name}-{recipe}-{way}")
    api.quantize(folder, recipe, out, overrides=sets, offload=way)


def pruned(folder: Path, way: str, name: str) -> None:
    api.prune(folder, 0.3, method=name, overrides=["samples=4", "steps=2"], offload=way, dry_run=True)


def forward(folder: Path, way: str) -> None:
    model, checkpoint = load_to_run(folder, dtype=torch.float32, offload=way)
    adapter = adapter_for(checkpoint.config)
    cond = adapter.random_conditions(checkpoint.config, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            adapter.predict(model, torch.zeros(1, *adapter.latent_shape(checkpoint.config)), torch.tensor([500]), cond)


def everything(folder: Path) -> dict[str, Callable[[str], Any]]:
    """What is measured, by name."""
    return {
        "forward": lambda way: forward(folder, way),
        "calibrate": lambda way: calibrated(folder, way, "none"),
        "fisher": lambda way: calibrated(folder, way, "fisher"),
        "shortgpt": lambda way: pruned(folder, way, "shortgpt"),
        "quantize": lambda way: quantized(folder, way, "w4a8"),
        "encode": lambda way: quantized(folder, way, "w4a16-rtn"),
        "taylor": lambda way: pruned(folder, way, "taylor"),
    }


def predictions(folder: Path, way: str) -> dict[str, int]:
    checkpoint, meta = open_model(folder)
    layout = adapter_for(checkpoint.config).layout(meta)
    given = (checkpoint, meta, layout)
    found = {}
    for name, weighting in (("calibrate", "none"), ("fisher", "fisher")):
        settings = settings_of(Calibration(**FEW, weighting=weighting), 0)  # type: ignore[arg-type]
        found[name] = _memory.of_calibration(*given, settings, torch.float32, way).total
    for name in ("shortgpt", "taylor"):
        module, params = method(name, FEW)
        found[name] = _memory.of_pruning(*given, module, params, torch.float32, way).total
    for name, recipe in (("quantize", "w4a8"), ("encode", "w4a16-rtn")):
        chosen = load_recipe(recipe, [*SETS, "calibration.weighting=none"] if name == "quantize" else [])
        plan = checked_plan(chosen, layout)
        found[name] = _memory.of_quantizing(*given, plan, chosen, None, "float32", way)().total
    return found


def main() -> None:
    folder, cases = Path(sys.argv[1]), [case.split(":") for case in sys.argv[2:]]
    torch.set_num_threads(1)
    load_recipe("w4a8")
    for name, extra, layers in (("small", SMALL, 2), ("medium", MEDIUM, 16)):
        (folder / name).mkdir()
        write_random(folder / name, torch.float32, {**sized("dit-xl", layers), **extra})
    for run in everything(folder / "small").values():
        run("none")
    ways = sorted({way for _, way in cases})
    predicted = {way: predictions(folder / "medium", way) for way in ways}  # imports what they need, too
    base, table = peak(lambda: None), everything(folder / "medium")
    rows = {f"{name}:{way}": peak(lambda name=name, way=way: table[name](way)) - base for name, way in cases}  # type: ignore[misc]
    print(json.dumps({"measured": rows, "predicted": {f"{n}:{w}": p[n] for w, p in predicted.items() for n in p}}))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
