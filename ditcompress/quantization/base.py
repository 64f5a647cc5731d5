"""What a quantization step is given and gives back. Steps are pure; the engine owns files, order and memory.

A step is a module of this folder. It exports `Params`, `NEEDS` (statistics it reads: "range", "gram", "tokens") and
one or more phases:

    choose(decisions, read, statistics, params) -> decisions   for the whole plan, from weights and statistics by site
    prepare(group, params) -> s            the smoothing vector (in,) of all linears that share an input, or None
    static(layer, params)  -> (scale, zero or None)   of a statically quantized input, from its statistics
    encode(layer, params)  -> Encoded      the stored form of one weight
    encode_many(layers, params) -> Encoded of each     optional: of weights of equal shape, format, rank and parameters
                                           together, each as `encode` would give it alone up to rounding of sums

and `SETS`, where `choose` sets a parameter of the weight's format: its name, which the format must have.

Shapes: weight (out, in); the input X is (tokens, in); smoothing uses X / s and W * s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import DitcompressError
from ..formats.base import PackedWeight, StrictParams, dequantize, resolve
from ..hadamard import rotate
from ..plan import LayerDecision, StepSpec
from ..registry import Registry, nearest
from ..runtime.activation import TINY

registry = Registry("ditcompress.quantization", "step", ("Params", "NEEDS"))

CPU = torch.device("cpu")
WIDE = 2048  # columns above which a Gram matrix is transformed in the float32 that it is kept in


class InputStatistics(Protocol):
    """What calibration knows about one input (see calibration/statistics.py)."""

    low: Tensor  # (buckets, in) least value of each channel
    high: Tensor  # (buckets, in)
    gram: Tensor | None  # (in, in) X^T X
    reservoir: Tensor  # (rows, in) tokens
    reservoir_bucket: Tensor  # (rows,) their timestep bucket

    def to(self, device: torch.device) -> InputStatistics: ...


@dataclass(frozen=True)
class Layer:
    """One linear on its way to its stored form. `weight` is not smoothed yet; `smooth` (in,) or None is what its
    input will be divided by; `sign` (in,) or None the signs of its Hadamard transform, of order `decision.rotate`;
    `statistics` describe the input before both."""

    decision: LayerDecision
    weight: Tensor
    statistics: InputStatistics | None = None
    smooth: Tensor | None = None
    sign: Tensor | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def name(self) -> str:
        return self.decision.site

    def to(self, device: torch.device) -> Layer:
        """The same linear on a device; its generator stays on the CPU."""
        if self.weight.device == device and device.type == "cpu":
            return self
        statistics = None if self.statistics is None else self.statistics.to(device)
        smooth, sign = (None if t is None else t.to(device) for t in (self.smooth, self.sign))
        return replace(self, weight=self.weight.to(device), statistics=statistics, smooth=smooth, sign=sign)

    def effective_weight(self) -> Tensor:
        """The weight that meets the smoothed and rotated input, (out, in)."""
        weight = self.weight if self.smooth is None else self.weight * self.smooth
        return weight if self.sign is None else rotate(weight, self.sign, self.decision.rotate)

    def effective_tokens(self) -> Tensor:
        """The reservoir's tokens as the linear sees them, smoothed and rotated, float32 (rows, in)."""
        tokens = need(self.statistics, self.name).reservoir.float()
        tokens = tokens if self.smooth is None else tokens / self.smooth
        return tokens if self.sign is None else rotate(tokens, self.sign, self.decision.rotate)

    def gram(self) -> Tensor:
        """Gram matrix of the smoothed and rotated input, float64 (in, in); E331 when calibration did not keep it."""
        gram = need(self.statistics, self.name).gram
        if gram is None:
            raise DitcompressError("E331", self.name, "its Gram matrix was not gathered", "calibrate for this recipe")
        gram = gram if len(gram) > WIDE else gram.double()
        if self.smooth is not None:
            inverse = 1 / self.smooth.to(gram)
            gram = gram * inverse[:, None] * inverse[None, :]
        if self.sign is not None:
            half = rotate(gram, self.sign, self.decision.rotate)
            gram = rotate(half.t(), self.sign, self.decision.rotate)
        return gram.double()


