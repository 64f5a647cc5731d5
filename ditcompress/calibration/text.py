"""Text conditions from a pipeline's own encoders: its `encode_prompt`, with only the text components loaded.

Pipelines are diffusers' own classes and components load from the local folder; no code from the folder runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from ..checkpoint._folder import read_config
from ..errors import DitcompressError
from .conditions import Conditions

Branches = tuple[dict[str, Tensor], dict[str, Tensor] | None]


def has_text_encoder(pipeline: Path) -> bool:
    return any((pipeline / name).is_dir() for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))


def from_pipeline(pipeline: Path, prompts: Sequence[str], count: int, config: Mapping[str, Any]) -> Conditions:
    """`count` images' prompts in turn, each encoded once; `config` is that of the transformer. E330 for a pipeline
    class that is not supported or text encoders that do not load."""
    index = read_config(pipeline / "model_index.json")
    name = str(index.get("_class_name"))
    encode = _ENCODERS.get(name)
    if encode is None:
        raise DitcompressError(
            "E330",
            f"{pipeline.name}/model_index.json: {name}",
            "its prompts cannot be encoded here",
            "give --conditions FILE",
        )
    # a component that was saved as absent has to be named as such again
    absent = {key: None for key, value in index.items() if value == [None, None]} | {"transformer": None, "vae": None}
    used = list(prompts[: min(count, len(prompts))])
    try:
        with _no_bars():
            pipe = getattr(diffusers, name).from_pretrained(
                pipeline, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, **absent
            )
        # pipelines ask the transformer's config for the width of an encoder that was left out
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config), dtype=torch.float32)
        with torch.no_grad():
            cond, null = encode(pipe, used)
    except Exception as error:
        said = f"its text encoders do not run ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        raise DitcompressError("E330", pipeline, said, "give --conditions FILE") from None
    said = f"{len(used)} prompts through the pipeline's own text encoders"
    return Conditions(cond, null, said, count, tuple(used))


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the progress bars of both libraries off the terminal; ours are there already."""
    libraries = [lib for lib in (diffusers.utils.logging, transformers.utils.logging) if lib.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def _pixart(pipe: Any, prompts: list[str]) -> Branches:
    embeds, mask, null, null_mask = pipe.encode_prompt(prompts, do_classifier_free_guidance=True)
    names = ("encoder_hidden_states", "encoder_attention_mask")
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


_ENCODERS: dict[str, Callable[[Any, list[str]], Branches]] = {
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
}
