"""What a method that splits a feed-forward is given and gives back, and the closed-form parts that methods share.

A method is a module of this folder. It exports `Params`, `NEEDS` ("tokens": inputs from calibration, "importance":
Taylor scores of the neurons, "weighed": inputs and what an error costs there, _weighed.py) and
`split(layer, params) -> Split`. It may export `gate(params)`, how chosen experts count when nothing is asked,
BALANCE_OVER ("mean", or "sum" over layers), and STAGES, shares of the training's steps (_stages.py). `offsets`,
`copies` and `choice` of the parameters go into the layer's entry. NUMBERS are its own for --experts, --shared and
--active, where these are not given; BLOCKS_ACTIVE that of --blocks-active.

A method whose layers are not equal parts of the neurons exports `layers(sizes, numbers, params)`, the entries of
feed-forwards by path from their neurons, `prepare(layer, params)`, what is measured before any is converted, and
`sized(layers, prepared, params)`, the entries that follow from it; `split` finds it in `layer.prepared`.

A method of other parts than feed-forwards exports `routed(model, layout, numbers, params, importance)`, which says what
is routed by path, and `begin(part, params, generator)`, which fills the routers; with or without `split`. "heads" in
NEEDS asks for Taylor scores (heads,) of the attentions: `importance` is empty where nothing has run yet.

Shapes: T tokens, D features, H neurons, E routed experts, k of them active. The dense layer is y = W h(x) + b with
h(x) (H,) the input of the output linear (after the activation, and after the gate of gated ones) and W (D, H).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import DitcompressError
from ..experts import ExpertLayer
from ..formats.base import StrictParams
from ..registry import Registry, nearest

registry = Registry("ditcompress.mixture", "method", ("Params", "NEEDS"))

Importance = Mapping[str, Tensor]


@dataclass(frozen=True)
class Numbers:
    """--experts, --shared and --active; None where the method counts by itself."""

    experts: int | None = 8
    shared: int | None = 1
    active: int | None = 2


@dataclass(frozen=True)
class FeedForward:
    """One dense feed-forward: `down` W (D, H) float32; with calibration its inputs `tokens` (T, D) and their `hidden`
    (T, H), and the cost `weights` (T,) of an error there; with gradients the `importance` (H,) of its neurons. `spec`
    says how it will be split, `prepared` is what the method measured before."""

    name: str
    spec: ExpertLayer
    down: Tensor
    tokens: Tensor
    hidden: Tensor
    importance: Tensor | None
    generator: torch.Generator = field(default_factory=torch.Generator)
    weights: Tensor | None = None
    prepared: Any = None

    @property
    def features(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Split:
    """Neurons of the shared expert and of each routed one, the router, and (D,) per expert `offsets` (E, D): the mean
    output that the layer's bias holds for an expert that was not chosen, and a chosen one takes away. None for none.

    `down` (D, H), where given, replaces the output weights (its columns are the dense layer's neurons), and `shift`
    (D,) is added to the layer's bias: the layer with all experts is then not the dense one any more. `downs`: output
    weights (D, width) of each expert's own, where experts hold neurons that others hold too."""

    shared: Tensor
    experts: Sequence[Tensor]
    router_weight: Tensor
    router_bias: Tensor
    offsets: Tensor | None = None
    down: Tensor | None = None
    shift: Tensor | None = None
    downs: Sequence[Tensor] | None = None

    @property
    def order(self) -> list[int]:
        """All neurons: those of the shared expert first, then of each expert; of those in several each once."""
        return list(dict.fromkeys(torch.cat([self.shared, *self.experts]).tolist()))


def method_of(name: str) -> ModuleType:
    """The module of a method; "moe-best" is moe_best. E201 for an unknown one."""
    return registry.get(name.replace("-", "_"))


def params_of(module: ModuleType, given: dict[str, Any]) -> StrictParams:
    """Validated parameters of a method; E202 names an unknown one."""
    try:
        return module.Params(**given)  # type: ignore[no-any-return]
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        remedy = nearest(key, list(module.Params.model_fields)) if unknown else "change the value"
        where = f"method {module.__name__.rpartition('.')[2]}: {key}"
        raise DitcompressError("E202", where, "unknown parameter" if unknown else first["msg"], remedy) from None


def outputs(layer: FeedForward, experts: Sequence[Tensor]) -> Tensor:
    """Output of every expert for every token, without bias, (E, T, D)."""
    return torch.stack([layer.hidden[:, own] @ layer.down[:, own].T for own in experts])


def ridge(inputs: Tensor, targets: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Weight (E, D) and bias (E,) of the least-squares map from inputs (T, D) to targets (T, E). `damp` is in units of
    the mean diagonal of the inputs' covariance."""
    x, y = inputs.double(), targets.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    gram += damp * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y)).T
    return weight.float(), (mean_y - weight @ mean_x).float()


def chosen_mask(weight: Tensor, bias: Tensor, tokens: Tensor, active: int) -> Tensor:
    """Which experts the router chooses, bool (T, E); ties as the layer itself breaks them."""
    probabilities = torch.nn.functional.linear(tokens, weight, bias).softmax(-1)
    top = probabilities.topk(active, dim=-1).indices
    return torch.zeros(len(tokens), len(weight), dtype=torch.bool, device=tokens.device).scatter_(1, top, True)


def random_router(layer: FeedForward, std: float) -> tuple[Tensor, Tensor]:
    """Weight N(0, std^2) (E, D) and a zero bias (E,)."""
    weight = torch.randn(layer.spec.experts, layer.features, generator=layer.generator) * std
    return weight.to(layer.down.device), torch.zeros(layer.spec.experts, device=layer.down.device)


def parted(layer: FeedForward, order: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Neurons in `order` (H,): the first for the shared expert, the rest in consecutive groups."""
    spec = layer.spec
    rest = order[spec.shared :]
    return order[: spec.shared], list(rest.split(spec.width))
