"""PickScore (Kirstain et al. 2023): CLIP-H tuned on human choices; logit scale x cosine of image and prompt.

The folder is yuvalkirstain/PickScore_v1 with the tokenizer and preprocessor files of CLIP-ViT-H-14-laion2B added.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...result import Measurement
from ..clip import load_clip
from ._rows import difference, scores
from .base import Samples, prompts_of

LABEL = "PickScore"
EXTRA = ""
WEIGHTS = ("pick_score",)


def measure(samples: Samples) -> list[Measurement]:
    prompts = prompts_of(samples)
    clip = load_clip(samples, WEIGHTS[0], texts=True)

    def score(place: slice, images: Tensor) -> np.ndarray:
        return clip.scale * (clip.images(images) * clip.texts(prompts[place])).sum(1).numpy()

    return [difference("pick_score", LABEL, scores(samples, score), clip.note)]
