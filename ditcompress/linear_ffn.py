"""Feed-forwards that one linear with a bias stands for: `quantization_config.linear` lists their paths.

The linear has the path of the feed-forward, so its tensors are PATH.weight and PATH.bias; the block still adds its
output to the stream (y = x + gate * (P n(x) + b) for a modulated norm n), so zeros are a feed-forward left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from .errors import DitcompressError, printable
from .experts import convertible
from .models import adapter_for
from .models.base import Layout
from .runtime.scheme import WHERE
from .structure import readers, writers


def blank(model: nn.Module, layout: Layout, axis: str) -> nn.Linear:
    """A linear for the feed-forward with the neuron axis `axis`, where and in the dtype in which its weights are; its
    values mean nothing yet."""
    out, into = readers(layout, axis)[0], writers(layout, axis)[0]
    weight = model.get_parameter(f"{out.name}.weight")
    made = nn.Linear(into.in_features, out.out_features, device=weight.device, dtype=weight.dtype)
    return made.requires_grad_(False)


def apply_linear(model: nn.Module, paths: Sequence[str]) -> None:
    """Put a linear in the place of each named feed-forward; works on meta models. E320 for a path that is none."""
    if not paths:
        return
    layout = adapter_for(type(model).__name__).layout(model)
    known = convertible(model, layout)
    for path in paths:
        if path not in known or paths.count(path) > 1:
            what = f"{printable(path, 80)} is no feed-forward of this model, or there twice"
            raise DitcompressError("E320", f"{WHERE}.linear", what, "prune the original again")
    for path in paths:
        model.set_submodule(path, blank(model, layout, known[path]))


@contextmanager
def standing_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other modules at some paths inside; its own are put back."""
    own = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in own.items():
            model.set_submodule(path, module)
