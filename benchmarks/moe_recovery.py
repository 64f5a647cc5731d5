"""Experts against a narrower model of the same work, both after the same training.

    python benchmarks/moe_recovery.py [--seeds 0 1 2] [--steps 300] [--experts 8 --shared 0 --active 1]
    python benchmarks/moe_recovery.py --ways moe-best width --experts 16 --shared 2 --active 6
    python benchmarks/moe_recovery.py --model CKPT --scenes FOLDER --seeds 0 --steps 40 --batch 16 --images 64

"moe-local" and the other methods of feed-forwards: half of the neurons active, trained as `moe --distill-steps` trains
with RECIPE. "width": `prune --width-units neurons --width-method obs-diff` down to the
active parameters of the experts with their routers, trained as `distill` trains (all of it, `--loss`, the same steps,
batch and states). Judged as benchmarks/recovery.py judges: SQNR of the prediction in dB on held-out states, class
accuracy (of scenes: the colour), and Fréchet distance to the original's own images, all from the same noise. "least" is
the load of the least used expert of all layers in % of an even one, on the held-out states.

Rows go to `--rows` as they come, and what is there already is not run again; the table has FD in thousandths, means
over seeds and half widths of 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _judge import bench_of, bench_options, interval
from torch import nn

from ditcompress import api
from ditcompress.api._conversion import weights_of
from ditcompress.api._experts import settings_from
from ditcompress.console import print_table
from ditcompress.distill.losses import parse_loss
from ditcompress.distill.matching import pairs_of
from ditcompress.distill.settings import Settings
from ditcompress.distill.student import Student
from ditcompress.distill.trainer import train
from ditcompress.mixture import Experts, measured, method_of

WIDTH = "width"
# Of the experts' training, before what --set says: all of the model learns, as all of the narrower one does.
RECIPE = ("training.everything=true", "training.ema=0.99", "training.clean=1", "training.output=0.1",
          "training.features=0.1", "training.balance=0.003", "training.router_rate=0.00001",
          "training.learning_rate=0.0001")  # fmt: skip


class Duel:
    """The original with its judge, and what a run is asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.bench = bench_of(options)
        self.numbers = {name: getattr(options, name) for name in ("experts", "shared", "active")}
        names = ("steps", "batch", "images", "rate", "loss", "sampling", "held", "trained")
        self.known = {**self.numbers, **{name: getattr(options, name) for name in names},
                      "model": str(options.model), "width_set": options.width_set,
                      "set": [*RECIPE, *options.set]}  # fmt: skip

    def experts(self, method: str, seed: int) -> dict[str, Any]:
        """The facts of `moe` without training, with its "model"."""
        given = ["images=0", "probe=1", *self.known["set"]]
        return api.moe(self.bench.by.model, method=method, seed=seed, overrides=given, **self.numbers)

    def row(self, way: str, seed: int) -> dict[str, Any]:
        started = time.perf_counter()
        row = self.narrow(seed) if way == WIDTH else self.routed(way, seed)
        return {"way": way, "seed": seed, "settings": self.known, **row, "seconds": time.perf_counter() - started}

    def judged(self, when: str, model: nn.Module) -> dict[str, float]:
        found = self.bench.judged(model)
        print(f"  {when} training", found, time.strftime("%X"), flush=True)
        return found

    def least(self, model: nn.Module) -> float:
        """Load of the least used expert in % of an even one."""
        _, use, _ = measured(self.bench.by.model, model, self.bench.by.adapter, [self.bench.held_out])
        return 100 * min(layer["idlest"] for layer in use.values())

    def routed(self, method: str, seed: int) -> dict[str, Any]:
        """The model is converted once, judged, trained in place and judged again."""
        facts, by, options = self.experts(method, seed), self.bench.by, self.options
        model = facts["model"]
        before, least = self.judged("before", model), self.least(model)
        batch = f"training.batch={options.batch}"
        wanted = settings_from([batch, *self.known["set"]], options.steps).training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            task = Experts(by.model, model, by.adapter.layout(by.model), self.bench.states(7919 + seed),
                           weights_of(wanted, method_of(method)), wanted.batch,
                           clean_weights=self.bench.clean_weights)  # fmt: skip
            train(task, wanted)
            task.finish()
        return {"before": before, "after": self.judged("after", model), "least_before": least,
                "least": self.least(model), "active_parameters": facts["parameters"]["active"]}  # fmt: skip

    def narrow(self, seed: int) -> dict[str, Any]:
        """Width pruning; the share of the neurons that stays is the first of all shares that has enough parameters."""
        by, options = self.bench.by, self.options
        pruned = api.prune(by.model, width_ratio=self.ratio(self.wanted(seed)), width_units="neurons",
                           width_overrides=options.width_set, seed=seed)  # fmt: skip
        student = pruned.model
        assert student is not None
        layouts = [by.adapter.layout(m).blocks for m in (student, by.model)]
        before = self.judged("before", student)
        task = Student(student, by.model, self.bench.states(7919 + seed), parse_loss(options.loss),
                       pairs_of(*layouts, None), blocks=layouts[0], batch=options.batch, steps=options.steps, seed=seed,
                       clean_weights=self.bench.clean_weights)  # fmt: skip
        train(task, Settings(steps=options.steps, batch=options.batch, learning_rate=options.rate, ema=0.99))
        task.finish()
        task.release()
        return {"before": before, "after": self.judged("after", student),
                "active_parameters": sum(p.numel() for p in student.parameters())}  # fmt: skip

    def wanted(self, seed: int) -> int:
        """Active parameters of the experts: of this seed's row where there is one."""
        for row in self.rows:
            if row["way"] != WIDTH and row["seed"] == seed:
                return int(row["active_parameters"])
        first = next((way for way in self.options.ways if way != WIDTH), "random")
        return int(self.experts(first, seed)["parameters"]["active"])

    def ratio(self, wanted: int) -> float:
        """The share of the neurons that goes, so that `wanted` parameters stay or a neuron more."""
        model = self.bench.by.model
        half = api.prune(model, width_ratio=0.5, width_units="neurons", width_method="magnitude").model
        assert half is not None
        total, left = (sum(p.numel() for p in m.parameters()) for m in (model, half))
        neurons = model.transformer_blocks[0].ff.net[2].in_features
        each = 2 * (total - left) / neurons  # parameters of one neuron of every block
        return math.floor((total - wanted) / each) / neurons


