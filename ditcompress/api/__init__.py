"""What the command line and Python users call."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._facts import check_recipe as check_recipe
    from ._facts import quantize_facts as quantize_facts
    from ._options import method_settings as method_settings
    from .bench import bench as bench
    from .calibration import calibrate as calibrate
    from .calibration import calibration_plan as calibration_plan
    from .chain import ChainResult as ChainResult
    from .chain import run_recipe as run_recipe
    from .chain import staged as staged
    from .compress import QuantizeResult as QuantizeResult
    from .compress import quantize as quantize
    from .depth import PruneResult as PruneResult
    from .depth import prune as prune
    from .depth import sensitivity as sensitivity
    from .distill import DistillResult as DistillResult
    from .distill import distill as distill
    from .judge import demo as demo
    from .judge import evaluate as evaluate
    from .judge import parse_margins as parse_margins
    from .judge import report as report
    from .look import explain as explain
    from .look import export as export
    from .look import inspect as inspect
    from .moe import moe as moe
    from .plug import PlugResult as PlugResult
    from .plug import plug as plug
    from .q_sched import q_sched as q_sched
    from .runs import compare as compare
    from .runs import sample as sample

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

# where each is: a command imports what it runs, not what others would
_HOMES = {
    "_facts": ("check_recipe", "quantize_facts"),
    "_options": ("method_settings",),
    "bench": ("bench",),
    "calibration": ("calibrate", "calibration_plan"),
    "chain": ("ChainResult", "run_recipe", "staged"),
    "compress": ("QuantizeResult", "quantize"),
    "depth": ("PruneResult", "prune", "sensitivity"),
    "distill": ("DistillResult", "distill"),
    "judge": ("demo", "evaluate", "parse_margins", "report"),
    "look": ("explain", "export", "inspect"),
    "moe": ("moe",),
    "plug": ("PlugResult", "plug"),
    "q_sched": ("q_sched",),
    "runs": ("compare", "sample"),
}


class _Lazy(ModuleType):
    """Functions by name, imported when first asked for; a module of the same name does not hide its function."""

    def __getattr__(self, name: str) -> Any:
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f".{home}", __name__), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Lazy
