"""Expert layers in a model: what config.json says of them, and the modules built from it before weights are loaded.

An expert layer holds every neuron of the dense feed-forward once: `shared` of them always on, `width` in each of the
`experts`. The model's own table (models/) says which rows and columns a neuron is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from .errors import DitcompressError
from .models import adapter_for
from .models.base import Layout
from .runtime.moe import Choice, Gate, MoEFeedForward, Router
from .runtime.scheme import WHERE, Strict, refuse
from .structure import expert_modules, feed_forward_path, readers, writers


class _Fields(Strict):
    shared: int = Field(ge=0)
    experts: int = Field(ge=1, le=4096)
    width: int = Field(ge=1)
    active: int = Field(ge=0)
    gate: Gate = "one"
    offset: bool = False
    copies: bool = False
    choice: Choice = "token"
    of: int = Field(0, ge=0)


@dataclass(frozen=True)
class ExpertLayer:
    """One entry of `quantization_config.experts`: neurons of the shared expert, number of routed experts, neurons of
    each, how many run for a token, the gate, whether experts carry an output bias of their own (minus the mean that
    the layer's bias already holds), and whether all of them started from the same neurons (`copies`).
    `choice`: whether tokens choose experts or experts tokens. `of`: neurons of the dense feed-forward where experts
    hold neurons that others hold too, else 0."""

    shared: int
    experts: int
    width: int
    active: int
    gate: Gate = "one"
    offset: bool = False
    copies: bool = False
    choice: Choice = "token"
    of: int = 0

    @staticmethod
    def from_json(value: Any, where: str) -> ExpertLayer:
        """E320 names the key that is missing, unknown or out of range."""
        try:
            fields = _Fields.model_validate(value)
        except ValidationError as error:
            raise refuse(where, error) from None
        if fields.active > fields.experts:
            what = f"is {fields.active}, there are {fields.experts} experts"
            raise DitcompressError("E320", f"{where}.active", what, "convert the original again")
        if fields.of and fields.shared + fields.width > fields.of:
            what = f"is {fields.width}, beside {fields.shared} shared ones of {fields.of} neurons"
            raise DitcompressError("E320", f"{where}.width", what, "convert the original again")
        return ExpertLayer(**fields.model_dump())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def neurons(self) -> int:
        """Of the dense feed-forward."""
        return self.of or self.shared + (1 if self.copies else self.experts) * self.width

    @property
    def active_neurons(self) -> int:
        """Neurons that a token meets."""
        return self.shared + self.active * self.width

    def groups(self) -> list[range]:
        """Neurons in their stored order: of the shared expert (where there is one), then of each expert (of copies:
        once); those of overlapping ones as if all held the first after the shared."""
        if self.of:
            own = range(self.shared, self.shared + self.width)
            return ([range(self.shared)] if self.shared else []) + [own] * self.experts
        starts = [self.shared + e * self.width for e in range(1 if self.copies else self.experts)]
        return ([range(self.shared)] if self.shared else []) + [range(s, s + self.width) for s in starts]


def convertible(model: nn.Module, layout: Layout) -> dict[str, str]:
    """Path and neuron axis of every feed-forward that is a module of its own inside a block, in forward order."""
    found: dict[str, str] = {}
    for site in layout.sites:
        for axis in dict.fromkeys(name for name in site.writes if name and site.role == "ffn_in" and site.block):
            if axis in found.values() or not _is_feed_forward(layout, axis):
                continue
            try:
                path = feed_forward_path(model, axis, layout)
            except DitcompressError:
                continue
            if not isinstance(_parent(model, path), MoEFeedForward):
                found[path] = axis
    return found


def left_dense(model: nn.Module, layout: Layout) -> list[str]:
    """Linears into feed-forwards that `convertible` leaves out: single blocks of FLUX, whose output linear also reads
    the attention."""
    axes = {site.name for axis in convertible(model, layout).values() for site in writers(layout, axis)}
    inside = tuple(f"{path}." for path in (n for n, m in model.named_modules() if isinstance(m, MoEFeedForward)))
    dense = [s.name for s in layout.sites if s.block and s.role == "ffn_in" and s.name not in axes]
    return [name for name in dense if not name.startswith(inside)] if inside else dense


def _is_feed_forward(layout: Layout, axis: str) -> bool:
    known = layout.axes[axis]
    return known.unit == "neuron" and known.cut and all(s.role == "ffn_out" for s in readers(layout, axis))


def _parent(model: nn.Module, path: str) -> nn.Module:
    """The nearest module above `path` that is no list."""
    above = path.rpartition(".")[0]
    while above and isinstance(model.get_submodule(above), nn.ModuleList):
        above = above.rpartition(".")[0]
    return model.get_submodule(above) if above else model


def build(
    model: nn.Module, layout: Layout, axis: str, spec: ExpertLayer, order: Sequence[int] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
) -> MoEFeedForward:  # fmt: skip
    """The expert layer of a feed-forward whose neurons are taken in `order` (their own without it), or that has these
    `groups` of them; router and offsets are zero. The model is left as it is. Works on the meta device."""
    path = feed_forward_path(model, axis, layout)
    order = range(spec.neurons) if order is None else order
    groups = [[order[i] for i in group] for group in spec.groups()] if groups is None else groups
    parts, bias = expert_modules(model, axis, layout, groups, overlap=bool(spec.of))
    (out,), into = readers(layout, axis), writers(layout, axis)[0]
    inner = out.name[len(path) + 1 :]
    shared, experts = (parts[0], parts[1:]) if spec.shared else (None, parts)
    if spec.copies:
        experts = [experts[0], *(copy.deepcopy(experts[0]) for _ in range(spec.experts - 1))]
    weight: Tensor = model.get_submodule(out.name).weight  # type: ignore[assignment]
    if spec.offset:
        for expert in experts:
            zero = torch.zeros(out.out_features, dtype=weight.dtype, device=weight.device)
            expert.get_submodule(inner).bias = nn.Parameter(zero, requires_grad=False)  # type: ignore[assignment]
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    made = MoEFeedForward(shared, experts, bias, into.in_features, spec.active, spec.gate, spec.copies, spec.choice)
    made.dense = spec.neurons / spec.width
    return made.to(weight.device)


def check_place(layers: Mapping[str, ExpertLayer], axes: Mapping[str, str], layout: Layout) -> None:
    """E320 when a path is no feed-forward of the model, or the experts do not hold its neurons once each."""
    for path, spec in layers.items():
        where = f"{WHERE}.experts.{path}"
        if path not in axes:
            raise DitcompressError("E320", where, "is no feed-forward of this model", "convert the original again")
        size = layout.axes[axes[path]].size
        if spec.neurons != size:
            what = f"its experts hold {spec.neurons} neurons, the model has {size}"
            raise DitcompressError("E320", where, what, "convert the original again")


def apply_experts(model: nn.Module, layers: Mapping[str, ExpertLayer]) -> None:
    """Put expert layers in place of the named feed-forwards; E320 as `check_place`."""
    if not layers:
        return
    layout = adapter_for(type(model).__name__).layout(model)
    axes = convertible(model, layout)
    check_place(layers, axes, layout)
    for path, spec in layers.items():
        model.set_submodule(path, build(model, layout, axes[path], spec))


def router_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Full name and dtype of every tensor of the routers, which no cast may reach."""
    return {
        f"{path}.{name}": torch.float32
        for path, module in model.named_modules()
        if isinstance(module, Router)
        for name in module.STORED
    }


def names_inside(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Full names of the tensors of expert layers."""
    return {f"{path}.{name}" for path in paths for name in model.get_submodule(path).state_dict()}
