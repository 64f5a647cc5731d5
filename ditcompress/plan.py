"""What will be done to each linear, as data: it can be printed, stored, compared and edited by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is stored: the name of a module in `formats/` and its parameters (JSON values only)."""

    format: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ActivationSpec:
    """How a linear's input is quantized before the product.

    `mode`: "none" (input stays in floating point), "token" (one dynamic scale per token), "tensor" (one dynamic
    scale for the whole tensor), "static" (a scale measured in calibration). With `group`, a token has one scale for
    each group of that many channels. `element`: "int" of `bits` bits, or a small float such as "e2m1", which decides
    the bits. `scale`: how a group's scale is rounded: "float32", "e8m0" (OCP MX), or "e4m3" (NVFP4: the token's own
    float32 scale times an E4M3 one).
    """

    mode: str = "none"
    bits: int = 8
    symmetric: bool = True
    group: int = 0
    element: str = "int"
    scale: str = "float32"

    def __str__(self) -> str:
        """In a word: float, int8/token, e2m1/token g16 e4m3."""
        if self.mode == "none":
            return "float"
        name = f"int{self.bits}" if self.element == "int" else self.element
        group = f" g{self.group}" if self.group else ""
        return f"{name}/{self.mode}{group}{'' if self.scale == 'float32' else f' {self.scale}'}"


@dataclass(frozen=True)
class StepSpec:
    """One step of a recipe: the name of a module in `quantization/` and its parameters (JSON values only)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerDecision:
    """Everything that is decided about one linear.

    `smooth`: "none", "fold" (into the producer of the input) or "online" (the layer divides its input);
    `rank` of the low-rank residual kept in 16 bits (0: none); `rotate`: order of the block-diagonal Hadamard transform
    of the (smoothed) input, 0 for none; `low_rank_input`: whether the low-rank part reads the "rounded" input or the
    "float" one; `output_norm`: whether the output is divided by its root mean square and multiplied by a learned gain;
    `reason`: the rule that decided.
    """

    site: str
    role: str
    weight: WeightSpec
    activation: ActivationSpec = ActivationSpec()
    steps: tuple[StepSpec, ...] = ()
    smooth: str = "none"
    rank: int = 0
    rotate: int = 0
    low_rank_input: str = "rounded"
    output_norm: bool = False
    reason: str = ""


@dataclass(frozen=True)
class TradeOff:
    """One point of what a budget buys: mean stored bits of the planned weights, the output SQNR in dB that the
    statistics predict for it, and that of rounding to nearest; `chosen` marks the plan's own."""

    bits: float
    predicted_db: float
    nearest_db: float
    chosen: bool = False


@dataclass(frozen=True)
class Plan:
    """The decisions in model order; a linear that is not listed stays as it is. `curve` when a budget was spent."""

    layers: tuple[LayerDecision, ...]
    curve: tuple[TradeOff, ...] = ()

    def by_site(self) -> dict[str, LayerDecision]:
        return {decision.site: decision for decision in self.layers}

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(decision) for decision in self.layers]
