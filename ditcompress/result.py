"""Results: numbers with unit, direction, interval and provenance. JSON first; HTML is a rendering of the JSON.

JSON has no infinity: a measure of two identical things has `identical: true` and `value: null`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Measurement:
    """One row of the main table. `value` is the compressed model against the original; `original` and `compressed`
    are absolute values where they exist; [`low`, `high`] is the 95 % interval of `value`; `floor` the noise floor."""

    name: str
    label: str
    tier: str
    unit: str
    higher_is_better: bool
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    original: float | None = None
    compressed: float | None = None
    floor: float | None = None
    identical: bool = False
    gate: str = ""  # "PASS", "FAIL", "INCONCLUSIVE" or "" where nothing was declared
    margin: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {key: finite(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Skipped:
    """Something that was not evaluated, and why. `code` is set where the user asked for it and the input is at fault:
    the command then ends with that code after everything else was reported."""

    name: str
    reason: str
    code: str = ""


@dataclass
class Result:
    """Everything one evaluation found; `to_json` is what report.json holds. `history`: the stages that the compressed
    model says it went through before it was quantized (prune, distill)."""

    verdict: str
    profile: str
    measurements: list[Measurement]
    sizes: dict[str, Any] = field(default_factory=dict)
    integrity: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    timesteps: list[dict[str, Any]] = field(default_factory=list)
    pairs: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "verdict": self.verdict,
            "profile": self.profile,
            "remarks": self.remarks,
            "sizes": clean(self.sizes),
            "measurements": [m.to_json() for m in self.measurements],
            "integrity": clean(self.integrity),
            "timesteps": clean(self.timesteps),
            "layers": clean(self.layers),
            "pairs": clean(self.pairs),
            "speed": clean(self.speed),
            "skipped": [asdict(s) for s in self.skipped],
            "provenance": clean(self.provenance),
            "history": clean(self.history),
        }


def finite(value: Any) -> Any:
    """None in place of infinity and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clean(value: Any) -> Any:
    """`value` with every infinite or NaN float replaced by None, at any depth."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return finite(value)
