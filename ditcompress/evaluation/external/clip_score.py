"""CLIPScore (Hessel et al. 2021): 100 x the cosine of CLIP's image and text features, for each image and its prompt.

Not clipped at zero, so that the paired difference is smooth. The customary model is openai/clip-vit-large-patch14.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...result import Measurement
from ..clip import load_clip
from ._rows import difference, scores
from .base import Samples, prompts_of

LABEL = "CLIPScore"
EXTRA = ""
WEIGHTS = ("clip",)


def measure(samples: Samples) -> list[Measurement]:
    prompts = prompts_of(samples)
    clip = load_clip(samples, WEIGHTS[0], texts=True)

    def score(place: slice, images: Tensor) -> np.ndarray:
        return 100 * (clip.images(images) * clip.texts(prompts[place])).sum(1).numpy()

    return [difference("clip_score", LABEL, scores(samples, score), clip.note)]
