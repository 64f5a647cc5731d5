"""Loading: rebuild the modules that the configuration describes, then fill in the weights.

Two doors. Stock diffusers: `register` enters us into its quantizer mappings, so plain `from_pretrained` works after
`import ditcompress`. Ours: `load_model` checks every name and shape first and refuses what diffusers only warns about.

diffusers casts floating tensors to `torch_dtype` before a quantizer sees them, so stored tensors are taken from the
state dict itself: float32 scales survive a bfloat16 load and reloading is bit-exact. It only warns of tensors that a
checkpoint lacks or has too many of, and a packed layer without its scale or its low-rank part gives noise, so for
packed layers both doors refuse.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import diffusers.quantizers.auto as auto
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import Field, ValidationError
from torch import Tensor, nn

from . import bnb
from .checkpoint.reader import Checkpoint, check_tensors, open_checkpoint
from .console import Reporter
from .errors import DitcompressError
from .experts import ExpertLayer, apply_experts, names_inside, router_dtypes
from .linear_ffn import apply_linear
from .models import adapter_for, build_meta, class_of
from .routed import RoutedPart, apply_routed, routed_paths
from .runtime.linear import PackedLinear, replace_linears
from .runtime.moe import Router
from .runtime.scheme import WHERE, Scheme, Strict, refuse
from .sharing import apply_shared, copies_of, stored_once, tie
from .structure import narrow
from .text_stream import apply_groups, text_paths
from .weights import Weights, set_tensor

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


class DitcompressQuantizer(DiffusersQuantizer):
    """Puts packed linears into the empty model and hands them their stored tensors unchanged."""

    requires_calibration = True
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DitcompressConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise DitcompressError(
                "E205",
                "from_pretrained",
                "quantizing while loading is not possible",
                "run `ditcompress quantize` first",
            )
        super().__init__(quantization_config, **kwargs)
        self.stored: dict[str, torch.dtype] = {}
        self.present: list[str] | None = None  # names in the checkpoint, where diffusers tells them

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.present = loaded_keys
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        assert isinstance(config, DitcompressConfig)
        _rebuild(model, config)
        self.stored = stored_dtypes(model)
        if self.present is not None:
            check_layer_names(model, config.layers, self.present)
            parts = [*config.experts, *routed_paths(config.routed_parts()), *config.linear, *text_paths(model)]
            check_expert_names(model, parts, self.present)
            _compare_names(set(), {*self.present} - {*stored_once(self.present, config.shared)})

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        return stored_once(missing_keys, copies_of(model))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return param_name in self.stored

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        if current_param.shape != loaded_param.shape:
            raise DitcompressError(
                "E317",
                param_name,
                f"shape {tuple(loaded_param.shape)}, the configuration says {tuple(current_param.shape)}",
                "compress the original again",
            )
        return True

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        module_name, _, name = param_name.rpartition(".")
        value = state_dict[param_name]  # `param_value` has been cast to torch_dtype
        check_dtype(param_name, value.dtype, self.stored[param_name])
        check_router(model, param_name, value)
        setattr(model.get_submodule(module_name), name, value.to(target_device))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        assert isinstance(self.quantization_config, DitcompressConfig)
        names = stored_once(list(state_dict), self.quantization_config.shared)
        return {name: state_dict[name] for name in names}, {}

    def supports_safetensors_serialization(self) -> bool:  # type: ignore[override]
        return True

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return dequantized(model)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Enter ditcompress into diffusers' quantizer mappings; may be called more than once."""
    auto.AUTO_QUANTIZER_MAPPING[NAME] = DitcompressQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = DitcompressConfig


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


def check_layer_names(model: nn.Module, layers: Collection[str], present: Collection[str]) -> None:
    """Packed layers have exactly the tensors their schemes ask for: E315 one is missing, E316 one too many."""
    expected = {f"{layer}.{name}" for layer in layers for name in model.get_submodule(layer).state_dict()}
    _compare_names(expected, {name for name in present if name.rpartition(".")[0] in layers})


def check_expert_names(model: nn.Module, paths: Collection[str], present: Collection[str]) -> None:
    """Expert layers have exactly their tensors: a missing one would be noise. E315 and E316 as above."""
    inside = tuple(f"{path}." for path in paths)
    _compare_names(names_inside(model, paths), {name for name in present if inside and name.startswith(inside)})


def _compare_names(expected: set[str], found: set[str]) -> None:
    for code, names, what in (
        ("E315", expected - found, "is missing from the weight files"),
        ("E316", found - expected, "has no place in the layer that config.json describes"),
    ):
        if names:
            more = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
            raise DitcompressError(code, min(names), what + more, "copy the compressed model again")


def check_dtype(where: str, found: torch.dtype, expected: torch.dtype) -> None:
    """E318: a packed tensor in another dtype is rounded, or means something else."""
    if found != expected:
        says = f"{str(found).removeprefix('torch.')}, its format stores {str(expected).removeprefix('torch.')}"
        raise DitcompressError("E318", where, says, "copy the compressed model again")


