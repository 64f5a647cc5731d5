"""Which heads and neurons can go? Every width method at one ratio on one model, without any recovery.

    python benchmarks/width.py                        the embedded digits model, 30 % of its heads and neurons
    python benchmarks/width.py --model CKPT --ratio 0.2 --methods magnitude ecodiff

dB is the denoiser's sampler-weighted SQNR against the original on trajectories whose seed no method saw (as in
benchmarks/depth.py); PSNR is the mean over pairs of images, original and narrowed, of the same noise, labels and
sampler (as in benchmarks/quality.py). NAME:key=value[,key=value] gives a method parameters.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from depth import judge
from quality import Pairs

from ditcompress import api
from ditcompress.calibration.schedulers import load_scheduler
from ditcompress.console import Silent, print_table
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.measures import ratio_db
from ditcompress.models import adapter_for
from ditcompress.pruning.width import registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=digits_folder())
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--images", type=int, default=16, help="of the held-out trajectories")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the methods")
    parser.add_argument("--methods", nargs="*", default=registry.names())
    options = parser.parse_args()
    model, source = load_model(options.model)
    adapter = adapter_for(source.config)
    scheduler = load_scheduler(source.config, source.scheduler_folder, adapter, Silent())
    pairs = Pairs(model, source.config, scheduler, options.pairs, options.steps)
    held_out = judge(options.model, options.images)
    references, rows = held_out.references(), []
    for asked in options.methods:
        name, _, given = asked.partition(":")
        started = time.perf_counter()
        pruned = api.prune(
            model, width_ratio=options.ratio, width_method=name, seed=options.seed,
            width_overrides=[part for part in given.split(",") if part],
        ).model  # fmt: skip
        seconds = time.perf_counter() - started
        assert pruned is not None
        held_out.model, held_out._outputs = pruned, references
        parameters = sum(tensor.numel() for tensor in pruned.parameters())
        damage = ratio_db(held_out.damage(()))
        rows.append([asked.replace("_", "-"), f"{damage:.2f}", pairs.psnr(pruned), f"{parameters:,}", f"{seconds:.1f}"])
        print(*rows[-1], sep="  ", flush=True)
    title = f"{options.model.name}, {100 * options.ratio:g} % of heads and neurons, PSNR of {options.pairs} pairs"
    print_table(title, ["method", "dB", "PSNR", "parameters", "s"], rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
