"""CLIP from a local folder through transformers: normalised features of images and texts.

Images go through the folder's own preprocessor_config.json on 8-bit pictures with Pillow, as the published scores do;
transformers' other path needs torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .local_weights import Place, Unavailable, library, pinned
from .pixels import to_pil


@dataclass(frozen=True)
class Clip:
    """A loaded model with its preprocessing; `note` names the weights."""

    model: Any
    tokenizer: Any
    processor: Any
    device: str
    note: str

    @property
    def scale(self) -> float:
        """exp of the learned logit scale."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """RGB (n, 3, height, width) in [-1, 1] to unit features, float64 (n, dimensions) on the CPU."""
        pixels = self.processor(images=to_pil(images), return_tensors="pt")["pixel_values"].to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return _unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut to the model's longest, to unit features, float64 (n, dimensions) on the CPU."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        ).pooler_output
        return _unit(self.model.text_projection(pooled))


def load_clip(place: Place, name: str, *, texts: bool) -> Clip:
    """The model in the folder `name` of the weights folder: safetensors only, complete, in float32."""
    weights = pinned(place, name)
    transformers = library("transformers", "transformers")
    local = {"local_files_only": True}
    model, info = transformers.CLIPModel.from_pretrained(
        str(weights.path), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
    )
    if info["missing_keys"]:
        raise Unavailable(f"{name} lacks {len(info['missing_keys'])} tensors of its model, such as "
                          f"{min(info['missing_keys'])}")  # fmt: skip
    processor = _image_processor(transformers).from_pretrained(str(weights.path), **local)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(weights.path), **local) if texts else None
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Clip(model.eval().to(place.device), tokenizer, processor, place.device, weights.note)


def _image_processor(transformers: Any) -> Any:
    """The Pillow class under its name of transformers 5."""
    try:
        return transformers.CLIPImageProcessorPil
    except (AttributeError, ImportError):
        raise Unavailable(f"transformers {transformers.__version__} has no CLIPImageProcessorPil") from None


def _unit(features: Tensor) -> Tensor:
    features = features.double().cpu()
    return features / features.norm(dim=-1, keepdim=True)
