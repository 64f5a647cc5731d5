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
MOST_RANDOM = 64  # distinct random embeddings: those of a text model take megabytes each


@dataclass(frozen=True)
class Conditions:
    """Forward arguments by name, distinct conditions first; `null` those of the unconditional branch or None; `source`
    in words. `images` images use them in turn (0: one each), so that memory does not grow with the images."""

    cond: Mapping[str, Tensor]
    null: Mapping[str, Tensor] | None
    source: str
    images: int = 0
    prompts: tuple[str, ...] = ()  # the texts of the distinct conditions, where they are known

    @property
    def distinct(self) -> int:
        return len(next(iter(self.cond.values())))

    @property
    def count(self) -> int:
        return self.images or self.distinct

    @property
    def labels(self) -> Tensor | None:
        """Class labels (count,) of a class-conditional model."""
        labels = self.cond.get("class_labels")
        return None if labels is None else labels[torch.arange(self.count) % self.distinct]

    def texts(self, count: int) -> tuple[str, ...] | None:
        """The prompts of the first `count` images; None where they are not known."""
        return tuple(self.prompts[i % len(self.prompts)] for i in range(count)) if self.prompts else None

    def take(self, indices: Sequence[int]) -> Conditions:
        """The conditions of some images."""
        index = torch.as_tensor(list(indices)) % self.distinct
        null = None if self.null is None else {name: tensor[index] for name, tensor in self.null.items()}
        return Conditions({name: tensor[index] for name, tensor in self.cond.items()}, null, self.source)

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and bytes of both branches."""
        digest = hashlib.sha256(str(self.count).encode())
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
        found = from_file(file, count, config)
        _check_values(file, found, adapter.random_conditions(config, 1, torch.Generator().manual_seed(0)), config)
        if found.null is None and adapter.default_guidance(config) != 1:
            reporter.note(f"{Path(file).name} has no {NULL} branch: only the conditional one is seen, without guidance")
        return found
    if config.get("num_embeds_ada_norm") and "class_labels" in adapter.random_conditions(config, 1, torch.Generator()):
        classes = int(config["num_embeds_ada_norm"])
        if labels and max(labels) >= classes:
            reporter.note(f"the recipe's labels go beyond this model's {classes} classes: all classes are used instead")
            labels = None
        cond = {"class_labels": class_labels(classes, count, seed, labels)}
        said = f"the recipe's {len(labels)} class labels" if labels else "class labels, every class equally often"
        return Conditions(cond, adapter.null_conditions(config, cond), said)
    if source.pipeline is not None and prompts:
        from .text import from_pipeline, has_text_encoder

        if has_text_encoder(source.pipeline):
            return from_pipeline(source.pipeline, prompts, count, config)
    generator = torch.Generator().manual_seed(seed)
    cond = adapter.random_conditions(config, min(count, MOST_RANDOM), generator)
    reporter.note("no text encoder and no --conditions file: seeded random embeddings are used, figures are rough")
    return Conditions(cond, adapter.null_conditions(config, cond), f"random embeddings, seed {seed}", count)


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
    used = min(count, length)
    null = {name: t.expand(length, *t.shape[1:])[:used] for name, t in null.items()}
    said = f"{length} conditions from {Path(path).name}"
    return Conditions({n: t[:used] for n, t in cond.items()}, null or None, said, count)


def check_conditions(path: Path, found: Conditions, adapter: ModuleType, config: Mapping[str, Any]) -> None:
    """E330 unless both branches are what the model's forward takes."""
    _check_names(path, [*found.cond, *(found.null or ())], config)
    _check_values(path, found, adapter.random_conditions(config, 1, torch.Generator().manual_seed(0)), config)


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


def _check_values(path: Path, found: Conditions, like: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """E330 unless both branches hold what the family itself would make: every argument of `like`, with its rank, kind
    and channels (token counts may differ), finite, labels within the table. Masks may be left out."""
    for name in like:
        if name not in found.cond and not name.endswith("mask"):
            raise DitcompressError("E330", path, f"tensor {name} is missing", "give every argument of the model")
    for prefix, branch in (("", found.cond), (NULL, found.null or {})):
        for name, tensor in branch.items():
            wrong = _wrong(name, tensor, like.get(name), config)
            if wrong:
                raise DitcompressError("E330", f"{path}: {prefix}{name}", wrong, "make the file for this model")


def _wrong(name: str, tensor: Tensor, like: Tensor | None, config: Mapping[str, Any]) -> str:
    """What is wrong with one tensor, in words; "" for nothing."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return "holds NaN or infinity"
    if like is None:
        return ""
    if like.is_floating_point() != tensor.is_floating_point() and not name.endswith("mask"):
        return f"is {tensor.dtype}, expected {like.dtype}"
    last = like.shape[-1] if like.ndim > 1 and like.is_floating_point() else None
    if tensor.ndim != like.ndim or (last is not None and tensor.shape[-1] != last):
        return f"has shape {tuple(tensor.shape)}, expected one like {tuple(like.shape)}"
    classes = config.get("num_embeds_ada_norm")
    if name == "class_labels" and classes and not 0 <= int(tensor.min()) <= int(tensor.max()) <= int(classes):
        return f"labels {int(tensor.min())} to {int(tensor.max())}, expected 0 to {classes}"
    return ""
