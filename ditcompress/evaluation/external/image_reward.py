"""ImageReward (Xu et al. 2023): a reward model of human preference, through the ImageReward package.

Its release 1.5 imports names that transformers 5 removed, and OpenAI's clip, which it does not declare: beside
ditcompress's own transformers it is skipped with that reason until the package follows, and has no extra.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from torch import Tensor

from ...result import Measurement
from ..local_weights import library, pinned, plain_pickle
from ..pixels import to_pil
from ._rows import difference, scores
from .base import Samples, prompts_of

LABEL = "ImageReward"
EXTRA = ""
WEIGHTS = ("image_reward/ImageReward.pt", "image_reward/med_config.json", "image_reward/bert-base-uncased")


def measure(samples: Samples) -> list[Measurement]:
    prompts = prompts_of(samples)
    weights, config, _ = (pinned(samples, name) for name in WEIGHTS)
    plain_pickle(weights.path)  # the package calls torch.load as its torch sees fit; a plain file runs no code
    package = library("ImageReward", "image-reward")
    # The package asks for the tokenizer "bert-base-uncased" by that name alone, which is a folder where we stand.
    with contextlib.chdir(weights.path.parent):
        model: Any = package.load(name=str(weights.path), device=samples.device, med_config=str(config.path))

    def score(place: slice, images: Tensor) -> np.ndarray:
        return np.array([model.score(text, image) for text, image in zip(prompts[place], to_pil(images), strict=True)])

    return [difference("image_reward", LABEL, scores(samples, score), weights.note)]
