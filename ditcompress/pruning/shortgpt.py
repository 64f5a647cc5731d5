"""ShortGPT (Men et al. 2024, arXiv 2403.03853, section 3): block influence, 1 - cosine of a block's input and output.

Per token over the width, averaged over tokens, samples and timesteps; the lowest go at once. A block whose output is
not finite or not comparable counts 0.5, as in the authors' code. In a two-stream block the mean runs over the tokens
of both streams.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cosine_similarity

from ._streams import Streams, measured
from .base import Context, ProbeParams, Scores

NEEDS = ("probes",)
UNKNOWN = 0.5


class Params(ProbeParams):
    """`angular`: arccos(cosine) / pi in place of 1 - cosine."""

    angular: bool = False


def influence(pairs: Streams, angular: bool = False) -> float:
    """Block influence of one call, in [0, 2] ([0, 1] for the angle); 0.5 where nothing can be compared."""
    if not pairs:
        return UNKNOWN
    cosines = torch.cat([cosine_similarity(x.float(), y.float(), dim=-1).flatten() for x, y in pairs]).double()
    found = (cosines.clamp(-1, 1).arccos() / math.pi if angular else 1 - cosines).mean()
    return float(found) if bool(torch.isfinite(found)) else UNKNOWN


def scores(context: Context, params: Params) -> Scores:
    """Mean influence of each unit, kept for every timestep."""
    return context.average(measured(context, lambda pairs: influence(pairs, params.angular)))
