"""How fast packed blocks of DiT-XL/2 or FLUX.1 run beside bfloat16 ones, torchao and sdnq, on this machine.

    python benchmarks/speed.py                                2 blocks of DiT-XL/2 on a CPU
    python benchmarks/speed.py --layers 28                    the whole model; `benchmarks/gpu.py` runs it on a GPU
    python benchmarks/speed.py --size flux --batch 1          2 double and 4 single blocks at 1024 pixels; 19: all

Random weights, which run as fast as trained ones: the forms of w8a8-token and w4a8-token, rounded to nearest. The
times are `ditcompress bench` on the written checkpoints, batch by batch; "dB" is the output SQNR of the forward pass
(of rounding to nearest on random weights: benchmarks/quality.py has the recipes' own on trained ones).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
from memory import sized, write_random

from ditcompress import api
from ditcompress.cli.bench import show
from ditcompress.console import Silent

RECIPE = """
name: {name}
description: rounded to nearest
rules:
  - roles: [modulation, time_embedding]
    weight: {weight}
    steps: [rtn]
  - weight: {weight}
    activation: {{mode: token, bits: 8, symmetric: false}}
    steps: [rtn]
"""
FORMS = {
    "w8a8": "{format: int, bits: 8, layout: row}",
    "w4a8": "{format: int, bits: 4, layout: group, group: 32, symmetric: false, scale: uint4, clip: 20}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="dit-xl", choices=["dit-xl", "flux"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--mode", nargs="*", default=[], help="eager, graph, compiled; all by default")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=0, help="of a sampling; 0: none")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / options.size
        plain.mkdir()
        write_random(plain, torch.bfloat16, sized(options.size, options.layers))
        models = [plain]
        for name, weight in FORMS.items():
            recipe = Path(scratch) / f"{name}.yaml"
            recipe.write_text(RECIPE.format(name=name, weight=weight))
            models.append(Path(scratch) / name)
            api.quantize(plain, str(recipe), models[-1], reporter=Silent())
        machine = platform.processor() or platform.machine()
        print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for batch in options.batch:
            facts = api.bench(
                models, batch=batch, modes=options.mode, seconds=options.seconds, steps=options.steps,
                peers=not options.no_peers, reporter=Silent(),
            )  # fmt: skip
            found.append(facts)
            show(facts)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
