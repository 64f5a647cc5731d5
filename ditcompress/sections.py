"""The sections of a recipe beside its rules: what is gathered, trained, removed, searched, judged. Without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .distill.settings import Settings


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(Strict):
    """What the statistics are gathered from; see docs/cli.md."""

    samples: int = Field(32, ge=1, le=100_000)
    steps: int = Field(25, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0)
    policy: Literal["uniform", "all", "normal"] = "uniform"
    buckets: int = Field(8, ge=1, le=1000)
    reservoir: int = Field(1024, ge=0, le=1_000_000)
    weighting: Literal["none", "fisher"] = "none"
    labels: tuple[Annotated[int, Field(ge=0)], ...] = ()


class Training(Settings):
    """How steps that learn are trained (see the trainer's own fields): on `images` of the teacher's trajectories of
    `sample_steps` steps, renewed every `refresh` steps, a share `null` without condition; `output` and `features` weigh
    the losses."""

    images: int = Field(128, ge=1)
    refresh: int = Field(500, ge=1)
    sample_steps: int = Field(25, ge=1, le=1000)
    null: float = Field(0.15, ge=0, le=1)
    output: float = Field(1.0, ge=0)
    features: float = Field(0.0, ge=0)


class Pruning(Strict):
    """What goes before anything is quantized: the options of `prune`, `params` are the method's own (--set)."""

    ratio: float | None = Field(None, gt=0, lt=1)
    by: Literal["params", "flops", "latency"] = "params"
    method: str | None = None
    params: dict[str, Any] = {}
    width_ratio: float | None = Field(None, gt=0, lt=1)
    width_units: Literal["both", "neurons", "heads"] = "both"
    width_method: str = "obs-diff"
    width_params: dict[str, Any] = {}

    @model_validator(mode="after")
    def _something(self) -> Pruning:
        if self.ratio is None and self.width_ratio is None:
            raise ValueError("ratio, width_ratio or both are needed")
        return self


class Report(Strict):
    """How much of `evaluate` follows, into the folder `report` of the result; see its options."""

    pairs: int = Field(320, ge=1, le=100_000)
    images: int | None = Field(None, ge=8)
    guidance: float | None = Field(None, ge=0)


class Evaluation(Strict):
    """How a result of this recipe is judged: margins declared before anything is measured."""

    profile: Literal["auto", "fidelity", "fidelity-latent", "quality"] = "auto"
    margins: dict[str, float] = {}


class SchedulerSearch(Strict):
    """Scheduler coefficients for few-step sampling, searched when the model is written; see `q-sched`."""

    steps: int = Field(ge=1, le=1000)
    method: Literal["trajectory", "gain", "grid"] = "trajectory"
    images: int = Field(32, ge=1, le=100_000)
    held_out: int = Field(128, ge=2, le=100_000)
    guidance: float | None = Field(None, ge=0)


class Bitsandbytes(Strict):
    """Options of the bitsandbytes backend, which has no data and no steps. `blocksize`, `double_quant` (of the scales)
    and `compute_dtype` are of nf4 and fp4; `threshold` of int8: inputs above it are computed in 16 bits."""

    quant_type: Literal["nf4", "fp4", "int8"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = False
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    threshold: float = Field(6.0, ge=0)

    @model_validator(mode="after")
    def _fitting(self) -> Bitsandbytes:
        other = {"blocksize", "double_quant", "compute_dtype"} if self.quant_type == "int8" else {"threshold"}
        if wrong := sorted(other & self.model_fields_set):
            raise ValueError(f"{wrong[0]} is no option of {self.quant_type}")
        return self

    def params(self) -> dict[str, Any]:
        """The options that this type has, as JSON values."""
        if self.quant_type == "int8":
            return {"quant_type": "int8", "threshold": self.threshold}
        return self.model_dump(exclude={"threshold"})
