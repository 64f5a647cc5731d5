"""Any other transformer of diffusers: the table comes from its structure, the call from its signature.

Quantizing needs only the table, so it works for every class. Calibration and evaluation must also drive the model:
that works for image models that take `hidden_states`, `timestep` and a text embedding. What cannot be guessed is
refused with the name of the missing argument, never filled with something plausible.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor, nn

from ..errors import DitcompressError
from ._config import class_of, with_defaults
from ._derive import derive
from ._inputs import Conditions, built, compute_dtype, moved
from .base import Layout

CLASSES: tuple[str, ...] = ()  # every class that no family names

TEXT_TOKENS = 77

_TEXT_WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "cap_feat_dim",
    "context_in_dim",
    "text_dim",
    "cross_attention_dim",
)
# Arguments that stand for a layout of tokens which the configuration does not fix. Optional in some signatures, but
# the model cannot run without them.
_LAYOUT_ARGUMENTS = ("img_ids", "txt_ids", "img_shapes", "position_ids", "grid", "video_coords")

# How a class wants its time and gives its velocity: time = offset + scale * t for t in 0-1000, output times sign.
# From the pipelines of diffusers; any other class takes t as the scheduler gives it.
_CONVENTIONS: dict[str, tuple[float, float, float]] = {
    "AuraFlowTransformer2DModel": (0.0, 1e-3, 1.0),
    "Lumina2Transformer2DModel": (1.0, -1e-3, -1.0),
    "PRXTransformer2DModel": (0.0, 1e-3, 1.0),
}
# Classes trained to predict noise over a discrete schedule; the others are flow models.
_NOISE_CLASSES = (
    "AllegroTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "CogView3PlusTransformer2DModel",
    "ConsisIDTransformer3DModel",
    "HunyuanDiT2DModel",
    "LatteTransformer3DModel",
    "Transformer2DModel",
)


def layout(model: nn.Module) -> Layout:
    """The sites and axes that the structure of any model proves."""
    return derive(model)


def _refuse(config: Mapping[str, Any], what: str, remedy: str) -> DitcompressError:
    return DitcompressError("E205", str(config.get("_class_name", "the model")), what, remedy)


def latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, height, width) of one latent image. Raises E205 where the configuration does not say."""
    config = with_defaults(config)
    side = config.get("sample_size")
    height, width = (side, side) if side else (config.get("sample_height"), config.get("sample_width"))
    channels = config.get("in_channels")
    sizes = (channels, height, width)
    if "sample_frames" in config or not all(type(size) is int for size in sizes):
        raise _refuse(config, "has no latent image size in its config.json", 'add "sample_size" to a copy of it')
    return int(sizes[0]), int(sizes[1]), int(sizes[2])  # type: ignore[arg-type]


def default_scheduler(config: Mapping[str, Any]) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Rectified flow with a time shift of 3, or DDIM for the classes known to predict noise."""
    if config.get("_class_name") in _NOISE_CLASSES:
        return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _arguments(config: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    import diffusers.models

    cls = getattr(diffusers.models, class_of(config))
    return {n: p for n, p in inspect.signature(cls.forward).parameters.items() if n != "self"}


def random_conditions(config: Mapping[str, Any], count: int, generator: torch.Generator) -> Conditions:
    """Normal text embeddings and full masks for the arguments of the class. Raises E205 naming what is missing."""
    arguments, config = _arguments(config), with_defaults(config)
    width = next((int(config[key]) for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), 0)
    pooled = config.get("pooled_projection_dim")
    cond: Conditions = {}
    if "encoder_hidden_states" in arguments and width:
        cond["encoder_hidden_states"] = torch.randn((count, TEXT_TOKENS, width), generator=generator)
    if "pooled_projections" in arguments and isinstance(pooled, int):
        cond["pooled_projections"] = torch.randn((count, pooled), generator=generator)
    for name in ("encoder_attention_mask", "encoder_hidden_states_mask"):
        if name in arguments and arguments[name].default is inspect.Parameter.empty:
            cond[name] = torch.ones(count, TEXT_TOKENS, dtype=torch.bool)
    given = {*cond, "hidden_states", "timestep", "return_dict"}
    missing = [
        name
        for name, parameter in arguments.items()
        if name not in given
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and (parameter.default is inspect.Parameter.empty or name in _LAYOUT_ARGUMENTS)
    ]
    if missing or "hidden_states" not in arguments:
        what = f"cannot be driven without {', '.join(missing) or 'hidden_states'}"
        raise _refuse(config, what, f"give {missing[0] if missing else 'its inputs'} with --conditions FILE")
    return cond


def null_conditions(config: Mapping[str, Any], cond: Mapping[str, Tensor]) -> Conditions:
    """Zeros for every embedding, masks unchanged."""
    return {name: torch.zeros_like(value) if value.is_floating_point() else value for name, value in cond.items()}


def default_guidance(config: Mapping[str, Any]) -> float:
    """A moderate scale, or 1 for a model that takes the scale as an input."""
    return 1.0 if config.get("guidance_embeds") else 4.5


def predict(model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """The model's prediction, shape and dtype of `latents`; `timestep` (batch,) as the scheduler gives it.

    Raises E205 where the model refuses its arguments or answers with another shape.
    """
    dtype = compute_dtype(model)
    config: Mapping[str, Any] = model.config  # type: ignore[assignment]
    name = type(model).__name__
    offset, scale, sign = _CONVENTIONS.get(name, (0.0, 1.0, 1.0))
    time = offset + scale * float(config.get("timestep_scale") or 1.0) * timestep.to(latents.device)
    kwargs = moved(cond, latents.device, dtype)
    try:
        output = model(latents.to(dtype), timestep=time, return_dict=False, **kwargs)[0]
    except TypeError as error:
        raise DitcompressError("E205", name, f"cannot be driven: {error}", "give it with --conditions FILE") from error
    same_image = output.ndim == latents.ndim and output.shape[2:] == latents.shape[2:]
    if not same_image or output.shape[1] not in (latents.shape[1], 2 * latents.shape[1]):
        what = f"answers {tuple(output.shape)} to latents {tuple(latents.shape)}"
        raise DitcompressError("E205", name, what, "this class can be quantized, but not calibrated or evaluated yet")
    return sign * output[:, : latents.shape[1]].to(latents.dtype)


def tiny(seed: int = 0) -> nn.Module:
    """A random Sana of two blocks, width 64: linear attention, feed-forward of convolutions."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 64,
        "caption_channels": 48,
        "sample_size": 8,
    }
    model = built(SanaTransformer2DModel, config, seed)
    model.register_to_config(_class_name="SanaTransformer2DModel")  # type: ignore[operator]
    return model
