"""What an evaluation is asked to do; everything here goes into the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvaluateSettings:
    """`pairs` of same-noise images (T3); `inputs` and `timesteps` of the teacher-forced probe (T2); `guidance` None is
    the family's usual; `profile` "auto" picks by the kind of model; `margins` replace single margins of the profile;
    `classifier` is "auto", "digits", "none" or module:function."""

    pairs: int = 320  # 300 is the least number at which no bad pair bounds their share by 1 %
    inputs: int = 256
    timesteps: int = 8
    steps: int = 25
    guidance: float | None = None
    seed: int = 1_000_003  # never a calibration seed: held-out noise and labels
    batch: int = 32
    profile: str = "auto"
    margins: Mapping[str, float] = field(default_factory=dict)
    classifier: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"
    shown: int = 8  # image triples of each kind in the report
    fresh_process: bool = True
