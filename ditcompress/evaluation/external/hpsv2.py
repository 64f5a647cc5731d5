"""Human Preference Score v2 (Wu et al. 2023): CLIP-H tuned on human choices; the cosine of image and prompt.

The model is built by hpsv2's own open_clip and given the local checkpoint. Its `score(..., cp=path)` is not used: it
first fetches LAION's 4 GB of weights, only to overwrite them, and reads the checkpoint again for every prompt. The
wheel of release 1.2.0 lacks open_clip's bpe_simple_vocab_16e6.txt.gz; until that is put beside its tokenizer.py the
metric is skipped with that reason. It wants protobuf below 4, so it has no extra here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...result import Measurement
from ..local_weights import Unavailable, library, pinned, plain_pickle
from ..pixels import to_pil
from ._rows import difference, scores
from .base import Samples, prompts_of

LABEL = "HPS v2.1"
EXTRA = ""
WEIGHTS = ("hpsv2/HPS_v2.1_compressed.pt",)

ARCHITECTURE = "ViT-H-14"


def measure(samples: Samples) -> list[Measurement]:
    prompts = prompts_of(samples)
    weights = pinned(samples, WEIGHTS[0])
    open_clip = library("hpsv2.src.open_clip", "hpsv2")
    model, _, prepare = open_clip.create_model_and_transforms(
        ARCHITECTURE, pretrained=None, precision="fp32", device="cpu", light_augmentation=True, output_dict=True
    )  # `light_augmentation` picks the resizing that hpsv2 scores with
    state: Any = plain_pickle(weights.path)
    if "state_dict" not in state:
        raise Unavailable(f"{WEIGHTS[0]} has no state_dict: not a checkpoint of HPSv2")
    model.load_state_dict(state["state_dict"])
    model = model.eval().to(samples.device)
    tokenize = open_clip.get_tokenizer(ARCHITECTURE)

    def score(place: slice, images: Tensor) -> np.ndarray:
        pixels = torch.stack([prepare(image) for image in to_pil(images)]).to(samples.device)
        found = model(pixels, tokenize(list(prompts[place])).to(samples.device))
        return (found["image_features"] * found["text_features"]).sum(1).double().cpu().numpy()

    return [difference("hpsv2", LABEL, scores(samples, score), weights.note)]
