"""Which blocks can go? Every depth method at one ratio on one model, without any recovery, on held-out inputs.

    python benchmarks/depth.py                        the embedded digits model, half of its blocks
    python benchmarks/depth.py --model CKPT --ratio 0.25

The number is the denoiser's sampler-weighted SQNR in dB of the pruned model against the original, as `evaluate` gives
it (T2, both guidance branches), on trajectories whose seed no method saw; beside it the methods' own figure on the
inputs they measured. `exhaustive` tries every set of the right size (with --exhaustive; 462 sets on digits).
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations
from pathlib import Path

from ditcompress import api
from ditcompress.calibration.collect import CalibrationSettings
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.schedulers import load_scheduler
from ditcompress.console import Silent, print_table
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.measures import ratio_db
from ditcompress.models import adapter_for, depth_of
from ditcompress.pruning import Context, ProbeParams, record_probes, registry

HELD_OUT = 1_000_003


def judge(path: Path, images: int) -> Context:
    """A context over held-out trajectories, every step of 25."""
    model, source = load_model(path)
    adapter, silent = adapter_for(source.config), Silent()
    layout = adapter.layout(model)
    params = ProbeParams(samples=images, steps=25, timesteps=0)
    settings = CalibrationSettings(samples=images, seed=HELD_OUT)
    given = get_conditions(source, adapter, settings.samples, HELD_OUT, reporter=silent)
    scheduler = load_scheduler(source.config, source.scheduler_folder, adapter, silent)
    probes = record_probes(model, adapter, source.config, scheduler, given, params, HELD_OUT, silent)
    return Context(model, adapter, layout, depth_of(source.config, layout), {}, 0.0, probes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=digits_folder())
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of `random`")
    parser.add_argument("--exhaustive", action="store_true")
    options = parser.parse_args()
    held_out = judge(options.model, options.images)
    rows = []
    for name in registry.names():
        seeds = range(options.seeds if name == "random" else 1)
        for seed in seeds:
            started = time.perf_counter()
            facts = api.prune(options.model, options.ratio, method=name, seed=seed, dry_run=True).facts
            own = facts["output_sqnr_db"]
            rows.append([
                name.replace("_", "-") + (f" (seed {seed})" if len(seeds) > 1 else ""),
                f"{ratio_db(held_out.damage(facts['order'])):.2f}",
                "" if own is None else f"{own:.2f}",
                ", ".join(b.removeprefix("transformer_blocks.") for b in facts["order"]),
                f"{time.perf_counter() - started:.1f}",
            ])  # fmt: skip
    if options.exhaustive:
        count, started = len(facts["order"]), time.perf_counter()
        best = min(combinations(held_out.names, count), key=held_out.damage)
        rows.append([
            "exhaustive (on the held-out inputs)", f"{ratio_db(held_out.damage(best)):.2f}", "",
            ", ".join(b.removeprefix("transformer_blocks.") for b in best), f"{time.perf_counter() - started:.1f}",
        ])  # fmt: skip
    print_table(f"{options.model.name}, ratio {options.ratio}", ["method", "dB", "own dB", "removed", "s"], rows)


if __name__ == "__main__":
    main()