def show(rows: list[dict[str, Any]], accuracy: float) -> None:
    table = []
    for way in dict.fromkeys(r["way"] for r in rows):
        mine = [r for r in rows if r["way"] == way]
        shown = {"db": 1, "accuracy": 1, "fd": 1000}
        cells = [interval([n * r[w][key] for r in mine]) for w in ("before", "after") for key, n in shown.items()]
        least = interval([r["least"] for r in mine]) if "least" in mine[0] else "-"
        table.append([way, f"{mine[0]['active_parameters']:,}", *cells, least, len(mine)])
    heads = ["way", "active", "dB", "%", "mFD", "dB'", "%'", "mFD'", "least %", "seeds"]
    print_table(f"before and (') after training; original: {100 * accuracy:.1f} % right", heads, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_options(parser)
    parser.add_argument("--ways", nargs="+", default=["moe-local", WIDTH])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--active", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], help="of the experts' training, as `moe --set`")
    parser.add_argument("--width-set", action="append", default=[], help="as `prune --width-set`")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the narrower model")
    parser.add_argument("--loss", default="clean=1,output=0.1,normalised=0.1", help="of the narrower model")
    parser.add_argument("--rows", type=Path, default=Path("moe_recovery.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    duel = Duel(options)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    rows = [row for row in rows if row["settings"] == duel.known]
    duel.rows = rows
    done = {(row["way"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for way in options.ways:
            if (way, seed) in done:
                continue
            rows.append(duel.row(way, seed))
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            row = rows[-1]
            print(way, seed, row["before"], row["after"], row.get("least"), f"{row['seconds']:.0f} s", flush=True)
    show(rows, duel.bench.accuracy)


if __name__ == "__main__":
    main()
