"""What the command line and Python users call."""

from __future__ import annotations

from ._facts import check_recipe, quantize_facts
from .bench import bench
from .calibration import calibrate, calibration_plan
from .chain import ChainResult, run_recipe, staged
from .compress import QuantizeResult, quantize
from .depth import PruneResult, method_settings, prune, sensitivity
from .distill import DistillResult, distill
from .judge import demo, evaluate, parse_margins, report
from .look import explain, export, inspect
from .moe import moe
from .plug import PlugResult, plug
from .q_sched import q_sched
from .runs import compare, sample

__all__ = [
    "ChainResult",
    "DistillResult",
    "PlugResult",
    "PruneResult",
    "QuantizeResult",
    "bench",
    "calibrate",
    "calibration_plan",
    "check_recipe",
    "compare",
    "demo",
    "distill",
    "evaluate",
    "explain",
    "export",
    "inspect",
    "method_settings",
    "moe",
    "parse_margins",
    "plug",
    "prune",
    "q_sched",
    "quantize",
    "quantize_facts",
    "report",
    "run_recipe",
    "sample",
    "sensitivity",
    "staged",
]
