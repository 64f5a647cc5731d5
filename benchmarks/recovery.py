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
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn

from ditcompress import api
from ditcompress.api._training import Driven, driven
from ditcompress.calibration.trajectory import Sampling
from ditcompress.console import Silent, print_table
from ditcompress.distill.data import Trajectories
from ditcompress.distill.losses import parse_loss
from ditcompress.distill.matching import pairs_of
from ditcompress.distill.noising import Noising
from ditcompress.distill.settings import Settings
from ditcompress.distill.student import Student
from ditcompress.distill.trainer import train
from ditcompress.evaluation.digits import digits_folder
from ditcompress.evaluation.distribution.frechet import frechet
from ditcompress.evaluation.extractors import extract
from ditcompress.evaluation.quality import Sources, find_tools
from ditcompress.evaluation.settings import EvaluateSettings
from ditcompress.evaluation.subject import open_subject
from ditcompress.loading import open_model
from ditcompress.measures import ratio_db
from ditcompress.pruning import registry
from ditcompress.recipe import Calibration

Judge = Callable[[Tensor], tuple[np.ndarray, np.ndarray]]  # images -> features, guessed classes


def scenes_judge(folder: Path) -> Judge:
    sys.path.insert(0, str(folder))
    import classifier  # type: ignore[import-not-found]

    net = classifier.load()

    def judge(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return net.features(images).numpy(), net(images)["color"].argmax(1).numpy()

    return judge


@dataclass
class Bench:
    """The original with its images, and training states for each seed."""

    path: Path
    images: int
    scenes: Path | None
    loss: str
    by: Driven = field(init=False)

    def __post_init__(self) -> None:
        settings = EvaluateSettings(pairs=self.images, images=self.images, guidance=2.0 if self.scenes else 1.5)
        self.subject = open_subject(self.path, self.path, settings, reporter=Silent())
        if self.scenes:
            self.judge = scenes_judge(self.scenes)
        else:
            extractor: Any = find_tools(self.subject, Sources(), Silent()).extractor
            self.judge = lambda x: (extract(extractor, [x]), extractor.logits(x).argmax(1).numpy())
        labels = self.subject.conditions.labels
        assert labels is not None
        self.labels = labels[: self.images].numpy() % (8 if self.scenes else 10**9)
        self.features, guessed = self.judge(self.drawn(self.subject.original))
        self.accuracy = float((guessed == self.labels).mean())
        checkpoint, _ = open_model(self.path)
        self.by = driven(checkpoint, Calibration(samples=128), None, None, 0, "cpu", Silent())
        self.clean_weights = Noising(self.by.scheduler, self.by.adapter, self.by.config).clean_weights
        self.held_out = self.states(104_729, 16).batch(0, 256)

    def drawn(self, model: nn.Module) -> Tensor:
        return torch.cat([
            self.subject.images(model, list(range(start, min(start + 64, self.images))))
            for start in range(0, self.images, 64)
        ])  # fmt: skip

    def distance(self, features: np.ndarray) -> float:
        """Of images with these features to the original's own."""
        return frechet(self.features, features)

    def states(self, seed: int, images: int) -> Trajectories:
        by = self.by
        sampling = Sampling(25, by.guidance, seed, batch=32)
        return Trajectories(by.model, by.adapter, by.config, by.scheduler, by.conditions, sampling, images=images,
                            refresh=10**9, null=0.15)  # fmt: skip

    def measure(self, model: nn.Module, task: Student) -> dict[str, float]:
        features, guessed = self.judge(self.drawn(model))
        return {
            "db": ratio_db(task.measure(self.held_out)["output"]),
            "accuracy": 100 * float((guessed == self.labels).mean()),
            "fd": self.distance(features),
        }

    def row(
        self, method: str, ratio: float, seed: int, settings: Settings, data: Trajectories,
        known: dict[tuple[str, int], dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        """`known`: rows by what was trained (a digest of the pruned weights) and seed."""
        started = time.perf_counter()
        by = self.by
        name, *overrides = method.split(":")
        pruned = api.prune(by.model, ratio, method=name, seed=seed, overrides=overrides)
        chosen, student = time.perf_counter() - started, pruned.model
        assert student is not None
        layouts = [by.adapter.layout(m).blocks for m in (student, by.model)]
        kept = {row["block"]: row["was"] for row in pruned.facts["kept"]}
        twin = known.get((digest := digest_of(student), seed))
        if twin is not None:  # another method left the same model: training it again would give the same numbers
            return {**twin, "method": method, "choose_s": chosen}
        task = Student(student, by.model, data, parse_loss(self.loss), pairs_of(*layouts, kept), blocks=layouts[0],
                       batch=settings.batch, steps=settings.steps, seed=seed,
                       clean_weights=self.clean_weights)  # fmt: skip
        before = self.measure(student, task)
        train(task, settings)
        task.finish()
        after = self.measure(student, task)
        task.release()
        return {"method": method, "ratio": ratio, "seed": seed, "removed": len(pruned.facts["removed"]),
                "before": before, "after": after, "choose_s": chosen,
                "total_s": time.perf_counter() - started, "digest": digest}  # fmt: skip


def digest_of(model: nn.Module) -> str:
    """Of names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def interval(values: list[float]) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.2f} ± {half:.2f}"


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
    parser.add_argument("--model", type=Path, default=digits_folder())
    parser.add_argument("--scenes", type=Path, help="folder with classifier.py, for a scenes checkpoint")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[n.replace("_", "-") for n in registry.names()])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--loss", default="clean=1,output=0.1,normalised=0.1")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rows", type=Path, default=Path("recovery.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    done = {(r["method"], r["ratio"], r["seed"]) for r in rows}
    bench = Bench(options.model, options.images, options.scenes, options.loss)
    settings = Settings(steps=options.steps, batch=options.batch, learning_rate=options.rate, ema=0.99)
    for seed in options.seeds:
        data = bench.states(7919 + seed, 128)
        for ratio in options.ratios:
            for method in options.methods:
                if (method, ratio, seed) not in done:
                    known = {(r["digest"], r["seed"]): r for r in rows if "digest" in r}
                    rows.append(bench.row(method, ratio, seed, settings, data, known))
                    with options.rows.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(method, ratio, seed, rows[-1]["before"], rows[-1]["after"], f"{rows[-1]['total_s']:.0f} s",
                          flush=True)  # fmt: skip
    show(rows, bench.accuracy)


if __name__ == "__main__":
    main()
