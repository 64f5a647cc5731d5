"""Sampling trajectories: any adapter through any diffusers scheduler, the same for calibration and evaluation.

Every image has its own noise, and every step of a stochastic sampler its own generator, derived by hashing
(seed, image, step): results do not depend on batch size, order or which images were made before.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..offload import device_of
from .conditions import Conditions


@dataclass(frozen=True)
class Sampling:
    """`guidance` 1 (or a model without a null condition) means a single branch."""

    steps: int = 25
    guidance: float = 1.0
    seed: int = 0
    batch: int = 16


@dataclass(frozen=True)
class StepRecord:
    """One step of one batch, in float32. `timestep` is exactly what the model was fed; `model_input` are the latents
    after the scheduler's scaling; the outputs are before guidance."""

    index: int
    timestep: Tensor
    latents: Tensor
    model_input: Tensor
    cond_output: Tensor
    null_output: Tensor | None


def generator(seed: int, image: int, step: int = -1) -> torch.Generator:
    """The generator of one image's start (step -1) or of one of its steps."""
    digest = hashlib.sha256(f"{seed}/{image}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def initial_noise(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """Standard normal noise (len(indices), *shape), one generator an image."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, image)) for image in indices])


def prepare(scheduler: Any, steps: int, adapter: ModuleType, config: Mapping[str, Any]) -> Any:
    """A fresh copy of the scheduler with its timesteps set; dynamic shifting gets its image length.

    A family whose pipeline gives the scheduler noise levels of its own exports `sigmas(steps)`.
    """
    fresh, latent_shape = copy.deepcopy(scheduler), adapter.latent_shape(config)
    own = getattr(adapter, "sigmas", None)
    takes = "sigmas" in inspect.signature(fresh.set_timesteps).parameters
    given = {"sigmas": own(steps)} if own and takes and not fresh.config.get("use_flow_sigmas") else {}
    if fresh.config.get("use_dynamic_shifting"):
        tokens = latent_shape[-1] * latent_shape[-2] / 4
        config = fresh.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        given["mu"] = base + (most - base) * (tokens - low) / (high - low)
    try:
        fresh.set_timesteps(steps, **given)
    except ValueError as error:
        raise DitcompressError("E203", f"{steps} steps", str(error), "give fewer") from None
    return fresh


def sample(
    model: nn.Module,
    adapter: ModuleType,
    config: Mapping[str, Any],
    scheduler: Any,
    conditions: Conditions,
    sampling: Sampling,
    *,
    indices: Sequence[int] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    reporter: Reporter | None = None,
) -> Tensor:
    """Latents (or pixels) of the images `indices` (all by default), float32 on CPU, (n, *latent_shape).

    Image i uses condition i and noise i. The scheduler is not modified.
    """
    chosen = list(range(conditions.count)) if indices is None else list(indices)
    results = []
    with (reporter or Silent()).task("sample", len(chosen)) as advance, torch.no_grad():
        for start in range(0, len(chosen), sampling.batch):
            images = chosen[start : start + sampling.batch]
            results.append(
                _batch(model, adapter, config, scheduler, conditions.take(images), sampling, images, on_step)
            )
            advance(len(images))
    return torch.cat(results)


def _batch(
    model: nn.Module,
    adapter: ModuleType,
    config: Mapping[str, Any],
    scheduler: Any,
    conditions: Conditions,
    sampling: Sampling,
    images: Sequence[int],
    on_step: Callable[[StepRecord], None] | None,
) -> Tensor:
    walk = Walk(model, adapter, config, scheduler, conditions, sampling, images)
    latents = walk.start
    for index in range(walk.count):
        latents = walk.step(index, latents, on_step)
    return latents.cpu()


class Walk:
    """One batch on its way through a scheduler of its own: from `start`, its noise on the model's device, `count` calls
    of `step`. A step is differentiable where gradients are enabled, and with `recall` it can be taken again."""

    def __init__(
        self, model: nn.Module, adapter: ModuleType, config: Mapping[str, Any], scheduler: Any, conditions: Conditions,
        sampling: Sampling, images: Sequence[int],
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.conditions, self.sampling = model, adapter, conditions, sampling
        self.images = list(images)
        self.sampler = prepare(scheduler, sampling.steps, adapter, config)
        self.stochastic = "generator" in inspect.signature(self.sampler.step).parameters
        self.guided = conditions.null is not None and sampling.guidance != 1
        noise = initial_noise(adapter.latent_shape(config), sampling.seed, images)
        scale = float(getattr(self.sampler, "init_noise_sigma", 1.0))
        self.start = noise.to(device_of(model)) * scale
        self.fresh = self.remember()

    @property
    def count(self) -> int:
        return len(self.sampler.timesteps)

    def step(self, index: int, latents: Tensor, on_step: Callable[[StepRecord], None] | None = None) -> Tensor:
        """The latents after step `index`, float32."""
        sampler, time = self.sampler, self.sampler.timesteps[index]
        scaled = sampler.scale_model_input(latents, time) if hasattr(sampler, "scale_model_input") else latents
        timestep = torch.as_tensor(time).to(latents.device).expand(len(self.images))
        cond, null = predict_branches(self.model, self.adapter, scaled, timestep, self.conditions, self.guided)
        if on_step is not None:
            on_step(StepRecord(index, torch.as_tensor(time), latents, scaled, cond, null))
        output = cond if null is None else null + self.sampling.guidance * (cond - null)
        draws = [generator(self.sampling.seed, image, index) for image in self.images] if self.stochastic else []
        extra = {"generator": draws} if self.stochastic else {}
        moved: Tensor = sampler.step(output, time, latents, **extra, return_dict=False)[0]
        return moved.float()

    def remember(self) -> dict[str, Any]:
        """What the scheduler keeps between steps."""
        return {key: list(value) if isinstance(value, list) else value for key, value in vars(self.sampler).items()}

    def recall(self, state: Mapping[str, Any]) -> None:
        """Put `remember`'s state back."""
        vars(self.sampler).update({k: list(v) if isinstance(v, list) else v for k, v in state.items()})

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """`remember`'s state as tensors and JSON, without what steps do not change; None where a step has made
        something that is neither."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for key, value in vars(self.sampler).items():
            parts = value if isinstance(value, list) else [value]
            if all(isinstance(part, (Tensor, int, float, bool, str, type(None))) for part in parts):
                held = {f"{key}.{n}": part.contiguous() for n, part in enumerate(parts) if isinstance(part, Tensor)}
                tensors |= held
                plain = [str(part.device) if isinstance(part, Tensor) else part for part in parts]
                facts[key] = [isinstance(value, list), [f"{key}.{n}" in held for n in range(len(parts))], plain]
            elif value is not self.fresh.get(key):
                return None
        return tensors, facts

    def go_on(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put back what `stored` gave."""
        for key, (listed, held, plain) in facts.items():
            parts = [
                tensors[f"{key}.{n}"].to(part) if is_held else part
                for n, (is_held, part) in enumerate(zip(held, plain, strict=True))
            ]
            setattr(self.sampler, key, parts if listed else parts[0])


def predict_branches(
    model: nn.Module, adapter: ModuleType, latents: Tensor, timestep: Tensor, conditions: Conditions, guided: bool
) -> tuple[Tensor, Tensor | None]:
    """Predictions with and (when guided) without the condition, both in one forward pass, float32."""
    if not guided or conditions.null is None:
        return adapter.predict(model, latents, timestep, conditions.cond).float(), None
    both = {name: torch.cat([tensor, conditions.null[name]]) for name, tensor in conditions.cond.items()}
    output = adapter.predict(model, torch.cat([latents, latents]), torch.cat([timestep, timestep]), both).float()
    cond, null = output.chunk(2)
    return cond, null
