"""Text conditions from a pipeline's own encoders: its `encode_prompt`, with only the text components loaded.

Pipelines are diffusers' own classes and components load from the local folder; no code from the folder runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..errors import DitcompressError
from .conditions import Conditions

# what each family's encode_prompt gives, as arguments of the transformer: (cond names, null names) by position
_OUTPUTS = {
    "PixArtAlphaPipeline": ("encoder_hidden_states", "encoder_attention_mask"),
    "PixArtSigmaPipeline": ("encoder_hidden_states", "encoder_attention_mask"),
}


def has_text_encoder(pipeline: Path) -> bool:
    return any((pipeline / name).is_dir() for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))


def from_pipeline(pipeline: Path, prompts: Sequence[str], count: int) -> Conditions:
    """`count` prompts in turn, encoded once each; E330 for a pipeline class that is not supported."""
    try:
        name = str(json.loads((pipeline / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DitcompressError(
            "E330", pipeline / "model_index.json", "is no pipeline index", "restore the original file"
        ) from None
    encode = {
        "PixArtAlphaPipeline": _pixart,
        "PixArtSigmaPipeline": _pixart,
        "StableDiffusion3Pipeline": _sd3,
        "FluxPipeline": _flux,
    }.get(name)
    if encode is None:
        raise DitcompressError(
            "E330", f"{pipeline.name}: {name}", "its prompts cannot be encoded here", "give --conditions FILE"
        )
    try:
        pipe = getattr(diffusers, name).from_pretrained(
            pipeline, transformer=None, vae=None, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except Exception as error:
        raise DitcompressError(
            "E330", pipeline, f"its text encoders do not load ({type(error).__name__})", "give --conditions FILE"
        ) from None
    used = list(prompts[: min(count, len(prompts))])
    with torch.no_grad():
        cond, null = encode(pipe, used)
    index = torch.arange(count) % len(used)
    taken = {key: value[index] for key, value in cond.items()}
    return Conditions(
        taken,
        None if null is None else {key: value[index] for key, value in null.items()},
        f"{len(used)} prompts through the pipeline's own text encoders",
    )


Branches = tuple[dict[str, Tensor], dict[str, Tensor] | None]


def _pixart(pipe: Any, prompts: list[str]) -> Branches:
    embeds, mask, null, null_mask = pipe.encode_prompt(prompts, do_classifier_free_guidance=True)
    names = _OUTPUTS[type(pipe).__name__]
    return dict(zip(names, (embeds, mask), strict=True)), dict(zip(names, (null, null_mask), strict=True))


def _sd3(pipe: Any, prompts: list[str]) -> Branches:
    embeds, null, pooled, null_pooled = pipe.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=True)
    return (
        {"encoder_hidden_states": embeds, "pooled_projections": pooled},
        {"encoder_hidden_states": null, "pooled_projections": null_pooled},
    )


def _flux(pipe: Any, prompts: list[str]) -> Branches:
    embeds, pooled, _ = pipe.encode_prompt(prompts, prompts)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}, None
