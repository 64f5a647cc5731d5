"""VQ4DiT (Deng et al., AAAI 2025, arXiv 2408.17131): code vectors learned among the nearest few, then the codebook.

Every sub-vector keeps its n nearest code vectors with softmax ratios that start at inverse distances. The blocks'
outputs are imitated along the teacher's trajectories; a penalty pushes ratios to 0 and 1; a ratio above 0.99 is frozen.
When 99 % of a layer is frozen it is assigned, and its codebook becomes trainable (the released code's order). Ours:
AdamW in place of RMSprop, and the penalty's running minimum is kept for each layer in place of the whole model.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import DitcompressError
from ..formats.base import StrictParams, resolve
from ..formats.vq import Grid
from ._trained import Quantizer
from .base import Encoded, Layer, pack

NEEDS: tuple[str, ...] = ()
HARD = 1e4  # logit of a frozen choice
CHUNK = 1 << 16  # sub-vectors whose distances are held at once


class Params(StrictParams):
    """`candidates` of each sub-vector; learning rates of ratios, codebooks and biases; `freeze`: ratio above which a
    choice is final; `share` of final choices that settles a layer."""

    candidates: int = Field(2, ge=1, le=16)
    ratio_rate: float = Field(5e-2, gt=0)
    codebook_rate: float = Field(1e-4, gt=0)
    freeze: float = Field(0.99, gt=0.5, lt=1)
    share: float = Field(0.99, gt=0, le=1)


class Candidates(Quantizer):
    """Soft choices among code vectors."""

    trains_bias = True
    frozen: Tensor
    settled: Tensor
    least: Tensor
    places: Tensor

    def __init__(self, layer: Layer, params: Params) -> None:
        super().__init__()
        fmt, self.format_params = resolve(layer.decision.weight)
        self.layer, self.params = layer, params
        weight = layer.effective_weight().float()
        self.shape = (weight.shape[0], weight.shape[1])
        self.rates = {"logits": params.ratio_rate, "codebook": params.codebook_rate, "bias": params.codebook_rate}
        grid = fmt.fit(weight, self.format_params)
        self.codebook = nn.Parameter(grid.codebook[0].clone())
        places, distances = self._nearest(self._vectors(weight), grid.codebook[0])
        self.register_buffer("places", places)
        logits = torch.log(distances[:, -1:] / (distances + 1e-5))
        logits[:, -1] = 0
        self.logits = nn.Parameter(logits)
        self.register_buffer("frozen", torch.full((len(logits),), params.candidates == 1))
        self.register_buffer("settled", torch.tensor(params.candidates == 1))
        self.register_buffer("least", torch.tensor(1000.0))

    def _vectors(self, weight: Tensor) -> Tensor:
        """Sub-vectors (n, dim) along the input; a last short one ends in zeros."""
        dim = self.format_params.dim
        return nn.functional.pad(weight, (0, -weight.shape[1] % dim)).reshape(-1, dim)

    def _nearest(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        most = min(self.params.candidates, len(codebook))
        found = [torch.cdist(part, codebook).topk(most, largest=False) for part in vectors.split(CHUNK)]
        return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])

    def ratios(self) -> Tensor:
        """(sub-vectors, candidates)."""
        return torch.softmax(self.logits, 1)

    def forward(self, weight: Tensor) -> Tensor:
        if self.settled:
            vectors = self.codebook[self._choice()]
        else:
            vectors = (self.ratios().unsqueeze(-1) * self.codebook.detach()[self.places]).sum(1)
        return vectors.reshape(self.shape[0], -1)[:, : self.shape[1]]

    def _choice(self) -> Tensor:
        return self.places.gather(1, self.logits.argmax(1, keepdim=True)).squeeze(1)

    def penalty(self) -> Tensor | None:
        if self.settled:
            return torch.zeros(())
        ratios = self.ratios()[~self.frozen]
        found = self.params.candidates * (ratios * (1 - ratios)).mean()
        if found.detach() <= self.least:
            self.least.copy_(found.detach())
            return torch.zeros(())
        return found

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        if self.settled:
            return
        final = self.logits.argmax(1, keepdim=True)
        done = self.frozen | (self.ratios().amax(1) > self.params.freeze)
        if done.float().mean() > self.params.share:
            done = torch.ones_like(done)
            self.settled.fill_(True)
        hard = torch.full_like(self.logits, -HARD).scatter_(1, final, HARD)
        # what is frozen is written again every time: the optimiser's momentum would move it
        self.logits.copy_(torch.where(done[:, None], hard, self.logits))
        self.frozen.copy_(done)

    def encoded(self, weight: Tensor) -> Encoded:
        dim, rows = self.format_params.dim, self.shape[0]
        codes = self._choice().reshape(rows, -1).repeat_interleave(dim, 1)[:, : self.shape[1]]
        book = self.codebook.detach().to(torch.float16).float()
        return Encoded(pack(self.layer, codes.to(torch.int32), Grid(book[None], None, rows)))


def trainable(layer: Layer, params: Params) -> Quantizer:
    fmt_params = resolve(layer.decision.weight)[1]
    if layer.decision.weight.format != "vq" or fmt_params.rows is not None or fmt_params.row_scale:
        raise DitcompressError(
            "E202", layer.name, "vq4dit has one codebook a matrix", "give format: vq without row_scale"
        )
    return Candidates(layer, params)


def encode(layer: Layer, params: Params) -> Encoded:
    """Plain k-means: the stored form before any training."""
    fmt, format_params = resolve(layer.decision.weight)
    weight = layer.effective_weight().float()
    grid = fmt.fit(weight, format_params)
    return Encoded(pack(layer, fmt.code(weight, grid, format_params), grid))
