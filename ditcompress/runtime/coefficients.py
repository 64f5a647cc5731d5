"""Coefficients of the scheduler step (Q-Sched, Frumkin and Marculescu 2025, arXiv 2509.01624).

At step i a scheduler gets c_eps[i] * output and c_x[i] * sample in place of output and sample; the network still sees
the unscaled sample. The saved scheduler keeps its stock `_class_name` and has the vectors as three more keys: after
`import ditcompress` every diffusers door (`DiffusionPipeline`, `DDIMScheduler.from_pretrained`, `from_config`) gives a
subclass that applies them; without it stock diffusers warns that it ignores the keys and samples as before. The
subclass bears the stock class's name, so that what diffusers saves from it loads again.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DitcompressError

MODEL, SAMPLE, STEPS, CLASS = (
    "qsched_model_coefficients",
    "qsched_sample_coefficients",
    "qsched_steps",
    "qsched_scheduler",
)
KEYS = (MODEL, SAMPLE, STEPS, CLASS)
CLASSES = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
WHERE = "scheduler_config.json"
REMEDY = "run q-sched again"


class Coefficients:
    """Mixed into a stock scheduler. A coefficient of exactly 1 leaves its tensor alone; with any other the step runs in
    float32 and its result has the dtype of the sample. The step's place is the stock scheduler's own `step_index` (for
    DDIM the place of the timestep), so nothing is carried from one run to the next."""

    def _coefficients_at(self, timestep: Any) -> tuple[float, float]:
        scheduler: Any = self
        if hasattr(scheduler, "_init_step_index"):
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            index = int(scheduler.step_index)
        else:
            places = (scheduler.timesteps == torch.as_tensor(timestep).to(scheduler.timesteps.device)).nonzero()
            index = int(places[0]) if len(places) else -1
        if not 0 <= index < scheduler.config[STEPS]:
            what = f"step {index} (timestep {timestep}), the coefficients are for {scheduler.config[STEPS]} steps"
            raise DitcompressError("E332", type(self).__name__, what, "call set_timesteps with that many steps")
        return scheduler.config[MODEL][index], scheduler.config[SAMPLE][index]


def with_coefficients(scheduler: Any, model: Sequence[float], sample: Sequence[float]) -> Any:
    """A copy of `scheduler` that applies both vectors, in place of those it may have had.

    E332 for a class that is not in CLASSES or for vectors that are not of one length, finite and positive.
    """
    name = type(scheduler).__name__
    if name not in CLASSES:
        raise DitcompressError("E332", name, "takes no coefficients", f"use one of {', '.join(CLASSES)}"[:150])
    vectors = {MODEL: _vector(model, MODEL), SAMPLE: _vector(sample, SAMPLE)}
    steps = len(vectors[MODEL])
    if steps != len(vectors[SAMPLE]) or not steps:
        what = f"{steps} coefficients of the output, {len(vectors[SAMPLE])} of the sample"
        raise DitcompressError("E332", name, what, "give one of each a step")
    made = copy.deepcopy(scheduler)
    made.__class__ = subclass(stock_class(type(scheduler)))
    made.register_to_config(**vectors, **{STEPS: steps, CLASS: name})
    return made


def without_coefficients(scheduler: Any) -> Any:
    """The stock scheduler below; the scheduler itself where it has no coefficients."""
    if not isinstance(scheduler, Coefficients):
        return scheduler
    return stock_class(type(scheduler)).from_config(  # type: ignore[attr-defined]
        {key: value for key, value in scheduler.config.items() if key not in KEYS}  # type: ignore[attr-defined]
    )


def stock_class(cls: type) -> type:
    """The class of diffusers that `cls` is or was made from."""
    return cls.__bases__[1] if issubclass(cls, Coefficients) else cls


@functools.cache
def subclass(stock: type) -> type:
    """`stock` with its step scaled by the coefficients; the signatures stay, since pipelines look at them."""
    plain_step, plain_set = stock.step, stock.set_timesteps  # type: ignore[attr-defined]

    @functools.wraps(plain_step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        gain, carried = self._coefficients_at(timestep)
        if gain == 1 and carried == 1:
            return plain_step(self, model_output, timestep, sample, *args, **kwargs)
        output = model_output.float() if gain == 1 else model_output.float() * gain
        state = sample.float() if carried == 1 else sample.float() * carried
        return _in_dtype(plain_step(self, output, timestep, state, *args, **kwargs), sample.dtype)

    @functools.wraps(plain_set)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_set(self, *args, **kwargs)
        if len(self.timesteps) != self.config[STEPS]:
            what = f"{len(self.timesteps)} steps asked for, the coefficients are for {self.config[STEPS]}"
            raise DitcompressError("E332", stock.__name__, what, f"sample in {self.config[STEPS]} steps")

    def reduce(self: Any) -> Any:
        return _blank, (stock,), self.__dict__

    members = {"step": step, "set_timesteps": set_timesteps, "__reduce__": reduce, "__module__": stock.__module__,
               "__doc__": stock.__doc__}  # fmt: skip
    return type(stock.__name__, (Coefficients, stock), members)


def _blank(stock: type) -> Any:
    """For pickle: the subclass cannot be found by its name, which is the stock class's."""
    return object.__new__(subclass(stock))


def _in_dtype(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, tuple):
        return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in result)
    for key, value in result.items():
        if isinstance(value, Tensor):
            result[key] = value.to(dtype)
    return result


def _vector(values: Any, key: str) -> list[float]:
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if isinstance(values, str) or not all(math.isfinite(value) and value > 0 for value in found):
        raise DitcompressError("E332", f"{WHERE}: {key}", "is no list of positive numbers", REMEDY)
    return found


# --- loading ---------------------------------------------------------------------------------------------------------


def register() -> None:
    """Give diffusers' schedulers a `from_config` that applies stored coefficients; may be called more than once.

    `SchedulerMixin` has none of its own (it inherits `ConfigMixin`'s), so nothing of diffusers is replaced.
    """
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    SchedulerMixin.from_config = classmethod(_from_config)  # type: ignore[attr-defined]


def _from_config(cls: Any, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
    """ConfigMixin.from_config, then the coefficients; another class made from such a configuration drops them."""
    from diffusers.configuration_utils import ConfigMixin

    plain = ConfigMixin.from_config.__func__  # type: ignore[attr-defined]
    stock = stock_class(cls)
    if not isinstance(config, Mapping) or not any(key in config for key in KEYS):
        return plain(stock, config, return_unused_kwargs=return_unused_kwargs, **kwargs)
    rest = {key: value for key, value in config.items() if key not in KEYS}
    made, unused = plain(stock, rest, return_unused_kwargs=True, **kwargs)
    if config.get(CLASS) == stock.__name__:
        check(config)
        made = with_coefficients(made, config[MODEL], config[SAMPLE])
    else:
        said = "the step coefficients in this configuration are those of %s: %s samples without them"
        logging.getLogger("ditcompress").warning(said, config.get(CLASS), stock.__name__)
    return (made, unused) if return_unused_kwargs else made


def check(config: Mapping[str, Any]) -> None:
    """E332 unless the keys are all there, with vectors of the length that `qsched_steps` says."""
    for key in KEYS:
        if key not in config:
            raise DitcompressError("E332", f"{WHERE}: {key}", "is missing beside the other coefficients", REMEDY)
    steps = config[STEPS]
    for key in (MODEL, SAMPLE):
        found = _vector(config[key], key)
        if type(steps) is not int or len(found) != steps:
            raise DitcompressError("E332", f"{WHERE}: {key}", f"{len(found)} values, {STEPS} says {steps}", REMEDY)
