"""Loading: rebuild the modules that the configuration describes, then fill in the weights.

Two doors. Stock diffusers: `register` enters us into its quantizer mappings, so plain `from_pretrained` works after
`import ditcompress`. Ours: `load_model` checks every name and shape first and refuses what diffusers only warns about.

diffusers casts floating tensors to `torch_dtype` before a quantizer sees them, so stored tensors are taken from the
state dict itself: float32 scales survive a bfloat16 load and reloading is bit-exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import diffusers.quantizers.auto as auto
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from .checkpoint.reader import Checkpoint, check_tensors, open_checkpoint
from .console import Reporter
from .errors import DitcompressError
from .models import build_meta, class_of
from .runtime.linear import PackedLinear, Scheme, replace_linears

NAME = "ditcompress"
VERSION = 1  # of the quantization_config below


class Method(StrEnum):
    """diffusers reads `.value` of the method for its user agent, so a plain string will not do."""

    DITCOMPRESS = NAME


class DitcompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model: schemes by number, and the scheme of each linear."""

    def __init__(
        self, schemes: Mapping[str, Any], layers: Mapping[str, str], version: int = VERSION, recipe: str = "", **_: Any
    ) -> None:
        if version != VERSION:
            raise DitcompressError(
                "E320", "quantization_config", f"version {version}, this release reads {VERSION}", "upgrade ditcompress"
            )
        self.quant_method = Method.DITCOMPRESS  # type: ignore[assignment]
        self.version, self.recipe = version, recipe
        self.schemes, self.layers = dict(schemes), dict(layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": NAME,
            "version": self.version,
            "recipe": self.recipe,
            "schemes": self.schemes,
            "layers": self.layers,
        }

    to_diff_dict = to_dict

    def __repr__(self) -> str:
        return json.dumps(self.to_dict())

    def layer_schemes(self) -> dict[str, Scheme]:
        """The scheme of each compressed linear; E320 when a layer names no scheme."""
        try:
            built = {number: Scheme.from_json(value) for number, value in self.schemes.items()}
            return {layer: built[number] for layer, number in self.layers.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise DitcompressError(
                "E320", "quantization_config", f"does not describe its layers ({error})", "compress the original again"
            ) from None


class DitcompressQuantizer(DiffusersQuantizer):
    """Puts packed linears into the empty model and hands them their stored tensors unchanged."""

    requires_calibration = True
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DitcompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise DitcompressError(
                "E205",
                "from_pretrained",
                "quantizing while loading is not supported",
                "run `ditcompress quantize` first",
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        assert isinstance(config, DitcompressConfig)
        apply_schemes(model, config.layer_schemes())
        self.stored = stored_names(model)

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
        module = model.get_submodule(module_name)
        setattr(module, name, state_dict[param_name].to(target_device))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return state_dict, {}

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
    """Replace the named linears; E320 when a name is no linear of the model."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in schemes:
        if name not in linears:
            raise DitcompressError(
                "E320", "quantization_config", f"{name} is not a linear of this model", "compress the original again"
            )
    replace_linears(model, schemes)


def stored_names(model: nn.Module) -> set[str]:
    """Full names of all tensors that packed layers store (biases are ordinary parameters)."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for name in module.stored
    }


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
    return model


# --- our own door ----------------------------------------------------------------------------------------------------


def meta_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that `config` describes, packed layers included, without any data."""
    quantization = config.get("quantization_config")
    model = build_meta({key: value for key, value in config.items() if key != "quantization_config"})
    if quantization is not None:
        fields = {key: value for key, value in quantization.items() if key != "quant_method"}
        apply_schemes(model, DitcompressConfig(**fields).layer_schemes())
    return model


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def open_model(path: str | Path, *, allow_compressed: bool = True) -> tuple[Checkpoint, nn.Module]:
    """A checked checkpoint and its model on the meta device. Raises E3xx when names, shapes or the class disagree."""
    checkpoint = open_checkpoint(Path(path), allow_compressed=allow_compressed)
    model = meta_model(checkpoint.config)
    check_tensors(checkpoint, expected_shapes(model))
    return checkpoint, model


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    reporter: Reporter | None = None,
) -> tuple[nn.Module, Checkpoint]:
    """The model in eval mode with its weights, and the checkpoint it came from.

    `dtype` is that of the ordinary parameters; packed tensors keep theirs. Checked before any weight is read.
    """
    register()
    checkpoint, meta = open_model(path)
    names = sorted(expected_shapes(meta))
    model = _with_buffers(checkpoint.config)
    packed = stored_names(model)
    with torch.no_grad():
        for name in names:
            module_name, _, leaf = name.rpartition(".")
            module = model.get_submodule(module_name) if module_name else model
            value = checkpoint.read(name)
            if name not in packed and value.is_floating_point() and dtype is not None:
                value = value.to(dtype)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
    if not names or any(tensor.is_meta for tensor in model.state_dict().values()):
        raise DitcompressError("E315", checkpoint.folder, "tensors stayed without data", "re-copy the checkpoint")
    return model.to(device).eval(), checkpoint


def as_loaded(model: Any, config: DitcompressConfig) -> None:
    """Leave `model` as stock `from_pretrained` would, so that its `save_pretrained` works."""
    model.hf_quantizer = DitcompressQuantizer(config, pre_quantized=True)
    model.register_to_config(quantization_config=config)


def _with_buffers(config: Mapping[str, Any]) -> nn.Module:
    """The model with parameters on meta and its computed buffers (position embeddings, frequencies) real."""
    from accelerate import init_empty_weights

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, class_of(plain)).from_config(plain)
    quantization = config.get("quantization_config")
    if quantization is not None:
        fields = {key: value for key, value in quantization.items() if key != "quant_method"}
        layers = DitcompressConfig(**fields)
        apply_schemes(model, layers.layer_schemes())
        as_loaded(model, layers)
    return model
