"""The user's own function, `python:module:function`: images (n, channels, height, width) in [-1, 1] to features.

An attribute `logits` of the function, if it has one, gives class scores of the same images.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from . import Extractor, Request, failed, module_digest

LABEL = "Python entry point"


def open_extractor(request: Request) -> Extractor:
    """E337 for a name that cannot be imported or a function that fails on the model's images."""
    module_name, _, attribute = request.argument.partition(":")
    where = f"--extractor python:{request.argument}"
    try:
        function = getattr(importlib.import_module(module_name), attribute)
        with torch.no_grad():
            function(torch.zeros(2, *request.shape))
    except Exception as error:
        raise failed(where, error, "give python:module:function") from None
    digest = module_digest(function) if isinstance(function, nn.Module) else ""
    return Extractor(request.argument, digest, function, getattr(function, "logits", None))
