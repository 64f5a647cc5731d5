"""Models larger than memory: blocks have no data but while they run, and no second copy of them is written.

The hooks are accelerate's: every module of a block that owns tensors takes them before its forward and gives them back
after it, so memory holds the part outside the blocks and one linear. `disk` reads them from the checkpoint's own files
(one pread a tensor), `cpu` holds them in main memory as stored and casts and moves them. The values are those of
`load_model`, so results are equal to the bit.

A backward pass needs weights again. Autograd would keep every one alive until then; inside `reread` it keeps a
name in the place of a weight, and the weight is read once more when its gradient is due.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .checkpoint.reader import Checkpoint
from .errors import DitcompressError
from .loading import empty_model, load_model
from .models import adapter_for
from .models._table import block_of
from .runtime.attention import RoutedAttention
from .sharing import copies_of
from .weights import Weights, set_tensor

WAYS = ("none", "cpu", "disk")
ATTRIBUTE = "ditcompress_offloaded"  # of a model whose blocks are read when they run
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGE = -1, -3, 1 << 20  # mallopt(3)
WHOLE = ["MultiheadAttention"]  # torch's own reads the weights of its parts without calling them, as routed heads do


def check_offload(way: str) -> None:
    """E203 for a way that is not known."""
    if way not in WAYS:
        raise DitcompressError("E203", f"--offload {way}", "is not known", f"use {', '.join(WAYS)}")


def load_to_run(
    path: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu", offload: str = "none"
) -> tuple[nn.Module, Checkpoint]:
    """`load_model`, or with `offload` "cpu" or "disk" a model whose blocks are there only while they run.

    Its outputs are the same to the bit; its state_dict has no data inside blocks (see `loaded`). Raises E203 for
    another way, E205 for a checkpoint that no file gives tensor by tensor.
    """
    check_offload(offload)
    if offload == "none":
        return load_model(path, dtype=dtype, device=device)
    _give_back_freed_memory()
    model, weights = empty_model(path, dtype)
    checkpoint = weights.checkpoint
    if checkpoint.memory is not None and offload == "disk":
        what = "is converted in memory as a whole, so there is nothing to read it from"
        raise DitcompressError("E205", f"--offload disk: {checkpoint.path.name}", what, "use --offload cpu or none")
    blocks = adapter_for(checkpoint.config).layout(model).blocks
    _place(model, Parts(weights, model, blocks, torch.device(device), kept=offload == "cpu"))
    return model.requires_grad_(False).eval(), checkpoint


def _give_back_freed_memory() -> None:
    """Ask glibc to map every large tensor by itself, so that the system has it back when it is freed. By default holes
    stay between what lives long (statistics) and what comes and goes (weights): several times the memory in use. It
    costs about 15 % of the time of a forward pass on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, LARGE)


def _place(model: nn.Module, parts: Parts) -> None:
    """Data for everything outside the blocks, hooks for what is inside."""
    from accelerate.hooks import attach_align_device_hook

    with torch.no_grad():
        for name, buffer in list(model.named_buffers()):
            if not buffer.is_meta:  # computed when the model was built
                set_tensor(model, name, buffer.to(parts.device))
        for name in parts.weights:
            inside = bool(block_of(name, parts.blocks))
            set_tensor(model, name, parts.header(name) if inside else parts.weights[name].to(parts.device))
    routed = [m for m in model.modules() if isinstance(getattr(m, "processor", None), RoutedAttention)]
    whole = [*WHOLE, *{type(module).__name__ for module in routed}]
    for block in parts.blocks:
        attach_align_device_hook(
            model.get_submodule(block), parts.device, offload=True, weights_map=parts, offload_buffers=True,
            module_name=block, preload_module_classes=whole,
        )  # fmt: skip
    setattr(model, ATTRIBUTE, parts)


