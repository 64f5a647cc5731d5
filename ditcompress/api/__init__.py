"""What the command line and Python users call."""

from __future__ import annotations

from .calibration import calibrate, calibration_plan
from .compress import QuantizeResult, check_recipe, quantize, quantize_facts
from .judge import demo, evaluate, parse_margins, report
from .look import export, inspect

__all__ = [
    "QuantizeResult",
    "calibrate",
    "calibration_plan",
    "check_recipe",
    "demo",
    "evaluate",
    "export",
    "inspect",
    "parse_margins",
    "quantize",
    "quantize_facts",
    "report",
]
