"""The two models under comparison, with everything that both must share: scheduler, conditions, guidance, noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.conditions import Conditions, get_conditions
from ..calibration.schedulers import load_scheduler
from ..calibration.trajectory import Sampling, StepRecord, sample
from ..checkpoint.reader import Checkpoint
from ..console import Reporter
from ..errors import DitcompressError
from ..loading import load_model
from ..models import adapter_for
from .settings import EvaluateSettings


@dataclass(frozen=True)
class Subject:
    """Original and compressed model of one family, and how both are driven."""

    original: nn.Module
    compressed: nn.Module
    source: Checkpoint
    result: Checkpoint
    adapter: ModuleType
    scheduler: Any
    conditions: Conditions
    guidance: float
    settings: EvaluateSettings

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    @property
    def pixels(self) -> bool:
        """Whether the model makes images itself (one or three channels) and not latents of a VAE."""
        return self.adapter.latent_shape(self.config)[0] in (1, 3)

    def sampling(self, seed: int | None = None, batch: int | None = None) -> Sampling:
        s = self.settings
        return Sampling(s.steps, self.guidance, s.seed if seed is None else seed, batch or s.batch)

    def sample(
        self,
        model: nn.Module,
        indices: list[int],
        *,
        seed: int | None = None,
        batch: int | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> Tensor:
        """Images (or latents) of the given indices, float32."""
        return sample(
            model, self.adapter, self.config, self.scheduler, self.conditions,
            self.sampling(seed, batch), indices=indices, on_step=on_step,
        )  # fmt: skip

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, indices: Tensor, null: bool) -> Tensor:
        """Teacher-forced prediction for latents (n, ...) of the images `indices` at `timestep` (n,)."""
        chosen = self.conditions.take(indices.tolist())
        cond = chosen.null if null else chosen.cond
        with torch.no_grad():
            return self.adapter.predict(model, latents, timestep, cond).float()


def open_subject(
    original: Path,
    compressed: Path,
    settings: EvaluateSettings,
    *,
    scheduler: Path | None = None,
    conditions: Path | None = None,
    prompts: list[str] | None = None,
    reporter: Reporter,
) -> Subject:
    """Both models, loaded and checked; E340 when they are not two versions of one model."""
    dtype = getattr(torch, settings.dtype)
    first, source = load_model(original, dtype=dtype, device=settings.device)
    second, result = load_model(compressed, dtype=dtype, device=settings.device)
    adapter = adapter_for(source.config)
    for key, same in (
        ("_class_name", source.class_name == result.class_name),
        ("latent shape", adapter.latent_shape(source.config) == adapter.latent_shape(result.config)),
    ):
        if not same:
            raise DitcompressError(
                "E340", compressed, f"{key} differs from the original's", "give two versions of one model"
            )
    sampler = load_scheduler(source.config, scheduler or source.scheduler_folder, adapter, reporter)
    count = max(settings.pairs, settings.inputs, 8)
    given = get_conditions(source, adapter, count, settings.seed, file=conditions, prompts=prompts, reporter=reporter)
    guidance = adapter.default_guidance(source.config) if settings.guidance is None else settings.guidance
    return Subject(first, second, source, result, adapter, sampler, given, guidance, settings)