class Parts(Mapping[str, Tensor]):
    """The tensors inside the blocks, on the device that runs them, by the names that the model has for them."""

    def __init__(
        self, weights: Weights, model: nn.Module, blocks: tuple[str, ...], device: torch.device, *, kept: bool
    ) -> None:
        self.weights, self.blocks, self.device = weights, blocks, device
        self.modules = {block: model.get_submodule(block) for block in blocks}  # whatever they are called later
        owners = {f"{copy}.": f"{owner}." for copy, owner in copies_of(model).items()}
        self.names = {}
        for name in model.state_dict():
            copy = next((prefix for prefix in owners if name.startswith(prefix)), "")
            if block_of(name, blocks):
                self.names[name] = owners.get(copy, copy) + name[len(copy) :]
        self.kept = {name: weights.stored(name) for name in dict.fromkeys(self.names.values()) if kept}
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.changed: dict[str, Tensor] = {}  # values that stand for those of the checkpoint
        self.watched: dict[int, tuple[StorageWeakRef, str]] | None = None  # storages handed out, while that matters
        self.watchers = 0
        self.held: dict[str, Tensor] | None = None  # what was read of the block `held_of`, while others will ask for it
        self.held_of = ""

    def header(self, name: str) -> Tensor:
        """A tensor on the meta device with the shape and dtype of the loaded one."""
        decoded = name.removesuffix(".weight") in self.weights.foreign
        dtype = torch.float32 if decoded else self.weights.checkpoint.tensors[name].dtype
        return self.weights.cast(name, torch.empty(self.shapes[name], dtype=dtype, device="meta"))

    def __getitem__(self, name: str) -> Tensor:
        stored = self.names[name]  # KeyError for others: accelerate asks for names that may not be there
        value = self._held(name, stored)
        if self.watched is not None:
            storage = value.untyped_storage()
            self.watched[storage._cdata] = (StorageWeakRef(storage), name)
        return value

    def _held(self, name: str, stored: str) -> Tensor:
        if self.held is None:
            return self._read(name, stored)
        block = block_of(name, self.blocks)
        if block != self.held_of:
            self.held, self.held_of = {}, block
        if name not in self.held:
            self.held[name] = self._read(name, stored)
        return self.held[name]

    def _read(self, name: str, stored: str) -> Tensor:
        if name in self.changed:
            value = self.changed[name]
        else:
            value = self.weights.cast(stored, self.kept[stored]) if stored in self.kept else self.weights[stored]
        return value.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def holding(model: nn.Module) -> Iterator[None]:
    """Inside, what is read of an offloaded block stays until another block is read."""
    parts: Parts = getattr(model, ATTRIBUTE)
    if parts.held is not None:
        yield
        return
    parts.held, parts.held_of = {}, ""
    try:
        yield
    finally:
        parts.held = None


@contextmanager
def reread(model: nn.Module) -> Iterator[None]:
    """A forward and its backward pass inside keep no weight of an offloaded block; a resident model is left as it is.

    A storage is known by its address, which a weak reference keeps from being used again while the context lasts; of
    several contexts at a time, until the last one ends.
    """
    parts: Parts | None = getattr(model, ATTRIBUTE, None)
    if parts is None:
        yield
        return
    handed: dict[int, tuple[StorageWeakRef, str]] = {} if parts.watched is None else parts.watched

    def pack(tensor: Tensor) -> Any:
        known = handed.get(tensor.untyped_storage()._cdata)
        return tensor if known is None else (known[1], tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, *view = packed
        return parts[name].as_strided(*view)

    parts.watched, parts.watchers = handed, parts.watchers + 1
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        parts.watchers -= 1
        if not parts.watchers:
            parts.watched = None


@contextmanager
def loaded(model: nn.Module, path: str, deep: bool = True) -> Iterator[nn.Module]:
    """The module at `path` (or, not `deep`, what it owns itself) with its data inside, for code that reads weights
    instead of running them. Nothing happens to a resident model."""
    module = model.get_submodule(path)
    if getattr(model, ATTRIBUTE, None) is None:
        yield module
        return
    with ExitStack() as stack:
        for part in module.modules() if deep else [module]:
            hook: Any = getattr(part, "_hf_hook", None)
            if hook is not None:
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield module


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A tensor of the model by name, on the CPU; of an offloaded block it is read."""
    path, _, leaf = name.rpartition(".")
    with loaded(model, path, deep=False) as module:
        tensor: Tensor = getattr(module, leaf)
        return tensor.detach().cpu()


@contextmanager
def rewritten(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other values of some of its tensors inside; the old ones are put back. Those of offloaded blocks
    are kept in memory meanwhile."""
    parts: Parts | None = getattr(model, ATTRIBUTE, None)
    state = model.state_dict()
    stored = {} if parts is None else {name: _stored_name(model, name) for name in tensors if state[name].is_meta}
    old = {name: state[name].clone() for name in tensors if name not in stored}
    before = {} if parts is None else dict(parts.changed)
    try:
        for name, tensor in tensors.items():
            if parts is not None and name in stored:
                parts.changed[stored[name]] = tensor.to(state[name].dtype)
            else:
                state[name].copy_(tensor)
        yield
    finally:
        for name, tensor in old.items():
            state[name].copy_(tensor)
        if parts is not None:
            parts.changed = before


def _stored_name(model: nn.Module, name: str) -> str:
    """What an offloaded tensor was called when the model was placed: blocks may have been renumbered since."""
    path, rest = name, ""
    while path:
        path, _, leaf = path.rpartition(".")
        rest = f"{leaf}.{rest}".rstrip(".")
        hook: Any = getattr(model.get_submodule(path), "_hf_hook", None)
        if hook is not None:
            return f"{hook.weights_map.prefix}{rest}"
    raise KeyError(name)


def device_of(model: nn.Module) -> torch.device:
    """Where the model runs: blocks without data lie nowhere."""
    parts: Parts | None = getattr(model, ATTRIBUTE, None)
    return next(model.parameters()).device if parts is None else parts.device
