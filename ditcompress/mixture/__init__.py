"""Dense feed-forwards, attentions and blocks into experts: one method, one file; `convert` applies one to every
feed-forward of a model."""

from __future__ import annotations

from ._blocks import begin_blocks, block_groups
from ._convert import (
    convert,
    head_importance,
    hidden_of,
    neuron_importance,
    neurons_of,
    prepared,
    seed_of,
    specs_for,
)
from ._distill import Experts, Weights
from ._stages import ONE, check_stages, running, stages_of
from ._tokens import Tokens, followed
from ._use import linear_operations, measured, token_operations
from ._weighed import Weighed, weighed_tokens
from .base import FeedForward, Numbers, Split, method_of, params_of, registry

__all__ = [
    "ONE",
    "Experts",
    "FeedForward",
    "Numbers",
    "Split",
    "Tokens",
    "Weighed",
    "Weights",
    "begin_blocks",
    "block_groups",
    "check_stages",
    "convert",
    "followed",
    "head_importance",
    "hidden_of",
    "linear_operations",
    "measured",
    "method_of",
    "neuron_importance",
    "neurons_of",
    "params_of",
    "prepared",
    "registry",
    "running",
    "seed_of",
    "specs_for",
    "stages_of",
    "token_operations",
    "weighed_tokens",
]
