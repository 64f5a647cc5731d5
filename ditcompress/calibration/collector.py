"""What the hooks of a calibration pass do with the inputs that they see.

Of several processes each sees its own images of a batch, and keeps of their tokens those that one process would have
kept: all draw the same random numbers, over the tokens of the whole batch. The sets are put together by `merge`:
sums (Gram matrix, total, tokens, similarity) are added, ranges take the lesser and the larger, and of the kept tokens
those of highest priority stay. Sums then differ from one process's by float rounding; the kept tokens are the same ones
(of equal priorities either may come first). Where tokens choose experts, as many calls happen as experts are reached,
so processes draw other numbers: ranges, keys and (where all tokens of a forward enter) sums are still those of one
process, the kept tokens are others. An input that all images of a batch share (none in the families here) would count
once a process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ranks import Ranks
from .statistics import InputStatistics, keep_best

GRAM_TOKENS = 2048  # tokens of one forward that enter a Gram matrix: far more than channels over a whole pass
TOKENS_A_PASS = 64  # of one forward that enter a reservoir


@dataclass(frozen=True)
class CalibrationSettings:
    """`policy`: "uniform" counts every step of slightly varied trajectories, "all" exactly the given steps, "normal"
    the steps nearest to timesteps drawn from N(0.4 T, 0.4 T) for each image (PTQ4DM, section 3)."""

    samples: int = 24
    steps: int = 25
    guidance: float | None = None
    policy: Literal["uniform", "all", "normal"] = "uniform"
    buckets: int = 8
    reservoir: int = 1024
    weighting: Literal["none", "fisher"] = "none"
    labels: tuple[int, ...] = ()  # class labels in turn, of a class-conditional model; empty: all equally often
    seed: int = 0
    batch: int = 16
    grams: bool = True


@dataclass(frozen=True)
class Share:
    """The rows of a batch of `size` (both branches) that this process runs, (n,) in order."""

    rows: Tensor
    size: int


class _Now(threading.local):
    """What the forward pass of this thread counts as."""

    def __init__(self) -> None:
        self.bucket = 0
        self.rows: Tensor | None = None  # images of the batch that count at this step; None: all
        self.share: Share | None = None  # the rows of the batch that this process runs; None: all
        self.source = torch.Generator()
        self.active = False


class Collector:
    """Running statistics of every input, fed by forward hooks."""

    def __init__(self, settings: CalibrationSettings) -> None:
        self.settings = settings
        self.inputs: dict[str, InputStatistics] = {}
        self.similarity: dict[str, Tensor] = {}
        self.now = _Now()
        self.weighed = 0  # rows of the batches whose tokens were weighted, of all processes

    def begin(self, bucket: int, rows: Tensor | None, seed: int, share: Share | None = None) -> None:
        """What this thread's next forward pass counts as; `rows` are those of the whole batch, `share` is this
        process's part."""
        now = self.now
        now.bucket, now.rows, now.share, now.active = bucket, rows, share, True
        now.source.manual_seed(seed)

    def end(self) -> None:
        """Nothing counts until the next `begin`."""
        self.now.active = False

    def see(self, key: str, x: Tensor) -> None:
        """Take one input (batch, ..., K)."""
        if not self.now.active:
            return
        share, rows = self.now.share, self.now.rows
        whole = len(x) if share is None else len(x) // len(share.rows) * share.size
        counted = rows if rows is not None and len(rows) == whole else None
        ids, count = None, 0
        if share is not None and len(x) % len(share.rows) == 0:
            each = x.shape[:-1].numel() // len(share.rows)  # tokens of an image and branch
            places = share.rows if counted is None else (counted.long().cumsum(0) - 1)[share.rows[counted[share.rows]]]
            ids = (places[:, None] * each + torch.arange(each)).flatten()
            count = each * (share.size if counted is None else int(counted.sum()))
        if counted is not None:
            x = x[counted if share is None else counted[share.rows]]
        tokens = x.detach().reshape(-1, x.shape[-1]).float()
        update = self._one(tokens, ids, len(tokens) if ids is None else count)
        if update is not None:
            known = self.inputs.get(key)
            self.inputs[key] = update if known is None else self._add(known, update)

    def _one(self, tokens: Tensor, ids: Tensor | None, count: int) -> InputStatistics | None:
        """Of tokens (T, K) alone, which are the `ids` (T,) of the `count` of the batch (None: all of them)."""
        if count == 0:
            return None
        settings, channels = self.settings, tokens.shape[1]
        offset = int(torch.randint(count, (1,), generator=self.now.source))
        stride = max(1, count // GRAM_TOKENS)
        scale = count / len(range(offset % stride, count, stride))
        pick = torch.randint(count, (min(self._quota(), TOKENS_A_PASS, count),), generator=self.now.source)
        priority = torch.rand(len(pick), generator=self.now.source)
        if len(tokens) == 0:
            return None
        if ids is None:
            part = tokens[offset % stride :: stride]
        else:
            part = tokens[(ids % stride == offset % stride).to(tokens.device)]
            place = torch.searchsorted(ids, pick).clamp_max(len(ids) - 1)
            mine = ids[place] == pick
            pick, priority = place[mine], priority[mine]
        low = torch.full((settings.buckets, channels), float("inf"))
        high = torch.full((settings.buckets, channels), float("-inf"))
        low[self.now.bucket], high[self.now.bucket] = tokens.amin(0).cpu(), tokens.amax(0).cpu()
        gram = None
        if settings.grams and settings.weighting == "fisher":
            gram = torch.zeros(channels, channels)  # filled by `weigh`
        elif settings.grams:
            with torch.autocast(tokens.device.type, enabled=False):  # a bfloat16 product would not be semidefinite
                gram = ((part.T @ part) * scale).cpu()
        return InputStatistics(
            low, high, part.double().sum(0).cpu() * scale,
            torch.tensor([float(scale * len(part))], dtype=torch.float64),
            gram, tokens[pick].cpu(), torch.full((len(pick),), self.now.bucket, dtype=torch.int32), priority,
        )  # fmt: skip

    def weigh(self, key: str, x: Tensor, weight: Tensor) -> None:
        """Add x^T diag(weight) x to the Gram matrix of an input (..., K) with token weights (...)."""
        known = self.inputs.get(key)
        if known is None or known.gram is None:
            return
        tokens = x.reshape(-1, x.shape[-1]).float()
        with torch.autocast(tokens.device.type, enabled=False):
            scaled = tokens * weight.reshape(-1, 1).float()
            known.gram.add_((tokens.T @ scaled).cpu())

    def average(self) -> None:
        """Weighted Gram matrices become means over the rows, so that tr(D G D^T) is the expected relative error of an
        output."""
        for value in self.inputs.values() if self.weighed else ():
            if value.gram is not None:
                value.gram.div_(self.weighed)

    def _quota(self) -> int:
        return -(-self.settings.reservoir // self.settings.buckets)

    def _add(self, known: InputStatistics, new: InputStatistics) -> InputStatistics:
        """Both sets of tokens; the Gram matrix is added in place."""
        b = self.now.bucket
        known.low[b], known.high[b] = torch.minimum(known.low[b], new.low[b]), torch.maximum(known.high[b], new.high[b])
        if known.gram is not None and new.gram is not None:
            known.gram.add_(new.gram)
        rows = keep_best(
            torch.cat([known.reservoir, new.reservoir]),
            torch.cat([known.reservoir_bucket, new.reservoir_bucket]),
            torch.cat([known.priority, new.priority]),
            self._quota(),
        )
        return InputStatistics(
            known.low, known.high, known.total + new.total, known.tokens + new.tokens, known.gram, *rows
        )

    def see_block(self, block: str, x: Tensor, y: Tensor) -> None:
        """Cosine similarity of a block's input and output, averaged over tokens, summed by bucket with a count."""
        if self.now.active and x.shape == y.shape:
            table = self.similarity.setdefault(block, torch.zeros(self.settings.buckets, 2, dtype=torch.float64))
            value = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).mean().double().cpu()
            part = 1.0 if self.now.share is None else len(self.now.share.rows) / self.now.share.size
            table[self.now.bucket] += torch.stack([value, torch.ones_like(value)]) * part

    # --- several processes --------------------------------------------------------------------------------------------

    def merge(self, ranks: Ranks) -> None:
        """Everything that all processes hold goes to the first one; the others begin anew."""
        if ranks.count == 1:
            return
        held = ({key: value.low.shape[1] for key, value in self.inputs.items()}, sorted(self.similarity))
        everyone = ranks.everyone(held)
        channels = {key: size for sizes, _ in everyone for key, size in sizes.items()}
        for key in sorted(channels):
            mine = self.inputs.pop(key) if key in self.inputs else self._nothing(channels[key])
            merged = self._merged(ranks, mine)
            if ranks.first:
                self.inputs[key] = merged
        for block in sorted({name for _, names in everyone for name in names}):
            table = self.similarity.pop(block, torch.zeros(self.settings.buckets, 2, dtype=torch.float64))
            table = ranks.reduce(table, "sum")
            if ranks.first:
                self.similarity[block] = table

    def _nothing(self, channels: int) -> InputStatistics:
        """Of no tokens: an expert that this process's images never reached."""
        low, none = torch.full((self.settings.buckets, channels), float("inf")), torch.zeros(0)
        gram = torch.zeros(channels, channels) if self.settings.grams else None
        total, tokens = torch.zeros(channels, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return InputStatistics(low, -low, total, tokens, gram, none.view(0, channels), none.int(), none)

    def _merged(self, ranks: Ranks, value: InputStatistics) -> InputStatistics:
        low, high = ranks.reduce(value.low, "min"), ranks.reduce(value.high, "max")
        total, tokens = ranks.reduce(value.total, "sum"), ranks.reduce(value.tokens, "sum")
        gram = None if value.gram is None else ranks.reduce(value.gram, "sum")
        rows = ranks.collect((value.reservoir, value.reservoir_bucket, value.priority))
        if not ranks.first:
            return value
        reservoir, bucket, priority = (torch.cat(parts) for parts in zip(*rows, strict=True))
        kept = keep_best(reservoir, bucket, priority, self._quota())
        return InputStatistics(low, high, total, tokens, gram, *kept)
