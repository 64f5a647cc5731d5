"""The two models under comparison, with everything that both must share: scheduler, conditions, guidance, noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from ..errors import DitcompressError, some
from ..loading import load_model
from ..models import adapter_for
from .settings import EvaluateSettings, batch_for
from .vae import decode, load_vae


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
    vae: Any = None
    other_scheduler: str = ""  # how the compressed folder's own scheduler differs from the one used

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    @property
    def pixels(self) -> bool:
        """Whether the model makes images itself (one or three channels) and not latents of a VAE."""
        return self.adapter.latent_shape(self.config)[0] in (1, 3)

    @property
    def makes_images(self) -> bool:
        return self.pixels or self.vae is not None

    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        shape = self.adapter.latent_shape(self.config)
        if self.vae is not None:
            shape = tuple(decode(self.vae, torch.zeros(1, *shape)).shape[1:])
        return int(shape[0]), int(shape[1]), int(shape[2])

    @property
    def images_kind(self) -> str:
        """What is compared: "" for the model's own images, else a note."""
        return "" if self.pixels else "latents, not images" if self.vae is None else "decoded by the pipeline's VAE"

    def sampling(self, seed: int | None = None, batch: int | None = None) -> Sampling:
        s = self.settings
        size = batch or s.batch or batch_for(self.adapter.latent_shape(self.config))
        return Sampling(s.steps, self.guidance, s.seed if seed is None else seed, size)

    def images(self, model: nn.Module, indices: list[int], *, seed: int | None = None) -> Tensor:
        """Images of the given indices through the whole sampler and, where there is one, the VAE."""
        latents = self.sample(model, indices, seed=seed)
        return latents if self.vae is None else decode(self.vae, latents)

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
    check_versions(source, result)
    other = "" if scheduler else scheduler_difference(source.scheduler_folder, result.scheduler_folder)
    count = max(settings.pairs, settings.image_count, settings.inputs, 8)
    made = _driven(first, source, settings, scheduler, conditions, prompts, count, reporter)
    return replace(made, compressed=second, result=result, other_scheduler=other)


def check_versions(original: Checkpoint, other: Checkpoint) -> None:
    """E340 unless both are versions of one model: of one class, with the same inputs."""
    adapter = adapter_for(original.config)
    for key, same in (
        ("_class_name", original.class_name == other.class_name),
        ("latent shape", adapter.latent_shape(original.config) == adapter.latent_shape(other.config)),
    ):
        if not same:
            raise DitcompressError(
                "E340", other.path, f"{key} differs from the original's", "give two versions of one model"
            )


def open_single(
    path: Path,
    settings: EvaluateSettings,
    count: int,
    *,
    scheduler: Path | None = None,
    conditions: Path | None = None,
    prompts: list[str] | None = None,
    reporter: Reporter,
) -> Subject:
    """One model, compressed or not, as both sides of a subject: for sampling."""
    model, source = load_model(path, dtype=getattr(torch, settings.dtype), device=settings.device)
    return _driven(model, source, settings, scheduler, conditions, prompts, count, reporter)


def _driven(
    model: nn.Module,
    source: Checkpoint,
    settings: EvaluateSettings,
    scheduler: Path | None,
    conditions: Path | None,
    prompts: list[str] | None,
    count: int,
    reporter: Reporter,
) -> Subject:
    """A model with what drives it: scheduler, `count` conditions, guidance, VAE."""
    adapter = adapter_for(source.config)
    sampler = load_scheduler(source.config, scheduler or source.scheduler_folder, adapter, reporter)
    given = get_conditions(source, adapter, count, settings.seed, file=conditions, prompts=prompts, reporter=reporter)
    guidance = adapter.default_guidance(source.config) if settings.guidance is None else settings.guidance
    vae = None if adapter.latent_shape(source.config)[0] in (1, 3) else load_vae(source, settings.device)
    return Subject(model, model, source, source, adapter, sampler, given, guidance, settings, vae)


def scheduler_difference(original: Path | None, compressed: Path | None) -> str:
    """The settings in which the two folders' schedulers differ, in words; "" for none or where one has no scheduler."""
    if original is None or compressed is None:
        return ""
    try:
        first, second = (json.loads((f / "scheduler_config.json").read_text()) for f in (original, compressed))
        keys = sorted(k for k in {*first, *second} if not k.startswith("_diffusers") and first.get(k) != second.get(k))
    except (OSError, ValueError, TypeError, AttributeError):
        return "the compressed model's cannot be read"
    return some(keys) if keys else ""
