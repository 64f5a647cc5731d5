"""How a scheduler mixes clean latents and noise, and what a prediction says about the clean ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..calibration.trajectory import prepare
from ..errors import DitcompressError

MOST = 25.0  # of the weight of an error in the clean latents: at the first steps an epsilon says nothing about them


class Noising:
    """x_t = a x0 + b e and the prediction's target, for the timesteps of training. E205 with `remedy` for a scheduler
    that has no noise levels, or for a prediction that is not known."""

    def __init__(
        self, scheduler: Any, adapter: ModuleType, config: Mapping[str, Any], remedy: str = "leave out --data"
    ) -> None:
        settings = scheduler.config
        count = int(settings.get("num_train_timesteps") or 1000)
        self.kind = str(settings.get("prediction_type") or "epsilon")
        flow = bool(settings.get("use_flow_sigmas")) or "flow" in self.kind or "Flow" in type(scheduler).__name__
        if flow:
            ready = prepare(scheduler, count, adapter, config)
            self.timesteps, self.kind = ready.timesteps.cpu(), "flow"
            noise = ready.sigmas[: len(self.timesteps)].cpu().float()
            self.keep, self.noise = 1 - noise, noise
        elif getattr(scheduler, "alphas_cumprod", None) is not None:
            kept = scheduler.alphas_cumprod.cpu().float()
            self.timesteps, self.keep, self.noise = torch.arange(len(kept)), kept.sqrt(), (1 - kept).sqrt()
        else:
            raise DitcompressError("E205", type(scheduler).__name__, "has no noise levels", remedy)
        if self.kind not in ("flow", "epsilon", "v_prediction", "sample"):
            raise DitcompressError("E205", f"prediction_type {self.kind}", "is not known", remedy)

    def __call__(self, clean: Tensor, noise: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The noised latent and the target, of one sample at timestep number `index`."""
        a, b = self.keep[index], self.noise[index]
        target = {"flow": noise - clean, "epsilon": noise, "sample": clean, "v_prediction": a * noise - b * clean}
        return a * clean + b * noise, target[self.kind]

    def clean_weights(self, timestep: Tensor) -> Tensor:
        """Squared change of the implied clean latents for a change of the prediction, at most 25, (n,) for timesteps
        (n,): (b / a)^2 for epsilon, b^2 for v and flow, 1 where the clean latents are predicted."""
        known = self.timesteps.to(timestep.device, torch.float32)
        index = (timestep.float()[:, None] - known).abs().argmin(1).cpu()
        a, b = self.keep[index], self.noise[index]
        squared = {"epsilon": (b / a.clamp_min(1e-6)).square(), "sample": torch.ones_like(a)}
        return squared.get(self.kind, b.square()).clamp_max(MOST).to(timestep.device)
