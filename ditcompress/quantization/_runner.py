"""A model that is run with some weights replaced: how much single layers matter to what is seen of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.conditions import Conditions
from ..calibration.trajectory import Sampling, StepRecord, predict_branches, sample


class Runner:
    """The original at recorded states of its own trajectories, with and without other weights (teacher-forced)."""

    def __init__(
        self, model: nn.Module, adapter: ModuleType, config: Mapping[str, Any], scheduler: Any,
        conditions: Conditions, sampling: Sampling, images: int = 3,
    ) -> None:  # fmt: skip
        self.model, self.adapter = model, adapter
        self.guided = conditions.null is not None and sampling.guidance != 1
        self.guidance, self.conditions = sampling.guidance, conditions.take(range(images))
        self.records: list[StepRecord] = []
        sample(
            model, adapter, config, scheduler, conditions, sampling, indices=list(range(images)),
            on_step=self.records.append,
        )  # fmt: skip

    def effects(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative squared errors with these weights (site to (out, in)): "quality" of the guided output, "text" of the
        difference that the condition makes (where there is guidance), "time" of differences between frames (videos)."""
        noise: dict[str, float] = {}
        signal: dict[str, float] = {}
        with replaced(self.model, weights), torch.no_grad():
            for record in self.records:
                timestep = record.timestep.to(record.model_input.device).expand(len(record.model_input))
                found = predict_branches(
                    self.model, self.adapter, record.model_input, timestep, self.conditions, self.guided
                )
                known = self._views(record.cond_output, record.null_output)
                for name, view in self._views(*found).items():
                    noise[name] = noise.get(name, 0.0) + (view - known[name]).square().sum().item()
                    signal[name] = signal.get(name, 0.0) + known[name].square().sum().item()
        return {name: value / max(signal[name], 1e-30) for name, value in noise.items()}

    def _views(self, cond: Tensor, null: Tensor | None) -> dict[str, Tensor]:
        output = cond if null is None else null + self.guidance * (cond - null)
        found = {"quality": output}
        if null is not None:
            found["text"] = cond - null
        if output.dim() == 5:
            found["time"] = output[:, :, 1:] - output[:, :, :-1]
        return found


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these weights inside the block."""
    kept = {}
    try:
        for site, weight in weights.items():
            parameter: Any = model.get_submodule(site).weight
            kept[site] = parameter.data
            parameter.data = weight.to(parameter.data)
        yield
    finally:
        for site, data in kept.items():
            model.get_submodule(site).weight.data = data  # type: ignore[union-attr, operator]
