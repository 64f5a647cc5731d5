"""What `moe` may be told by --set, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from ..errors import DitcompressError
from ..experts import ExpertLayer
from ..mixture import linear_operations, token_operations
from ..models.base import Layout
from ..recipe import Calibration, Training, override
from ..registry import nearest
from ..routed import CHILDREN, RoutedPart
from ..runtime.blocks import idle_in_blocks
from ..runtime.moe import Gate, feed_forwards, idle_parameters, router_parameters

CURVE = 200  # points of a loss curve in moe.json
NonNegative = Annotated[float, Field(ge=0)]


class ExpertTraining(Training):
    """The trainer's fields and: `balance` weighs the load-balance loss (Dense2MoE: 0.01), `router_rate` is the router's
    learning rate, `shared` whether the shared experts learn too; `balance_over`: whether layers' balance losses are
    averaged or added (by default as the method does); `prior` weighs the diffusion prior loss of
    switch-dit, `task` that of real data. `stages`: shares of the steps that train shared experts, routed ones, and
    all that learns (by default as the method does: all steps the last, but for dense2moe-mob). `clean` weighs the
    output loss in units of the clean latents. `everything`: in the
    last stage the whole model learns, not its routed parts alone."""

    learning_rate: float = Field(3e-4, gt=0)
    features: float = Field(1.0, ge=0)
    clean: float = Field(0.0, ge=0)
    balance: float = Field(0.01, ge=0)
    router_rate: float = Field(1e-3, gt=0)
    shared: bool = True
    balance_over: Literal["mean", "sum"] | None = None
    prior: float = Field(1.0, ge=0)
    task: float = Field(1.0, ge=0)
    everything: bool = False
    stages: tuple[NonNegative, NonNegative, NonNegative] | None = None

    @field_validator("stages")
    @classmethod
    def _some_steps(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not 0 < sum(value) < math.inf:
            raise ValueError("gives no stage any steps")
        return value


class ExpertSettings(BaseModel):
    """`method` holds the method's own parameters; `gate` how chosen experts count (see runtime/moe.py; by
    default as the method does); `probe` the batches of states on which the use of the experts is measured, `scoring`
    those of the Taylor scores, `images` the samples whose tokens moe.html colours by expert; `group` the
    blocks of a Mixture of Blocks that share a router, `alpha` how its score weighs tokens against the embedding."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: dict[str, Any] = {}
    gate: Gate | None = None
    probe: int = Field(4, ge=1, le=1000)
    scoring: int = Field(16, ge=1, le=10_000)
    images: int = Field(4, ge=0, le=64)
    group: int = Field(5, ge=2, le=1000)
    alpha: float = Field(0.5, ge=0, le=1)
    calibration: Calibration = Calibration(samples=64, reservoir=4096)
    training: ExpertTraining = ExpertTraining()


def settings_from(overrides: Sequence[str], steps: int) -> ExpertSettings:
    """The settings after `key=value` overrides; E202 names an unknown key."""
    value: dict[str, Any] = {"method": {}, "calibration": {"samples": 64, "reservoir": 4096}, "training": {}}
    for change in overrides:
        override(value, change)
    value["training"]["steps"] = max(1, steps)
    try:
        return ExpertSettings.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        unknown = first["type"] == "extra_forbidden"
        inner: dict[str, type[BaseModel]] = {"calibration": Calibration, "training": ExpertTraining}
        known = list((inner.get(place[0], ExpertSettings) if len(place) > 1 else ExpertSettings).model_fields)
        what = "unknown key" if unknown else first["msg"]
        raise DitcompressError(
            "E202", f"--set {'.'.join(place)}", what, nearest(place[-1], known) if unknown else "change the value"
        ) from None


