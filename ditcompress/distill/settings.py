"""The options of the trainer. Without torch: recipes are checked without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """`learning_rate` is that of groups without one of their own; `warmup` the share of steps with a rising rate;
    `ema` the decay of the moving average that is kept in the end (0: the weights themselves); `clip` the largest
    gradient norm; `save_every` steps between states; `optimizer` adamw8bit: moments in 8 bits (bitsandbytes)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
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