def check_router(model: nn.Module, name: str, value: Tensor) -> None:
    """E319 for a NaN or an infinity in a router: its choices would mean nothing, and no output would show it."""
    owner = name.rpartition(".")[0]
    if owner and isinstance(model.get_submodule(owner), Router) and not bool(value.isfinite().all()):
        raise DitcompressError("E319", name, "values of the router are NaN or infinite", "copy the model again")


def dequantized(model: nn.Module) -> nn.Module:
    """`model` with every packed linear replaced, in place, by a plain one in the dtype of its bias or float32."""
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            bias = module.bias
            dtype = torch.float32 if bias is None else bias.dtype
            linear = nn.Linear(module.in_features, module.out_features, bias is not None, dtype=dtype)
            linear.weight.data = module.weight.to(dtype)
            if bias is not None:
                linear.bias.data = bias.data
            model.set_submodule(path, linear)
    tie(model)
    return model


# --- our own door ----------------------------------------------------------------------------------------------------


def meta_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that `config` describes, packed layers included, without any data."""
    model = build_meta(_plain(config))
    layers = DitcompressConfig.of(config)
    if layers is not None:
        _rebuild(model, layers)
    return model


def _rebuild(model: nn.Module, config: DitcompressConfig) -> None:
    """Give a plain model the modules that `config` describes."""
    apply_shapes(model, config.shapes)
    apply_linear(model, config.linear)
    _apply_text(model, config.text)
    apply_experts(model, config.expert_layers())
    apply_routed(model, config.routed_parts())
    apply_shared(model, config.shared)
    apply_schemes(model, config.layer_schemes())


def plain_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that `config` describes before any linear is packed, with its own widths, expert layers and shared
    modules, without any data."""
    model = build_meta(_plain(config))
    layers = DitcompressConfig.of(config)
    if layers is not None:
        apply_shapes(model, layers.shapes)
        apply_linear(model, layers.linear)
        _apply_text(model, layers.text)
        apply_experts(model, layers.expert_layers())
        apply_routed(model, layers.routed_parts())
        apply_shared(model, layers.shared)
    return model


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    state = model.state_dict()
    return {name: tuple(state[name].shape) for name in stored_once(list(state), copies_of(model))}


def open_model(path: str | Path, *, allow_compressed: bool = True) -> tuple[Checkpoint, nn.Module]:
    """A checked checkpoint and its model on the meta device. Raises E3xx when names, shapes, packed dtypes or the
    class disagree."""
    checkpoint = open_checkpoint(Path(path), allow_compressed=allow_compressed)
    model = meta_model(checkpoint.config)
    check_tensors(checkpoint, bnb.expected(checkpoint, expected_shapes(model)))
    bnb.mark(model, bnb.layers(checkpoint))
    for name, dtype in stored_dtypes(model).items():
        entry = checkpoint.tensors[name]
        check_dtype(f"{entry.file.name}: {name}", entry.dtype, dtype)
    return checkpoint, model


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    reporter: Reporter | None = None,
) -> tuple[nn.Module, Checkpoint]:
    """The model in eval mode with its weights, and the checkpoint it came from.

    `dtype` is that of the ordinary parameters (None: as stored), except the few that the class keeps in float32, as in
    `from_pretrained`; packed tensors keep theirs. Everything is checked before any weight is read.
    """
    model, weights = empty_model(path, dtype)
    with torch.no_grad():
        for name in weights:
            value = weights[name]
            check_router(model, name, value)
            set_tensor(model, name, value)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise DitcompressError(
            "E315", weights.checkpoint.folder, "tensors stayed without data", "re-copy the checkpoint"
        )
    return model.to(device).eval(), weights.checkpoint


def empty_model(path: str | Path, dtype: torch.dtype | None) -> tuple[nn.Module, Weights]:
    """The model with parameters on the meta device, and where its tensors come from; everything is checked."""
    register()
    checkpoint, _ = open_model(path)
    model = _with_buffers(checkpoint.config)
    bnb.mark(model, bnb.layers(checkpoint))
    weights = Weights(checkpoint, model, expected_shapes(model), stored_dtypes(model), dtype)
    if not weights.names:
        raise DitcompressError("E315", checkpoint.folder, "holds no tensor of this model", "re-copy the checkpoint")
    return model, weights


def as_loaded(model: Any, config: DitcompressConfig) -> None:
    """Leave `model` as stock `from_pretrained` would, so that its `save_pretrained` works."""
    model.hf_quantizer = DitcompressQuantizer(config, pre_quantized=True)
    model.register_to_config(quantization_config=config)


def _with_buffers(config: Mapping[str, Any]) -> nn.Module:
    """The model with parameters on meta and its computed buffers (position embeddings, frequencies) real."""
    from accelerate import init_empty_weights

    plain = _plain(config)
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, class_of(plain)).from_config(plain)
    layers = DitcompressConfig.of(config)
    if layers is not None:
        _rebuild(model, layers)
        as_loaded(model, layers)
    return model
