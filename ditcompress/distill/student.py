"""The training task of `distill`: a student model against its teacher, on the same states and dropped conditions.

Both models stay in evaluation mode: what is dropped, the data decide, for both alike. The teacher runs without
gradients in its own dtype; the student keeps float32 weights and may run under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DitcompressError
from ..ranks import ALONE, Ranks
from ..sharing import copies_of
from ..text_stream import text_paths
from .data import Batch, Data
from .lora import Adapters
from .losses import FEATURES, BlockOutputs, output_loss
from .matching import Pairs
from .sharded import shard, whole
from .trainer import Plain


class Student(Plain):
    """What `train` trains: all of `model`, or low-rank adapters and the vectors of its blocks with `lora` > 0;
    `sharded`: its parameters are divided among the processes."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, data: Data, losses: Mapping[str, float], pairs: Pairs, *,
        blocks: Sequence[str], batch: int, steps: int, lora: int = 0, decay: bool = False, seed: int = 0,
        autocast: bool = False, checkpointing: bool = False, ranks: Ranks = ALONE,
        clean_weights: Callable[[Tensor], Tensor] | None = None, sharded: bool = False,
    ) -> None:  # fmt: skip
        self.clean_weights = clean_weights
        self.model, self.teacher = model.eval().requires_grad_(False), teacher.eval().requires_grad_(False)
        self.data, self.losses, self.size, self.steps, self.decay = data, dict(losses), batch, steps, decay
        self.rows, self.autocast = ranks.rows(batch), autocast
        if checkpointing:
            _checkpoint(model)
        self.adapters = Adapters(model, blocks, lora, seed) if lora else None
        if sharded:
            _check_sharded(model, lora)
            shard(model.requires_grad_(True), blocks)
        self.direct = _direct(model, blocks if lora else None)
        for tensor in self.direct.values():
            tensor.requires_grad_(True)
        if not self.parameters():
            raise DitcompressError("E205", type(model).__name__, "has nothing to train", "leave out --lora")
        wanted = {name for name in FEATURES if name in losses}
        self.outputs: list[BlockOutputs] = []
        if wanted:
            self.outputs = [BlockOutputs(m, [pair[i] for pair in pairs]) for i, m in enumerate((model, teacher))]

    # --- the task of the trainer ---------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        return {**self.direct, **(self.adapters.parameters() if self.adapters else {})}

    def loss(self, step: int, part: int) -> Tensor:
        terms = self.terms(self.data.batch(step, self.size, part, self.rows))
        fade = 1 - step / self.steps if self.decay else 1.0
        weighted = [term * self.losses[name] * (fade if name in FEATURES else 1.0) for name, term in terms.items()]
        return torch.stack(weighted).sum()

    # --- what is compared ----------------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Every wanted loss of one batch, unweighted, by name."""
        for outputs in self.outputs:
            outputs.take()  # of the sampling that may have renewed the data, and of recomputed blocks
        wanted = self._teach(batch) if set(self.losses) != {"task"} else None
        predict, device = self.data.adapter.predict, batch.latents.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast):
            found = predict(self.model, batch.latents, batch.timestep, batch.cond)
        terms = {}
        if "output" in self.losses and wanted is not None:
            terms["output"] = output_loss(found.float(), wanted)
        if "clean" in self.losses and wanted is not None:
            assert self.clean_weights is not None
            terms["clean"] = output_loss(found.float(), wanted, self.clean_weights(batch.timestep).to(device))
        if "task" in self.losses:
            if batch.target is None:
                raise DitcompressError("E203", "--loss task", "needs real latents", "give --data FOLDER")
            terms["task"] = output_loss(found.float(), batch.target)
        if self.outputs:
            mine, theirs = ([tensor.float() for tensor in outputs.take()] for outputs in self.outputs)
            if [t.shape for t in mine] != [t.shape for t in theirs]:
                what = "the blocks of student and teacher give tensors of other shapes"
                raise DitcompressError("E205", "--loss", what, "use --loss output=1")
            terms |= {name: FEATURES[name](mine, theirs) for name in FEATURES if name in self.losses}
        return terms

    def _teach(self, batch: Batch) -> Tensor:
        """The teacher's prediction, float32. E338 for cached states that it does not take."""
        try:
            with torch.no_grad():
                return self.data.adapter.predict(self.teacher, batch.latents, batch.timestep, batch.cond).float()  # type: ignore[no-any-return]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if batch.target is None:
                raise
            what = f"the model does not take these states ({error})"
            raise DitcompressError("E338", "--data", what, "encode them for this model") from error

    def measure(self, batch: Batch) -> dict[str, float]:
        """The losses on held-out states."""
        with torch.no_grad():
            return {name: float(value) for name, value in self.terms(batch).items()}

    def finish(self) -> dict[str, Tensor]:
        """Merge the adapters, let go of the hooks; the trained tensors by their names in the model."""
        merged = self.adapters.merge() if self.adapters else []
        self.adapters = None
        state: dict[str, Any] = self.model.state_dict()
        return {name: whole(state[name]) for name in (*self.direct, *merged)}

    def release(self) -> None:
        """Take the hooks off both models."""
        for outputs in self.outputs:
            outputs.remove()


def _direct(model: nn.Module, vectors_of: Sequence[str] | None) -> dict[str, Tensor]:
    """Parameters that are trained as they are: all, or only the vectors inside the named blocks."""
    found = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    if vectors_of is None:
        return dict(found)
    inside = tuple(f"{block}." for block in vectors_of)
    return {name: tensor for name, tensor in found.items() if tensor.ndim < 2 and name.startswith(inside)}


def _check_sharded(model: nn.Module, lora: int) -> None:
    """E205 for what is not divided among processes."""
    reasons = {
        "--lora": lora > 0, "a model with shared weights": bool(copies_of(model)),
        "a model with linear text sides": bool(text_paths(model)),
    }  # fmt: skip
    for what, found in reasons.items():
        if found:
            raise DitcompressError("E205", what, "cannot be divided by FSDP", "launch without --use_fsdp")


def _checkpoint(model: Any) -> None:
    """Recompute the blocks in the backward pass; E205 where the class cannot."""
    try:
        model.enable_gradient_checkpointing()
    except ValueError:
        what = "does not support gradient checkpointing"
        raise DitcompressError("E205", type(model).__name__, what, "leave out --checkpointing") from None
