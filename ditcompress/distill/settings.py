"""The options of the trainer and of `distill`. Without torch: recipes are checked without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

TRAJECTORIES = "trajectories"


class Settings(BaseModel):
    """`learning_rate` is that of groups without one of their own; `warmup` the share of steps with a rising rate;
    `ema` the decay of the moving average that is kept in the end (0: the weights themselves); `clip` the largest
    gradient norm; `save_every` steps between states; `optimizer` adamw8bit: moments in 8 bits (bitsandbytes)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)
    ema: float = Field(0.0, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    save_every: int = Field(200, ge=1)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"


class Options(Settings):
    """How a student is trained; those of the trainer included. `batch` counts the samples of all processes.

    `loss`: weights by name (output, task, features, normalised, masked, direction); `decay_features` lets those of
    blocks fall to 0. `data`: "trajectories" (none needed), a folder of cached latents, or images. `images`,
    `sample_steps`, `refresh`, `guidance` shape the trajectories; `null` is the share of dropped conditions."""

    loss: str = "output=1"
    data: str = TRAJECTORIES
    lora: int = Field(0, ge=0)
    decay_features: bool = False
    checkpointing: bool = False
    images: int = Field(128, ge=1)
    sample_steps: int = Field(25, ge=1)
    refresh: int = Field(500, ge=1)
    null: float = Field(0.15, ge=0, le=1)
    guidance: float | None = Field(None, ge=0)
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