@dataclass(frozen=True)
class Plan:
    """Which parts of a model become routed: feed-forwards with their numbers, attentions and blocks."""

    specs: dict[str, ExpertLayer]
    routed: dict[str, RoutedPart]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By path, as config.json has them."""
        return {
            **{path: spec.to_json() for path, spec in self.specs.items()},
            **{f"{path}.{CHILDREN[p.kind]}": p.model_dump(mode="json") for path, p in self.routed.items()},
        }

    def active_neurons(self) -> float:
        """The share of the neurons in converted feed-forwards that a token meets; 1 without any."""
        total = sum(s.neurons for s in self.specs.values())
        return sum(s.active_neurons for s in self.specs.values()) / total if total else 1.0


def facts_of(
    dense: nn.Module, sparse: nn.Module, layout: Layout, plan: Plan, method: str, sqnr: float,
    use: Mapping[str, Mapping[str, Any]], routing: Mapping[str, Any], left: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What moe.json holds (an SQNR of None: identical): parameters counted from the modules, operations of one token in
    the converted feed-forwards and in the blocks' linears, the use of the experts by layer, timestep and class."""
    operations = [token_operations(layer) for layer in feed_forwards(sparse).values()]
    before, after = (sum(column) for column in zip(*operations, strict=True)) if operations else (0, 0)
    linears = linear_operations(layout, plan.specs, plan.routed)
    total = sum(p.numel() for p in sparse.parameters()) + router_parameters(sparse)
    layers = plan.to_json()
    return {
        "method": method,
        "sqnr_db": sqnr if math.isfinite(sqnr) else None,
        "parameters": {
            "dense": sum(p.numel() for p in dense.parameters()), "total": total,
            "active": round(total - idle_parameters(sparse) - idle_in_blocks(sparse)),
        },
        "feed_forward_flops_per_token": {"dense": before, "active": after},
        "block_linear_flops_per_token": dict(zip(("dense", "active"), linears, strict=True)),
        "active_neurons": plan.active_neurons(),
        "busiest": max(row["busiest"] for row in use.values()),
        "idlest": min(row["idlest"] for row in use.values()),
        "layers": {path: {**entry, **use[path]} for path, entry in layers.items()},
        "routing": dict(routing),
        "left_dense": list(left),
    }  # fmt: skip


def trained_facts(losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What is told of a training, of whose stages `losses` has those of all steps: for each its first loss, the mean of
    its last 20, and a curve of at most CURVE points, each a mean over steps. Losses of two stages are not comparable;
    "first" and "last" are the last stage's."""
    stages, start = [], 0
    for name, values in losses.items():
        tail = values[-20:]
        stages.append({
            "stage": name, "steps": len(values), "first": values[0], "last": sum(tail) / len(tail),
            "curve": [[start + x, y] for x, y in _curve(values)],
        })  # fmt: skip
        start += len(values)
    last = stages[-1]
    return {"steps": start, "first": last["first"], "last": last["last"], "stages": stages}


def _curve(values: Sequence[float]) -> list[tuple[float, float]]:
    each = -(-len(values) // CURVE)
    groups = [values[at : at + each] for at in range(0, len(values), each)]
    return [(number * each + (len(group) + 1) / 2, sum(group) / len(group)) for number, group in enumerate(groups)]


def card(name: str, class_name: str, facts: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    parameters, flops = facts["parameters"], facts["block_linear_flops_per_token"]
    return "\n".join([
        "---", "library_name: diffusers", "tags: [ditcompress, mixture-of-experts]", "---", "",
        f"# {name} with expert layers", "",
        f"{len(facts['layers'])} parts of {class_name} became experts by `ditcompress moe` "
        f"({facts['method']}): a token meets {parameters['active']:,} of {parameters['total']:,} parameters "
        f"(dense: {parameters['dense']:,}) and {flops['active'] / flops['dense']:.1%} of the operations in "
        "the blocks' linears.",
        "", "```python", "import ditcompress  # enters itself into diffusers' quantizer mappings",
        f"from diffusers import {class_name}", "", f'model = {class_name}.from_pretrained("FOLDER")', "```", "",
        "moe.json and moe.html say how every part was split and how evenly its experts are used.", "",
    ])  # fmt: skip
