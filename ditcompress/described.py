"""The `quantization_config` of a compressed model's config.json, and the model that it describes, without any data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import Field, ValidationError
from torch import nn

from . import bnb
from .errors import DitcompressError
from .experts import ExpertLayer, apply_experts, router_dtypes
from .linear_ffn import apply_linear
from .models import adapter_for, build_meta
from .routed import RoutedPart, apply_routed
from .runtime.linear import PackedLinear, replace_linears
from .runtime.scheme import WHERE, Scheme, Strict, refuse
from .sharing import apply_shared, tie
from .structure import narrow
from .text_stream import apply_groups

NAME = "ditcompress"
VERSION = 1  # of the quantization_config below


class Method(StrEnum):
    """diffusers reads `.value` of the method for its user agent, so a plain string will not do."""

    DITCOMPRESS = NAME


class _Fields(Strict):
    recipe: str
    schemes: dict[str, dict[str, Any]]
    layers: dict[str, str]
    shapes: dict[str, int] = Field(default_factory=dict)
    experts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    shared: dict[str, str] = Field(default_factory=dict)
    routed: dict[str, dict[str, Any]] = Field(default_factory=dict)
    linear: list[str] = Field(default_factory=list)
    text: list[list[str]] = Field(default_factory=list)


class DitcompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model: schemes by number, the scheme of each linear, and the expert
    layers by path.

    Raises E320 naming the key for a configuration of another version, or one that is not exactly of this shape.
    """

    def __init__(
        self,
        schemes: Mapping[str, Any] | None = None,
        layers: Mapping[str, str] | None = None,
        shapes: Mapping[str, int] | None = None,
        version: int = VERSION,
        recipe: str = "",
        experts: Mapping[str, Any] | None = None,
        shared: Mapping[str, str] | None = None,
        routed: Mapping[str, Any] | None = None,
        linear: Sequence[str] | None = None,
        text: Sequence[Sequence[str]] | None = None,
        quant_method: str = NAME,
        **unknown: Any,
    ) -> None:
        if type(version) is not int or version != VERSION:
            raise DitcompressError(
                "E320", f"{WHERE}.version", f"is {version!r}, this release reads {VERSION}", "upgrade ditcompress"
            )
        try:
            given = {"recipe": recipe, "schemes": schemes, "layers": layers, **unknown}
            optional: dict[str, Any] = {
                "shapes": shapes or {},
                "experts": experts or {},
                "shared": shared or {},
                "routed": routed or {},
                "linear": linear or [],
                "text": text or [],
            }
            fields = _Fields.model_validate({**given, **optional})
        except ValidationError as error:
            raise refuse(WHERE, error) from None
        self.quant_method = Method.DITCOMPRESS  # type: ignore[assignment]
        self.version, self.recipe = version, fields.recipe
        self.schemes, self.layers = fields.schemes, fields.layers
        self.shapes, self.experts, self.shared = fields.shapes, fields.experts, fields.shared
        self.routed, self.linear, self.text = fields.routed, fields.linear, fields.text

    @staticmethod
    def of(config: Mapping[str, Any]) -> DitcompressConfig | None:
        """That of a model's config.json, or None for a model that is not compressed by us."""
        quantization = config.get("quantization_config")
        if quantization is None or bnb.used(config):
            return None
        if isinstance(quantization, DitcompressConfig):  # of a model in memory
            return quantization
        if not isinstance(quantization, Mapping):
            raise DitcompressError("E320", WHERE, "is not an object", "compress the original again")
        return DitcompressConfig(**quantization)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": NAME,
            "version": self.version,
            "recipe": self.recipe,
            "schemes": self.schemes,
            "layers": self.layers,
            **self.structure(),
        }

    def structure(self) -> dict[str, Any]:
        """The entries that say how the model differs from its class before any weight is compressed."""
        entries = {"shapes": self.shapes, "linear": self.linear, "experts": self.experts, "routed": self.routed,
                   "text": self.text, "shared": self.shared}  # fmt: skip
        return {key: value for key, value in entries.items() if value}

    to_diff_dict = to_dict

    def __repr__(self) -> str:
        return json.dumps(self.to_dict())

    def layer_schemes(self) -> dict[str, Scheme]:
        """The scheme of each compressed linear; E320 when a scheme is not valid or a layer names none."""
        built = {n: Scheme.from_json(value, f"{WHERE}.schemes.{n}") for n, value in self.schemes.items()}
        for layer, number in self.layers.items():
            if number not in built:
                where = f"{WHERE}.layers.{layer}"
                raise DitcompressError("E320", where, f"there is no scheme {number!r}", "compress the original again")
        return {layer: built[number] for layer, number in self.layers.items()}

    def expert_layers(self) -> dict[str, ExpertLayer]:
        """The expert layers by path; E320 when an entry is not valid."""
        return {path: ExpertLayer.from_json(value, f"{WHERE}.experts.{path}") for path, value in self.experts.items()}

    def routed_parts(self) -> dict[str, RoutedPart]:
        """Routed blocks and attentions by path; E320 when an entry is not valid."""
        return {path: RoutedPart.from_json(value, f"{WHERE}.routed.{path}") for path, value in self.routed.items()}


def apply_schemes(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Replace the named linears, each in all its places; E320 when a name is no linear of the model, or a copy's."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in schemes:
        if name not in linears:
            raise DitcompressError(
                "E320", f"{WHERE}.layers", f"{name} is not a linear of this model", "compress the original again"
            )
    replace_linears(model, schemes)
    tie(model)


def apply_shapes(model: nn.Module, shapes: Mapping[str, int]) -> None:
    """Narrow each named axis to its number of units; E320 for an axis or a number that the model has not."""
    if not shapes:
        return
    layout = adapter_for(type(model).__name__).layout(model)
    for name, count in shapes.items():
        axis = layout.axes.get(name)
        if axis is None or not axis.cut or not 0 < count <= axis.size // axis.unit_size:
            what = f"{count} units of {name} do not fit this model"
            raise DitcompressError("E320", f"{WHERE}.shapes", what, "compress the original again")
    narrow(model, layout, {name: range(count) for name, count in shapes.items()})


def _apply_text(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Linear text sides in the blocks of each group; E320 for a group that the model has not."""
    if groups:
        apply_groups(model, adapter_for(type(model).__name__).layout(model).blocks, groups)


def stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Full name and dtype of every tensor that packed layers and routers store (biases are ordinary parameters)."""
    return router_dtypes(model) | {
        f"{path}.{name}": dtype
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for name, (_, dtype) in module.stored.items()
    }


def meta_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that `config` describes, packed layers included, without any data."""
    model = build_meta(without_quantization(config))
    layers = DitcompressConfig.of(config)
    if layers is not None:
        rebuild(model, layers)
    return model


def plain_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that `config` describes before any linear is packed, with its own widths, expert layers and shared
    modules, without any data."""
    model = build_meta(without_quantization(config))
    layers = DitcompressConfig.of(config)
    if layers is not None:
        _restructure(model, layers)
    return model


def rebuild(model: nn.Module, config: DitcompressConfig) -> None:
    """Give a plain model the modules that `config` describes."""
    _restructure(model, config)
    apply_schemes(model, config.layer_schemes())


def _restructure(model: nn.Module, config: DitcompressConfig) -> None:
    apply_shapes(model, config.shapes)
    apply_linear(model, config.linear)
    _apply_text(model, config.text)
    apply_experts(model, config.expert_layers())
    apply_routed(model, config.routed_parts())
    apply_shared(model, config.shared)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the plain class."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
