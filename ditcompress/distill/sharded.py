"""Training with weights, gradients and optimiser states divided among processes (fully sharded data parallel).

`accelerate launch --use_fsdp` says so in its environment. Every block is gathered when it runs and given back after it
(torch's fully_shard), and the sums of gradients are means over the processes already. States on disk hold whole
tensors, as those of one process do, so a run may go on with another number of processes. The teacher is whole in every
one: their numbers of sampling passes differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DitcompressError
from ..ranks import Ranks

TRUE = ("1", "true", "yes", "on")


def asked(ranks: Ranks) -> bool:
    """Whether the launcher of several processes asks for it. E203 for options of its that are not followed."""
    if ranks.count == 1 or os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in TRUE:
        return False
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() in TRUE:
        raise DitcompressError("E203", "--fsdp_offload_params true", "is not supported", "launch without it")
    return True


def shard(model: nn.Module, blocks: Sequence[str]) -> None:
    """Divide the parameters of every block, and of the rest, among all processes, in place. The first block stays whole
    between its forward and its backward pass: the head of a DiT calls the embedding inside it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(model.get_submodule(block), mesh=mesh, reshard_after_forward=block != blocks[0])
    fully_shard(model, mesh=mesh)


def is_shard(tensor: Tensor) -> bool:
    """Whether this process has a part of `tensor` only."""
    return hasattr(tensor, "full_tensor")


def whole(value: Any, keep: bool = True) -> Any:
    """`value` with whole tensors in the place of parts, inside dicts and lists too. All processes must ask; where not
    `keep`, nothing is left of them."""
    if isinstance(value, Tensor):
        full: Tensor = value.detach().full_tensor() if is_shard(value) else value.detach()  # type: ignore[attr-defined]
        return full if keep else None
    if isinstance(value, Mapping):
        return {key: whole(inner, keep) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(inner, keep) for inner in value)
    return value


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, divided as `like` is; the tensor itself where that is whole."""
    if not is_shard(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    kind: Any = like
    return distribute_tensor(value.to(kind.device), kind.device_mesh, kind.placements, src_data_rank=None)


def divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state of whole tensors as this process holds it."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    inner = {
        number: {key: part_like(value, tensors[number]) if isinstance(value, Tensor) else value
                 for key, value in values.items()}
        for number, values in state["state"].items()
    }  # fmt: skip
    return {**state, "state": inner}
