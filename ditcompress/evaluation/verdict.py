"""The three-valued verdict: margins declared beforehand, PASS only when a whole 95 % interval lies inside its margin.

FAIL when it lies wholly outside, INCONCLUSIVE otherwise, with the number of pairs that would decide. All gates must
pass, so a PASS needs no correction for multiplicity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import DitcompressError
from ..registry import nearest
from ..result import Measurement

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"


@dataclass(frozen=True)
class Margin:
    """The interval of `measurement` must lie at or above `least`, or at or below `most`."""

    measurement: str
    least: float | None = None
    most: float | None = None

    def text(self, unit: str) -> str:
        return f"≥ {self.least:g} {unit}".strip() if self.least is not None else f"≤ {self.most:g} {unit}".strip()


# evaluation.md's figures for small pixel and class-conditional models; they do not transfer to latent text-to-image,
# where no absolute PSNR is gated
PROFILES: Mapping[str, tuple[Margin, ...]] = {
    "fidelity": (
        Margin("sqnr_weighted", least=20.0),
        Margin("gain_error", most=1.0),
        Margin("psnr", least=25.0),
        Margin("pairs_under_15", most=1.0),
    ),
    "fidelity-latent": (Margin("sqnr_weighted", least=20.0), Margin("gain_error", most=1.0)),
    # for models that were trained again: same-noise figures are shown, the distribution is gated
    "quality": (
        Margin("class_accuracy", least=-1.0),
        Margin("fd_reference_percent", most=5.0),
        Margin("recall", least=-0.03),
        Margin("coverage", least=-0.03),
    ),
}


def margins_of(profile: str, overrides: Mapping[str, float]) -> tuple[Margin, ...]:
    """The margins of a profile with single values replaced; E203 for an unknown profile or measurement."""
    if profile not in PROFILES:
        raise DitcompressError("E203", f"--profile {profile}", "is not known", nearest(profile, list(PROFILES)))
    margins = {margin.measurement: margin for margin in PROFILES[profile]}
    for name, value in overrides.items():
        if name not in margins:
            raise DitcompressError(
                "E203", f"--margin {name}", "is not gated by this profile", nearest(name, list(margins))
            )
        if math.isnan(value):
            raise DitcompressError("E203", f"--margin {name}", "is not a number", f"for example --margin {name}=1")
        old = margins[name]
        margins[name] = Margin(name, value, None) if old.least is not None else Margin(name, None, value)
    return tuple(margins.values())


def gate(measurement: Measurement, margin: Margin) -> Measurement:
    """The measurement with its gate decided."""
    unit = measurement.unit
    if measurement.identical:
        return replace(measurement, gate=PASS, margin=margin.text(unit))
    low, high = measurement.low, measurement.high
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        outcome = INCONCLUSIVE
    elif margin.least is not None:
        outcome = PASS if low >= margin.least else FAIL if high < margin.least else INCONCLUSIVE
    else:
        assert margin.most is not None
        outcome = PASS if high <= margin.most else FAIL if low > margin.most else INCONCLUSIVE
    note = measurement.note
    if outcome == INCONCLUSIVE:
        note = f"{note} {_needed(measurement, margin)}".strip()
    return replace(measurement, gate=outcome, margin=margin.text(unit), note=note)


def _needed(measurement: Measurement, margin: Margin) -> str:
    """About how many pairs would decide: an interval shrinks with the square root of their number."""
    limit = margin.least if margin.least is not None else margin.most
    if measurement.value is None or measurement.low is None or measurement.high is None or limit is None:
        return "no interval"
    if measurement.value == 0 and margin.most is not None:
        return f"at least {math.ceil(300 / margin.most)} pairs are needed"  # rule of three, in per cent
    gap, width = abs(measurement.value - limit), max(measurement.high - measurement.low, 1e-12)
    if not math.isfinite(gap) or not math.isfinite(width):
        return "the interval is unbounded"
    if gap == 0:
        return "the value lies on its margin"
    return f"about {math.ceil(measurement.n * (width / gap) ** 2)} pairs would decide"


def decide(
    measurements: Sequence[Measurement], margins: Sequence[Margin], broken: bool
) -> tuple[str, list[Measurement]]:
    """The verdict and the gated measurements. `broken`: an integrity check failed, which is always FAIL."""
    by_name = {margin.measurement: margin for margin in margins}
    gated = [gate(m, by_name[m.name]) if m.name in by_name else m for m in measurements]
    outcomes = [m.gate for m in gated if m.gate]
    missing = set(by_name) - {m.name for m in gated}
    if broken or FAIL in outcomes:
        return FAIL, gated
    return (INCONCLUSIVE if INCONCLUSIVE in outcomes or missing or not outcomes else PASS), gated


def missing_gates(measurements: Sequence[Measurement], margins: Sequence[Margin]) -> list[str]:
    """Gated measurements that were not made: they leave the verdict inconclusive."""
    return [margin.measurement for margin in margins if margin.measurement not in {m.name for m in measurements}]


def moved(measurements: Sequence[Measurement]) -> str:
    """What must be said where the distance to data went down although the images changed: coarse rounding often
    lowers it (evaluation.md: 3-bit weights scored best of all), so it is never an improvement by itself."""
    table = {m.name: m for m in measurements}
    distance, shift = table.get("fd_reference"), table.get("fd_original")
    if distance is None or shift is None or distance.identical or distance.value is None or shift.value is None:
        return ""
    if distance.value >= 0 or shift.value <= (shift.floor or 0) * 0.5:
        return ""
    return "distribution moved: a lower Fréchet distance to the reference is not evidence of better quality"