@dataclass(frozen=True)
class Group:
    """The linears that share one input, for `prepare`."""

    layers: Sequence[Layer]

    @property
    def statistics(self) -> InputStatistics:
        return need(self.layers[0].statistics, self.layers[0].name)

    def absmax(self) -> Tensor:
        """Largest absolute value of each channel over all timesteps, (in,)."""
        return torch.maximum(self.statistics.high, -self.statistics.low).amax(0)


@dataclass(frozen=True)
class Encoded:
    """The stored form of a weight: codes, the factors of a low-rank residual (up (out, r), down (r, in)), and what else
    the layer's scheme stores."""

    packed: PackedWeight
    low_rank: tuple[Tensor, Tensor] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Encoded:
        """The same form on a device."""
        tensors, extra = ({name: t.to(device) for name, t in d.items()} for d in (self.packed.tensors, self.extra))
        factors = None if self.low_rank is None else (self.low_rank[0].to(device), self.low_rank[1].to(device))
        return Encoded(replace(self.packed, tensors=tensors), factors, extra)

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in) that the smoothed input meets."""
        weight = dequantize(self.packed.spec, self.packed.tensors, self.packed.shape)
        if self.low_rank is None:
            return weight
        up, down = self.low_rank
        return weight + up.float() @ down.float()


def need(statistics: InputStatistics | None, name: str) -> InputStatistics:
    if statistics is None:
        raise DitcompressError("E331", name, "no statistics of its input", "calibrate, or use a weights-only recipe")
    return statistics


def range_scale(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of a static input that span the calibrated range; of a rotated input that of its tokens."""
    spec, statistics = layer.decision.activation, need(layer.statistics, layer.name)
    if layer.sign is not None:
        tokens = layer.effective_tokens()
        low, high = tokens.min(), tokens.max()
    else:
        divisor = 1 if layer.smooth is None else layer.smooth
        low, high = (statistics.low / divisor).min(), (statistics.high / divisor).max()
    if spec.symmetric:
        return (torch.maximum(high, -low) / (2 ** (spec.bits - 1) - 1)).reshape(1).float().clamp_min(TINY), None
    scale = ((high.clamp_min(0) - low.clamp_max(0)) / (2**spec.bits - 1)).clamp_min(TINY)
    return scale.reshape(1).float(), torch.round(-low.clamp_max(0) / scale).reshape(1).float()


def pack(layer: Layer, codes: Tensor, grid: Any) -> PackedWeight:
    """Codes and grid as stored tensors of the layer's format."""
    fmt, params = resolve(layer.decision.weight)
    rows, columns = layer.weight.shape
    return PackedWeight(layer.decision.weight, (rows, columns), fmt.pack(codes, grid, params))


def step_module(step: StepSpec) -> tuple[ModuleType, StrictParams]:
    """The module of a step and its validated parameters; E202 names an unknown parameter."""
    module = registry.get(step.name)
    return module, validated(module, step.params, f"step {step.name}")


def encoder_of(decision: LayerDecision) -> StepSpec:
    """The step that rounds the weight; E202 where none does."""
    for step in decision.steps:
        if hasattr(registry.get(step.name), "encode"):
            return step
    raise DitcompressError("E202", decision.reason, "no step encodes the weight", "add rtn or gptq to its steps")


def validated(module: ModuleType, params: Any, where: str) -> Any:
    """`params` by the module's own model; E202 with the nearest name for an unknown key."""
    from pydantic import ValidationError

    try:
        return module.Params(**params)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = list(module.Params.model_fields)
        remedy = (
            nearest(key, known)
            if first["type"] == "extra_forbidden"
            else f"see `ditcompress explain {where.split()[-1]}`"
        )
        what = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"]
        raise DitcompressError("E202", f"{where}: {key or 'parameters'}", what, remedy) from None
