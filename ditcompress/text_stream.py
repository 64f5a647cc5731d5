"""Two-stream blocks whose text side is linear: `quantization_config.text` lists groups as [anchor, last block].

In every block after the anchor up to the last one, the text that attends is P m + m of the anchor's modulated text m;
the text's modulation, norms, feed-forward and attention output are gone, and the text itself passes unchanged. In the
last block it becomes P_e t + t of the text t that left the anchor (PPCL, arXiv 2511.16156, its width stage). The
block's own forward runs as it is: small modules stand where the parts were, at their paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import DitcompressError, printable
from .linear_ffn import standing_in
from .runtime.scheme import WHERE

Group = tuple[str, str]  # the anchor, whose text side stays, and the last block of those after it


@dataclass(frozen=True)
class Parts:
    """Names of a block's text side: the norm before attention, the one before the feed-forward, the feed-forward, and
    the modulation where it is a module beside the norms ("" where the first norm makes it)."""

    norm: str
    second: str
    feed_forward: str
    modulation: str = ""

    @property
    def paths(self) -> list[str]:
        """Everything that goes with the text side, inside the block."""
        found = [self.norm, self.second, self.feed_forward, "attn.to_add_out"]
        return [*found, self.modulation] if self.modulation else found


_CONTEXT = Parts("norm1_context", "norm2_context", "ff_context")
# Classes of diffusers, by name: others have parts of the same names, but modulate outside of them (FLUX.2) or give
# (image, text) where these give (text, image) (HunyuanVideo).
KNOWN = {
    "JointTransformerBlock": _CONTEXT,
    "FluxTransformerBlock": _CONTEXT,
    "QwenImageTransformerBlock": Parts("txt_norm1", "txt_norm2", "txt_mlp", "txt_mod"),
}
ATTENDED = "encoder_hidden_states"  # what the blocks call the modulated text when they call their attention


class Anchor:
    """The modulated text of a group's first block in the current forward pass."""

    value: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Anchor:
        return Anchor()  # a value may be part of a graph, and the next pass gives another

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the anchor's attention."""
        self.value = kwargs[ATTENDED]


class TextInput(nn.Module):
    """In the place of the text's first norm: `project`(m) + m of the anchor's m (batch, tokens, width). Where that norm
    gave the modulation as well, gates follow that leave the text as it is, or let the last block's linear add to it."""

    def __init__(self, width: int, modulates: bool, last: bool, anchor: Anchor, **kind: Any) -> None:
        super().__init__()
        self.project = nn.Linear(width, width, **kind)
        self.anchor, self.modulates, self.last = anchor, modulates, last

    def forward(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = text if self.anchor.value is None else self.anchor.value
        found = self.project(given) + given
        if not self.modulates:
            return found
        none = text.new_zeros(1, 1)
        return found, none, none, none, none + float(self.last)


class Modulation(nn.Module):
    """In the place of a modulation linear: shift, scale and gate of both halves, (1, 6); the last gate is one where the
    block's linear adds to the text."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, embedding: Tensor) -> Tensor:
        values = embedding.new_zeros(1, 6)
        values[:, 5] = float(self.last)
        return values


class Nothing(nn.Module):
    """In the place of a part that is gone: a zero."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.new_zeros(1, 1, 1)


def parts_of(block: nn.Module) -> Parts | None:
    """The text side of a block that changes its text; None for others: single streams, a last block that only reads,
    a side that is linear already."""
    parts, attention = KNOWN.get(type(block).__name__), getattr(block, "attn", None)
    if parts is None or isinstance(getattr(block, parts.norm), TextInput):
        return None
    changes = getattr(block, parts.feed_forward) is not None and hasattr(attention, "add_q_proj")
    return parts if changes else None


def runs(model: nn.Module, blocks: Sequence[str]) -> list[list[str]]:
    """Neighbours among `blocks` that have a text side, in forward order: any but the first of a run may lose it."""
    found: list[list[str]] = []
    before = ""
    for block in blocks:
        owner = block.rpartition(".")[0]
        whole = parts_of(model.get_submodule(block)) is not None
        if whole and found and owner == before:
            found[-1].append(block)
        elif whole:
            found.append([block])
        before = owner if whole else ""
    return [run for run in found if len(run) > 1]


def stand_ins(model: nn.Module, run: Sequence[str]) -> dict[str, nn.Module]:
    """What stands for the text sides of all blocks of `run` but the first, by path; linears mean nothing yet. They are
    where and in the dtype in which the weights are."""
    anchor, found = Anchor(), dict[str, nn.Module]()
    for block in run[1:]:
        parts, weight = parts_of(model.get_submodule(block)), model.get_parameter(f"{block}.attn.add_k_proj.weight")
        assert parts is not None
        width, last = weight.shape[1], block == run[-1]
        kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        found[f"{block}.{parts.norm}"] = TextInput(width, not parts.modulation, last, anchor, **kind)
        found[f"{block}.{parts.second}"] = nn.Identity()
        found[f"{block}.{parts.feed_forward}"] = nn.Linear(width, width, **kind) if last else Nothing()
        found[f"{block}.attn.to_add_out"] = Nothing()
        if parts.modulation:
            found[f"{block}.{parts.modulation}"] = Modulation(last)
    for module in found.values():
        module.requires_grad_(False)
    return found


def bind(model: nn.Module, group: Group, modules: Mapping[str, nn.Module]) -> Any:
    """Let the group's modules see the anchor's text; the handle undoes it."""
    anchor = next(m.anchor for m in modules.values() if isinstance(m, TextInput))
    return model.get_submodule(f"{group[0]}.attn").register_forward_pre_hook(anchor.see, with_kwargs=True)


def apply_text(model: nn.Module, groups: Sequence[Group], modules: Mapping[Group, Mapping[str, nn.Module]]) -> None:
    """Put the modules of each group in their places for good."""
    for group in groups:
        for path, module in modules[group].items():
            model.set_submodule(path, module)
        bind(model, group, modules[group])


@contextmanager
def text_replaced(model: nn.Module, modules: Mapping[Group, Mapping[str, nn.Module]]) -> Iterator[None]:
    """The model with the modules of some groups inside; its own are put back."""
    with standing_in(model, {path: module for inside in modules.values() for path, module in inside.items()}):
        handles = [bind(model, group, inside) for group, inside in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def apply_groups(model: nn.Module, blocks: Sequence[str], groups: Sequence[Sequence[str]]) -> None:
    """Blank text sides as a configuration lists them, on a model of these blocks. E320 for a group that is no stretch
    of two-stream blocks, or meets another."""
    stretches, taken = runs(model, blocks), set[str]()
    for group in groups:
        run = next((r for r in stretches if group[0] in r and group[-1] in r), [])
        run = run[run.index(group[0]) : run.index(group[-1]) + 1] if run else []
        if len(group) != 2 or len(run) < 2 or taken & {*run}:
            what = f"{printable(str(list(group)), 80)} are not the ends of a stretch of two-stream blocks of its own"
            raise DitcompressError("E320", f"{WHERE}.text", what, "prune the original again")
        taken |= {*run}
        pair = (group[0], group[-1])
        apply_text(model, [pair], {pair: stand_ins(model, run)})


def text_paths(model: nn.Module) -> list[str]:
    """Paths of everything that stands for text sides."""
    blocks = [path.rpartition(".")[0] for path, module in model.named_modules() if isinstance(module, TextInput)]
    return [f"{block}.{path}" for block in blocks for path in KNOWN[type(model.get_submodule(block)).__name__].paths]
