"""What training brings back: every depth method at several ratios and seeds, the same recovery for all.

    python benchmarks/recovery.py [--ratios 0.25 0.5 0.75] [--seeds 0 1 2] [--steps 300] [--methods NAME ...]
    python benchmarks/recovery.py --methods tinyfusion:loss=clean random     with parameters of a method
    python benchmarks/recovery.py --model CKPT --scenes FOLDER --ratios 0.5 0.33

Before and after the same number of training steps (the trainer of `distill`, data-free): SQNR of the prediction in dB
on held-out states, class accuracy (of scenes: the colour) and Fréchet distance to the original's own images, from the
same noise. Rows go to `--rows` as they come, and what is there already is not run again; the table has means over
seeds and half widths of 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from _judge import Bench, bench_of, bench_options, interval
from torch import nn

from ditcompress import api
from ditcompress.console import print_table
from ditcompress.distill.data import Trajectories
from ditcompress.distill.losses import parse_loss
from ditcompress.distill.matching import pairs_of
from ditcompress.distill.settings import Settings
from ditcompress.distill.student import Student
from ditcompress.distill.trainer import train
from ditcompress.pruning import registry


def row_of(
    bench: Bench, loss: str, method: str, ratio: float, seed: int, settings: Settings, data: Trajectories,
    known: dict[tuple[str, int], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """`known`: rows by what was trained (a digest of the pruned weights) and seed."""
    started = time.perf_counter()
    by = bench.by
    name, *overrides = method.split(":")
    pruned = api.prune(by.model, ratio, method=name, seed=seed, overrides=overrides)
    chosen, student = time.perf_counter() - started, pruned.model
    assert student is not None
    layouts = [by.adapter.layout(m).blocks for m in (student, by.model)]
    kept = {row["block"]: row["was"] for row in pruned.facts["kept"]}
    twin = known.get((digest := digest_of(student), seed))
    if twin is not None:  # another method left the same model: training it again would give the same numbers
        return {**twin, "method": method, "choose_s": chosen}
    before = bench.judged(student)
    task = Student(student, by.model, data, parse_loss(loss), pairs_of(*layouts, kept), blocks=layouts[0],
                   batch=settings.batch, steps=settings.steps, seed=seed,
                   clean_weights=bench.clean_weights)  # fmt: skip
    train(task, settings)
    task.finish()
    task.release()
    after = bench.judged(student)
    return {"method": method, "ratio": ratio, "seed": seed, "removed": len(pruned.facts["removed"]),
            "before": before, "after": after, "choose_s": chosen,
            "total_s": time.perf_counter() - started, "digest": digest}  # fmt: skip


def digest_of(model: nn.Module) -> str:
    """Of names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def show(rows: list[dict[str, Any]], accuracy: float) -> None:
    table = []
    for ratio, method in sorted({(r["ratio"], r["method"]) for r in rows}):
        mine = [r for r in rows if (r["ratio"], r["method"]) == (ratio, method)]
        cells = [
            interval([r[when][key] for r in mine]) for when in ("before", "after") for key in ("db", "accuracy", "fd")
        ]
        seconds = ", ".join(f"{np.mean([r[key] for r in mine]):.0f}" for key in ("choose_s", "total_s"))
        table.append([f"{ratio:.0%}", method, *cells, seconds])
    heads = ["cut", "method", "dB", "%", "FD", "dB'", "%'", "FD'", "s"]
    print_table(
        f"before and (') after recovery; original: {100 * accuracy:.1f} % right; s: to choose, in all", heads, table
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_options(parser)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[n.replace("_", "-") for n in registry.names()])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--loss", default="clean=1,output=0.1,normalised=0.1")
    parser.add_argument("--rows", type=Path, default=Path("recovery.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    done = {(r["method"], r["ratio"], r["seed"]) for r in rows}
    bench = bench_of(options)
    settings = Settings(steps=options.steps, batch=options.batch, learning_rate=options.rate, ema=0.99)
    for seed in options.seeds:
        data = bench.states(7919 + seed)
        for ratio in options.ratios:
            for method in options.methods:
                if (method, ratio, seed) not in done:
                    known = {(r["digest"], r["seed"]): r for r in rows if "digest" in r}
                    rows.append(row_of(bench, options.loss, method, ratio, seed, settings, data, known))
                    with options.rows.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(method, ratio, seed, rows[-1]["before"], rows[-1]["after"], f"{rows[-1]['total_s']:.0f} s",
                          flush=True)  # fmt: skip
    show(rows, bench.accuracy)


if __name__ == "__main__":
    main()
