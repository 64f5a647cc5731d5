"""What an evaluation is asked to do; everything here goes into the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

IMAGES_CPU, IMAGES_GPU = 1000, 10_000
TOKENS_A_BATCH = 4096


@dataclass(frozen=True)
class EvaluateSettings:
    """`pairs` of same-noise images (T3); `images` for the distribution metrics (T4; None: 1000 on a CPU and 10 000 on
    a GPU where an extractor is at hand); `inputs` and `timesteps` of the teacher-forced probe (T2); `guidance` None
    is the family's usual; `profile` "auto" takes that of the recipe or picks by the kind of model; `margins` replace
    single margins; `classifier` is "auto", "none" or module:function; `extractor` is "auto", "none" or
    NAME[:ARGUMENT]; `batch` 0 picks by the size of the latents; `cost_batches` are those the speed is measured at."""

    pairs: int = 320  # 300 is the least number at which no bad pair bounds their share by 1 %
    images: int | None = None
    fresh: bool = False  # also sample the original with other noise: a sharper noise floor for T4
    inputs: int = 256
    timesteps: int = 8
    steps: int = 25
    guidance: float | None = None
    seed: int = 1_000_003  # never a calibration seed: held-out noise and labels
    batch: int = 0
    profile: str = "auto"
    margins: Mapping[str, float] = field(default_factory=dict)
    classifier: str = "auto"
    extractor: str = "auto"
    extractor_floor: float = 0.9
    external: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    shown: int = 8  # image triples of each kind in the report
    cost_batches: tuple[int, ...] = (1, 8)
    fresh_process: bool = True

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "margins": dict(self.margins)}

    @property
    def image_count(self) -> int:
        """Images for T4."""
        return self.images or (IMAGES_GPU if self.device.startswith("cuda") else IMAGES_CPU)

    def images_key(self) -> dict[str, Any]:
        """The settings that the sampled images depend on."""
        return {key: getattr(self, key) for key in ("steps", "guidance", "seed", "dtype")}


def batch_for(latent_shape: tuple[int, ...]) -> int:
    """Images at a time: about 4096 tokens of 2 x 2 latents, at most 256."""
    tokens = max(1, latent_shape[-1] * latent_shape[-2] // 4)
    return max(1, min(256, TOKENS_A_BATCH // tokens))
