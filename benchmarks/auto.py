"""Is `auto` on or above every single format at equal stored bits? Each point is followed by auto with its bits.

    python benchmarks/auto.py [--model CKPT --scenes FOLDER]

All points use the same statistics, GPTQ settings and held-out inputs (see benchmarks/quality.py). Weights only.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

from quality import digits_inputs, outputs, scenes_inputs

from ditcompress import api
from ditcompress.console import Silent, print_table
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.measures import output_sqnr_db
from ditcompress.models import adapter_for
from ditcompress.recipe import parse_recipe

GPTQ = {"gptq": {"damp": 0.01, "sweeps": 4, "refit": 4}}
CALIBRATION = {"samples": 24, "steps": 25, "weighting": "fisher"}


def points() -> dict[str, dict[str, Any]]:
    """Single formats by name."""
    grouped = {"format": "int", "layout": "group", "symmetric": False, "scale": "uint8", "clip": 20}
    found = {
        f"int{bits} g{group}": {**grouped, "bits": bits, "group": group}
        for bits, group in ((2, 32), (3, 64), (3, 32), (4, 64), (4, 32), (5, 32), (6, 32))
    }
    return {**found, "nf4 g64": {"format": "nf4", "scale": "float16"}, "nvfp4": {"format": "nvfp4", "clip": 10},
            "mxfp4": {"format": "mx", "scale": "best"}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scenes", type=Path)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    path = options.model or digits_folder()
    model, checkpoint = load_model(path)
    scheduler = adapter_for(checkpoint.config).default_scheduler(checkpoint.config)
    test = scenes_inputs(options.scenes, 64, scheduler, 999) if options.scenes else digits_inputs(64, scheduler, 999)
    reference = outputs(model, test)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:

        def measured(recipe: Any, **target: Any) -> tuple[float, float]:
            result = api.quantize(path, recipe, Path(scratch) / "out", overwrite=True, reporter=Silent(), **target)
            assert result.path is not None
            return result.bits, output_sqnr_db(reference, outputs(load_model(result.path)[0], test))

        for name, weight in points().items():
            if options.only and name not in options.only:
                continue
            rule = {"weight": weight, "steps": [GPTQ]}
            value = {"name": "single", "calibration": CALIBRATION, "rules": [rule]}
            bits, single = measured(parse_recipe(value, name))
            own, auto = measured("auto", target_bits=bits)
            better = f"{auto - single:+.2f}"
            rows.append([name, f"{bits:.3f}", f"{single:.2f}", f"{own:.3f}", f"{auto:.2f}", better])
            print(rows[-1], flush=True)
    print_table(f"auto against single formats ({path.name})", ["format", "bits", "dB", "auto bits", "dB", "gain"], rows)


if __name__ == "__main__":
    main()
