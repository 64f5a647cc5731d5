"""Loading: rebuild the modules that the configuration describes (described.py), then fill in the weights.

Two doors. Stock diffusers: `register` enters us into its quantizer mappings, so plain `from_pretrained` works after
`import ditcompress`. Ours: `load_model` checks every name and shape first and refuses what diffusers only warns about.

diffusers casts floating tensors to `torch_dtype` before a quantizer sees them, so stored tensors are taken from the
state dict itself: float32 scales survive a bfloat16 load and reloading is bit-exact. It only warns of tensors that a
checkpoint lacks or has too many of, and a packed layer without its scale or its low-rank part gives noise, so for
packed layers both doors refuse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import diffusers.quantizers.auto as auto
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from . import bnb
from .checkpoint.reader import Checkpoint, check_tensors, open_checkpoint
from .console import Reporter
from .described import NAME as NAME
from .described import VERSION as VERSION
from .described import DitcompressConfig as DitcompressConfig
from .described import apply_schemes as apply_schemes
from .described import apply_shapes as apply_shapes
from .described import meta_model as meta_model
from .described import plain_model as plain_model
from .described import rebuild, without_quantization
from .described import stored_dtypes as stored_dtypes
from .errors import DitcompressError
from .experts import names_inside
from .models import class_of
from .routed import routed_paths
from .runtime.linear import PackedLinear
from .runtime.moe import Router
from .sharing import copies_of, stored_once, tie
from .text_stream import text_paths
from .weights import Weights, set_tensor


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
        rebuild(model, config)
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
        changed: Any = dequantized(model)
        config = self.quantization_config
        assert isinstance(config, DitcompressConfig)
        fields = {key: value for key, value in dict(changed.config).items() if key != "quantization_config"}
        if config.structure():  # narrower layers or experts are still no plain model
            fields["quantization_config"] = DitcompressConfig(**config.structure())
        changed._internal_dict = FrozenDict(fields)
        return model

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
    """`model` with every packed linear replaced, in place, by a plain one in the dtype of its bias or of the model.
    E205 where a plain linear cannot do the same."""
    packed = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    for path, module in packed.items():
        if module.scheme.output_norm:
            raise DitcompressError("E205", path, "normalises its output, which no plain linear does", "keep it packed")
    common = get_parameter_dtype(model)
    for path, module in packed.items():
        bias = module.bias
        dtype = common if bias is None else bias.dtype
        linear = nn.Linear(module.in_features, module.out_features, bias is not None, dtype=dtype)
        linear.weight.data = module.weight.to(dtype).contiguous()
        if bias is not None:
            linear.bias.data = bias.data
        model.set_submodule(path, linear)
    tie(model)
    return model


# --- our own door ----------------------------------------------------------------------------------------------------


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

    plain = without_quantization(config)
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, class_of(plain)).from_config(plain)
    layers = DitcompressConfig.of(config)
    if layers is not None:
        rebuild(model, layers)
        as_loaded(model, layers)
    return model
