"""A student against its teacher on the same states: what training tasks that imitate have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .data import Data
from .losses import BlockOutputs, feature_loss, output_loss
from .trainer import Plain


class Imitating(Plain):
    """The part of a trainer's task that runs both models; `blocks` are those whose outputs are compared.

    Both are in evaluation mode until `release`, which takes the hooks off and leaves the teacher as it was given.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, data: Data, size: int, blocks: Sequence[str]) -> None:
        self.training = teacher.training
        self.teacher, self.student = teacher.eval(), student.eval().requires_grad_(False)
        self.data, self.size = data, size
        # of errors at timesteps (n,), in the clean latents
        self.clean_weights: Callable[[Tensor], Tensor] | None = None
        self.clean: Tensor | None = None  # the last batch's error so weighted, where it is asked for
        self.task: Tensor | None = None  # the last batch's error against its own target, where data have one
        self.outputs = [BlockOutputs(model, blocks) for model in (teacher, student)] if blocks else []

    def compare(self, step: int, part: int) -> tuple[Tensor, Tensor]:
        """Output and feature loss of one batch, scalars; the second is 0 where no blocks are compared."""
        batch, predict = self.data.batch(step, self.size, part), self.data.adapter.predict
        for outputs in self.outputs:
            outputs.take()  # of the sampling that may have renewed the data
        with torch.no_grad():
            wanted = predict(self.teacher, batch.latents, batch.timestep, batch.cond).float()
        found = predict(self.student, batch.latents, batch.timestep, batch.cond).float()
        loss = output_loss(found, wanted)
        if self.clean_weights is not None:
            self.clean = output_loss(found, wanted, self.clean_weights(batch.timestep).to(found.device))
        self.task = None if batch.target is None else output_loss(found, batch.target)
        if not self.outputs:
            return loss, torch.zeros_like(loss)
        teacher, student = (outputs.take() for outputs in self.outputs)
        return loss, feature_loss(student, teacher)

    def release(self) -> None:
        """Leave both models without hooks."""
        for outputs in self.outputs:
            outputs.remove()
        self.teacher.train(self.training)
