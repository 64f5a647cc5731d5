"""The text stream of two-stream blocks becomes linear, fitted by least squares (PPCL, arXiv 2511.16156, width stage).

A group of neighbours keeps the text side of its first block, the anchor. In each of the others the text that attends is
P m + m of the anchor's modulated text m, and the text jumps at the end of the group by P_e (text_stream.py): a block
of width d loses its text modulation (6 d^2), feed-forward (8 d^2) and attention output (d^2) for one or two d^2. P and
its bias are one solution of normal equations over all tokens of the model's own sampler steps, with a ridge towards 0,
which passes the anchor's text on.

The paper gives its groups by number and solves anew for every batch. Here the block goes that hurts the prediction
least, measured, which joins or starts a group; then the others are measured again beside it, until a share
--width-ratio of the text sides' parameters is gone. Training follows by `distill`. FFN of either stream: `linear-ffn`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ...errors import DitcompressError
from ...models.base import Axis
from ...offload import device_of
from ...text_stream import ATTENDED, Group, TextInput, parts_of, runs, stand_ins, text_replaced
from ..base import ProbeParams
from ._axes import count_of
from ._refit import batched
from .base import Context
from .linear_ffn import Sums

NEEDS = ("probes", "journal")
Pair = tuple[str, str, str]  # "attended" or "text", the anchor, the block that is fitted


class Params(ProbeParams):
    """`ridge` in units of the mean diagonal of the inputs' Gram matrix; `longest`: blocks of a group that may be
    linear; `hold`: MiB of normal equations in memory at a time; `again`: whether the others are measured again after
    each choice (n + (n - 1) + ... sweeps instead of n)."""

    samples: int = Field(24, ge=1, le=100_000)
    ridge: float = Field(1e-4, gt=0)
    longest: int = Field(9, ge=1)
    hold: int = Field(1024, ge=0)
    again: bool = True


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """Infinite: no unit of an axis goes by itself."""
    return {axis.name: torch.full((count_of(axis),), torch.inf, dtype=torch.float64) for axis in axes}


def text(context: Context, params: Params) -> dict[Group, dict[str, nn.Module]]:
    """The modules of every group that was chosen. E205 for a model without two-stream blocks in a row, E203 where all
    of them save less than asked."""
    search = _Search(context, params)
    if not search.candidates:
        name = type(context.model).__name__
        what = "has no neighbouring blocks with a text stream of their own"
        raise DitcompressError("E205", name, what, "use another --width-method")
    target, small = context.ratio * search.total, min(map(search.saves, search.candidates))
    chosen: list[str] = []
    alone: dict[str, float] = {}
    with context.reporter.task("text streams that become linear", len(search.candidates)) as advance:
        while search.saved(chosen) < target - small / 2:
            left = [b for b in search.candidates if b not in chosen and search.fits([*chosen, b])
                    and search.saved([*chosen, b]) - small / 2 <= target * (1 + 1e-9)]  # fmt: skip
            if not left:
                break
            trials = alone if alone and not params.again else search.damages(chosen, left)
            alone = alone or trials
            chosen.append(min(left, key=lambda block: trials[block]))
            advance(1)
    if search.saved(chosen) < target - small:
        what = f"linears save {search.saved(chosen) / search.total:.3f} of the text streams"
        raise DitcompressError(
            "E203", f"--width-ratio {context.ratio:g}", what, "give a smaller ratio, or more longest"
        )
    return search.modules(chosen)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Search:
    """Which blocks may lose their text side, what that saves, and the fitted modules of any choice of them."""

    def __init__(self, context: Context, params: Params) -> None:
        self.context, self.params, self.model = context, params, context.model
        self.runs = runs(context.model, context.layout.blocks)
        self.candidates = [block for run in self.runs for block in run[1:]]
        self.total = sum(self._own(block) for run in self.runs for block in run)
        self.linears: dict[Pair, nn.Linear] = context.cache.setdefault("text linears", {})

    def _own(self, block: str) -> int:
        """Parameters of a block's text side that go with it."""
        module = self.model.get_submodule(block)
        parts = parts_of(module)
        assert parts is not None
        return sum(_count(module.get_submodule(path)) for path in parts.paths)

    def _linear(self, block: str) -> int:
        width = self.model.get_submodule(f"{block}.attn.add_k_proj").in_features
        return int(width) * (int(width) + 1)  # type: ignore[arg-type]

    def saves(self, block: str) -> int:
        """What one block saves where it joins a group."""
        return self._own(block) - self._linear(block)

    def saved(self, chosen: Sequence[str]) -> int:
        return sum(map(self.saves, chosen)) - sum(self._linear(run[-1]) for run in self.groups(chosen))

    def groups(self, chosen: Sequence[str]) -> list[list[str]]:
        """Anchor and linear blocks of each group."""
        found: list[list[str]] = []
        for run in self.runs:
            open_ = False
            for before, block in pairwise(run):
                if block in chosen and open_:
                    found[-1].append(block)
                elif block in chosen:
                    found.append([before, block])
                open_ = block in chosen
        return found

    def fits(self, chosen: Sequence[str]) -> bool:
        return all(len(group) - 1 <= self.params.longest for group in self.groups(chosen))

    def damages(self, chosen: Sequence[str], left: Sequence[str]) -> dict[str, float]:
        """Of the prediction with each of `left` beside what is chosen."""
        self.gather([pair for block in left for pair in self.pairs([*chosen, block])])
        self.context.references()  # of the model as it is
        found = {}
        for block in left:
            every = [*chosen, block]

            def measure(every: Sequence[str] = tuple(every)) -> float:
                with text_replaced(self.model, self.modules(every)):
                    return self.context.damage(())

            found[block] = float(self.context.remembered("text", every, measure))
        return found

    def pairs(self, chosen: Sequence[str]) -> list[Pair]:
        """The linears that a choice needs."""
        found: list[Pair] = []
        for anchor, *blocks in self.groups(chosen):
            found += [("attended", anchor, block) for block in blocks] + [("text", anchor, blocks[-1])]
        return found

    def modules(self, chosen: Sequence[str]) -> dict[Group, dict[str, nn.Module]]:
        """Everything that stands in, with fitted linears."""
        self.gather(self.pairs(chosen))
        found = {}
        for run in self.groups(chosen):
            made = stand_ins(self.model, run)
            for path, module in made.items():
                block = next(b for b in run if path.startswith(f"{b}."))
                if isinstance(module, TextInput):
                    module.project.load_state_dict(self.linears["attended", run[0], block].state_dict())
                elif isinstance(module, nn.Linear):
                    module.load_state_dict(self.linears["text", run[0], block].state_dict())
            found[run[0], run[-1]] = made
        return found

    def gather(self, pairs: Sequence[Pair]) -> None:
        """Fit the linears of `pairs` that are not known, some at a time."""
        wanted = [(pair, 16 * (self._linear(pair[2]) + 1)) for pair in dict.fromkeys(pairs) if pair not in self.linears]
        for part in batched(wanted, self.params.hold * 2**20):
            self._fit(part)

    def _fit(self, pairs: Sequence[Pair]) -> None:
        device, even = device_of(self.model), not any(probe.weight for probe in self.context.probes)
        sums = {}
        for pair in pairs:
            width = int(self.model.get_submodule(f"{pair[2]}.attn.add_k_proj").in_features)  # type: ignore[arg-type]
            sums[pair] = Sums.of(width, width, device)
        for probe in self.context.probes:
            with torch.no_grad(), _texts(self.model, {block for pair in pairs for block in pair[1:]}) as seen:
                self.context.predict(probe)
            for kind, anchor, block in pairs:
                for x, y in zip(seen[kind, anchor], seen[kind, block], strict=True):
                    sums[kind, anchor, block].add(x, y - x, 1.0 if even else probe.weight)
        for pair, equations in sums.items():
            weight = self.model.get_parameter(f"{pair[2]}.attn.add_k_proj.weight")
            width = weight.shape[1]
            linear = nn.Linear(width, width, device=weight.device, dtype=weight.dtype)
            equations.fill(linear, self.params.ridge)
            self.linears[pair] = linear.requires_grad_(False)


@contextmanager
def _texts(model: nn.Module, blocks: set[str]) -> Iterator[Mapping[tuple[str, str], list[Tensor]]]:
    """For each block and call inside, the modulated text that attends and the text that leaves it, (tokens, width)."""
    seen: dict[tuple[str, str], list[Tensor]] = {}

    def keep(kind: str, block: str, value: Tensor) -> None:
        seen.setdefault((kind, block), []).append(value.detach().flatten(0, -2))

    def attended(block: str) -> Any:
        return lambda module, args, kwargs: keep("attended", block, kwargs[ATTENDED])

    def left(block: str) -> Any:
        return lambda module, args, output: keep("text", block, output[0])  # known blocks give (text, image)

    handles: list[Any] = []
    for block in blocks:
        module = model.get_submodule(block)
        handles.append(module.get_submodule("attn").register_forward_pre_hook(attended(block), with_kwargs=True))
        handles.append(module.register_forward_hook(left(block)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
