"""How often the evaluation raises a false alarm: comparisons of one model with itself (A/A).

    python benchmarks/false_alarms.py [--repeats 200] [--images 256] [--pool 1024] [--checkpoint FOLDER]

Two pools of images of the embedded model are drawn from different noise. `repeats` times both sides take `--images`
of them without replacement, and every interval on a difference is asked whether it leaves out 0: at most 5 % should,
and no gate of the quality profile should say FAIL. (With shared noise both sides are the same images: `ditcompress
evaluate MODEL MODEL` shows that every difference is then exactly 0.)
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ditcompress.console import Terminal
from ditcompress.evaluation import accuracy, verdict
from ditcompress.evaluation.digits import digits_folder
from ditcompress.evaluation.distribution import FeatureSets, measure_all
from ditcompress.evaluation.extractors import extract
from ditcompress.evaluation.quality import Sources, find_tools
from ditcompress.evaluation.sampling import image_sets
from ditcompress.evaluation.settings import EvaluateSettings
from ditcompress.evaluation.subject import open_subject
from ditcompress.result import Measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--images", type=int, default=256, help="images of each side")
    parser.add_argument("--pool", type=int, default=1024, help="images that each side is drawn from")
    parser.add_argument("--checkpoint", type=Path, default=digits_folder())
    args = parser.parse_args()
    reporter = Terminal()
    subject = open_subject(
        args.checkpoint, args.checkpoint, EvaluateSettings(pairs=args.pool, images=args.pool), reporter=reporter
    )
    tools = find_tools(subject, Sources(), reporter)
    if tools.extractor is None or tools.extractor.logits is None or tools.reference is None:
        raise SystemExit("this benchmark needs a checkpoint with reference images and a classifier")
    with tempfile.TemporaryDirectory() as folder:
        sets = image_sets(subject, Path(folder), args.pool, True, reporter)
        first, second = (extract(tools.extractor, sets[name].chunks()) for name in ("original", "fresh"))
        both = accuracy.judge(
            subject, {"original": sets["original"], "compressed": sets["fresh"]}, tools.extractor.logits
        )
    real = extract(tools.extractor, tools.reference.chunks())
    wrong, failed, seen = Counter[str](), Counter[str](), Counter[str]()
    margins = {margin.measurement: margin for margin in verdict.margins_of("quality", {})}
    with reporter.task("A/A comparisons", args.repeats) as advance:
        for repeat in range(args.repeats):
            chosen = np.random.default_rng(repeat).permutation(args.pool)[: args.images]
            for row in compare(first[chosen], second[chosen], real, pick(both, chosen)):
                if row.low is None or row.high is None or row.original is None:
                    continue  # no interval on a difference
                seen[row.name] += 1
                wrong[row.name] += not row.low <= 0 <= row.high
                if row.name in margins:
                    failed[row.name] += verdict.gate(row, margins[row.name]).gate == "FAIL"
            advance(1)
    show(seen, wrong, failed, set(margins), args)


def pick(found: accuracy.Judged, chosen: np.ndarray) -> accuracy.Judged:
    return accuracy.Judged(found.original[chosen], found.compressed[chosen], found.labels[chosen], None, False)


def compare(x: np.ndarray, y: np.ndarray, real: np.ndarray, judged: accuracy.Judged) -> list[Measurement]:
    rows, _ = measure_all(FeatureSets(x, y, real))
    return rows + accuracy.measurements(judged, "")


def show(
    seen: Counter[str], wrong: Counter[str], failed: Counter[str], gates: set[str], args: argparse.Namespace
) -> None:
    table = Table(title=f"{args.repeats} A/A comparisons, {args.images} images a side, torch {torch.__version__}")
    for heading in ("difference", "intervals", "leave out 0", "gate FAIL"):
        table.add_column(heading, justify="left" if heading == "difference" else "right")
    for name, count in seen.items():
        gate = f"{100 * failed[name] / count:.1f} %" if name in gates else ""
        table.add_row(name, str(count), f"{100 * wrong[name] / count:.1f} %", gate)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
