"""The tensors of a checkpoint as a model takes them, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from . import bnb
from .checkpoint.reader import Checkpoint


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in the place of the parameter (without gradient) or buffer `name`."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name) if module_name else model
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


class Weights(Mapping[str, Tensor]):
    """Every stored tensor of a model as it is loaded, read from its file each time: ordinary floating ones in `dtype`
    (None: as stored), those of other libraries decoded, packed ones as they are."""

    def __init__(
        self, checkpoint: Checkpoint, model: nn.Module, names: Collection[str], packed: Collection[str],
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.dtype = checkpoint, dtype
        self.names, self.packed, self.foreign = dict.fromkeys(sorted(names)), packed, bnb.layers(checkpoint)
        self.shapes = {name: model.get_parameter(f"{name}.weight").shape for name in self.foreign}
        self.wide = {name for name in self.names if _stays_float32(model, name)}

    def stored(self, name: str) -> Tensor:
        """As it is on disk, or decoded; KeyError for a name that is none."""
        if name not in self.names:
            raise KeyError(name)
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in self.foreign:
            return bnb.read(self.checkpoint, owner, self.shapes[owner])
        return self.checkpoint.read(name)

    def cast(self, name: str, value: Tensor) -> Tensor:
        """`value` of the tensor `name` in the dtype that it is loaded in."""
        if name in self.packed or not value.is_floating_point() or self.dtype is None:
            return value
        return value.to(torch.float32 if name in self.wide else self.dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self.cast(name, self.stored(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _stays_float32(model: nn.Module, name: str) -> bool:
    """diffusers' rule: a part of the dotted name stands in the class's `_keep_in_fp32_modules`."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return not set(name.split(".")).isdisjoint([kept] if isinstance(kept, str) else kept)
