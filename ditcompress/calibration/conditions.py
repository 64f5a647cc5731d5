"""What the model is asked to draw: from a file, the pipeline's own text encoders, class labels, or random embeddings.

A conditions file is safetensors with tensors named as the model's forward arguments, samples first; the
unconditional branch has the same names under the prefix `null.`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..registry import nearest

NULL = "null."


@dataclass(frozen=True)
class Conditions:
    """Forward arguments by name, samples first; `null` those of the unconditional branch or None; `source` in words."""

    cond: Mapping[str, Tensor]
    null: Mapping[str, Tensor] | None
    source: str

    @property
    def count(self) -> int:
        return len(next(iter(self.cond.values())))

    @property
    def labels(self) -> Tensor | None:
        """Class labels (n,) of a class-conditional model."""
        return self.cond.get("class_labels")

    def take(self, indices: Sequence[int]) -> Conditions:
        """The conditions of some images."""
        index = torch.as_tensor(list(indices))
        null = None if self.null is None else {name: tensor[index] for name, tensor in self.null.items()}
        return Conditions({name: tensor[index] for name, tensor in self.cond.items()}, null, self.source)

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and bytes of both branches."""
        digest = hashlib.sha256()
        branches = {"cond": self.cond, "null": self.null or {}}
        for branch, tensors in branches.items():
            for name, tensor in sorted(tensors.items()):
                data = tensor.detach().contiguous()
                digest.update(f"{branch} {name} {data.dtype} {tuple(data.shape)}".encode())
                digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def get_conditions(
    source: Any,
    adapter: ModuleType,
    count: int,
    seed: int,
    *,
    file: Path | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    reporter: Reporter | None = None,
) -> Conditions:
    """`count` conditions for a checkpoint (or model source): file, then text encoders, labels, random embeddings.

    `labels` are cycled through where the model is class-conditional; without them every class comes equally often.
    """
    reporter, config = reporter or Silent(), source.config
    if file is not None:
        return from_file(file, count, config)
    if config.get("num_embeds_ada_norm") and "class_labels" in adapter.random_conditions(config, 1, torch.Generator()):
        cond = {"class_labels": class_labels(int(config["num_embeds_ada_norm"]), count, seed, labels)}
        return Conditions(cond, adapter.null_conditions(config, cond), "class labels, every class equally often")
    if source.pipeline is not None and prompts:
        from .text import from_pipeline, has_text_encoder

        if has_text_encoder(source.pipeline):
            return from_pipeline(source.pipeline, prompts, count)
    generator = torch.Generator().manual_seed(seed)
    cond = adapter.random_conditions(config, count, generator)
    reporter.note("no text encoder and no --conditions file: seeded random embeddings are used, figures are rough")
    return Conditions(cond, adapter.null_conditions(config, cond), f"random embeddings, seed {seed}")


def class_labels(classes: int, count: int, seed: int, labels: Sequence[int] | None = None) -> Tensor:
    """Labels (count,): the given ones in turn, or whole shuffled rounds of all classes."""
    if labels:
        return torch.tensor([int(labels[i % len(labels)]) for i in range(count)])
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(classes, generator=generator) for _ in range(-(-count // classes))]
    return torch.cat(rounds)[:count]


def from_file(path: Path, count: int, config: Mapping[str, Any]) -> Conditions:
    """Conditions of a safetensors file, repeated in turn when there are fewer than `count`."""
    try:
        tensors = load(Path(path).read_bytes())
    except Exception as error:
        raise DitcompressError(
            "E330", path, f"cannot be read ({type(error).__name__})", "give a safetensors file"
        ) from None
    cond = {name: t for name, t in tensors.items() if not name.startswith(NULL)}
    null = {name[len(NULL) :]: t for name, t in tensors.items() if name.startswith(NULL)}
    if not cond:
        raise DitcompressError(
            "E330", path, "holds no tensor of a conditional branch", "name tensors as forward arguments"
        )
    _check_names(path, [*cond, *null], config)
    length = len(next(iter(cond.values()))) if next(iter(cond.values())).ndim else 0
    for name, tensor in {**cond, **{NULL + n: t for n, t in null.items()}}.items():
        found = tensor.shape[0] if tensor.ndim else 0
        allowed = (length, 1) if name.startswith(NULL) else (length,)
        if length == 0 or found not in allowed:
            raise DitcompressError(
                "E330", f"{path}: {name}", f"{found} samples, others have {length}", "put samples first"
            )
    if null and set(null) != set(cond):
        raise DitcompressError("E330", path, "the null branch has other names", "give every argument under null. too")
    index = torch.arange(count) % length
    null = {name: t.expand(length, *t.shape[1:])[index] for name, t in null.items()}
    return Conditions(
        {n: t[index] for n, t in cond.items()}, null or None, f"{length} conditions from {Path(path).name}"
    )


def _check_names(path: Path, names: Sequence[str], config: Mapping[str, Any]) -> None:
    """Every tensor must be an argument of the model's forward."""
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        return
    known = [p for p in inspect.signature(cls.forward).parameters if p not in ("self", "hidden_states", "timestep")]
    for name in names:
        if name not in known:
            raise DitcompressError(
                "E330", f"{path}: {name}", f"is no argument of {cls.__name__}.forward", nearest(name, known)
            )
