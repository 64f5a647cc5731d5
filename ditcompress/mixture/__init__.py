"""Dense feed-forwards into experts: one method, one file; `convert` applies one to every layer of a model."""

from __future__ import annotations

from ._convert import convert, hidden_of, neuron_importance, specs_for
from ._distill import Experts, Weights
from ._tokens import Tokens, followed
from ._use import measured, token_operations
from .base import FeedForward, Split, method_of, params_of, registry

__all__ = [
    "Experts",
    "FeedForward",
    "Split",
    "Tokens",
    "Weights",
    "convert",
    "followed",
    "hidden_of",
    "measured",
    "method_of",
    "neuron_importance",
    "params_of",
    "registry",
    "specs_for",
    "token_operations",
]
