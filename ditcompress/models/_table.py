"""Builder for a family's table of sites and axes; sizes always come from the modules, never from the config.

A family names what it knows (attention, feed-forward, adaLN); `finish` adds every linear that was not named with a
role read from its path, so that no linear is ever without one. Works on meta models and on models whose linears
were replaced, as long as the replacement has `in_features`, `out_features` and `bias`.
"""

from __future__ import annotations

from torch import nn

from ._roles import role_of
from .base import Axis, Fold, Layout, Site


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for what stands in for one (two integer widths and no children)."""
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(width, int) for width in widths) and not any(module.children())


def adaln_fold(path: str, linear: nn.Module, dim: int, *, shift: int, scale: int) -> tuple[Fold, ...]:
    """Folds into an adaLN linear whose rows hold the shift and the scale of x * (1 + scale) + shift.

    `shift` and `scale` are chunk numbers of `dim` rows. Without a bias nothing can absorb the one of (1 + scale), so
    the result is empty.
    """
    if getattr(linear, "bias", None) is None:
        return ()
    shift_rows, scale_rows = (shift * dim, (shift + 1) * dim), (scale * dim, (scale + 1) * dim)
    return (
        Fold(f"{path}.weight", *shift_rows),
        Fold(f"{path}.bias", *shift_rows),
        Fold(f"{path}.weight", *scale_rows),
        Fold(f"{path}.bias", *scale_rows, rule="one_plus"),
    )


def rows_fold(path: str, linear: nn.Module, start: int, stop: int) -> tuple[Fold, ...]:
    """Folds into rows `start:stop` of a linear whose output is used linearly."""
    weight = (Fold(f"{path}.weight", start, stop),)
    return weight if getattr(linear, "bias", None) is None else (*weight, Fold(f"{path}.bias", start, stop))


class Table:
    """Collects sites and axes while a family walks its model; `finish` gives the Layout."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))  # one module may stand in several places
        self.sites: dict[str, Site] = {}
        self.axes: dict[str, Axis] = {}

    def has(self, path: str) -> bool:
        return path in self.modules and is_linear(self.modules[path])

    def rows(self, path: str) -> int:
        return int(self.modules[path].out_features)  # type: ignore[arg-type]

    def columns(self, path: str) -> int:
        return int(self.modules[path].in_features)  # type: ignore[arg-type]

    def axis(
        self, name: str, size: int, unit: str, *, unit_size: int = 1, fold: tuple[Fold, ...] = (), cut: bool = False
    ) -> str:
        self.axes[name] = Axis(name, size, unit, unit_size, fold, cut)
        return name

    def site(
        self, name: str, role: str, reads: tuple[str, ...] = ("",), writes: tuple[str, ...] = ("",), block: str = ""
    ) -> None:
        self.sites[name] = Site(name, role, reads, writes, block, self.columns(name), self.rows(name))

    def adaln_input(self, name: str, norm: str, *, shift: int, scale: int, chunks: int) -> str:
        """Axis of the values right after an adaLN norm, whose linear has `chunks` chunks of rows."""
        linear = f"{norm}.linear"
        dim = self.rows(linear) // chunks
        fold = adaln_fold(linear, self.modules[linear], dim, shift=shift, scale=scale)
        return self.axis(name, dim, "channel", fold=fold)

    def attention(self, path: str, reads: str, block: str, context: str = "", context_added: str = "") -> str:
        """to_q, to_k, to_v and to_out of `path`; the axis of its heads, whose values fold into the V rows.

        `reads`: axis of the input; `context`: axis of the keys' and values' input where it differs (cross-attention);
        `context_added`: axis of the second stream of a joint attention (add_q_proj, add_k_proj, add_v_proj), whose
        tokens attend together with the first: values of both streams mix, so both V writers share one axis, and so
        do both readers.
        """
        width = self.rows(f"{path}.to_v")
        heads: int = self.modules[path].heads  # type: ignore[assignment]
        joint = bool(context_added) and self.has(f"{path}.add_v_proj")
        writers = [f"{path}.to_v"] + ([f"{path}.add_v_proj"] if joint else [])
        fold = tuple(f for v in writers for f in rows_fold(v, self.modules[v], 0, width))
        axis = self.axis(f"{path}.heads", width, "head", unit_size=width // heads, fold=fold, cut=True)
        for leaf in ("to_q", "to_k", "to_v"):
            source = context if context and leaf != "to_q" else reads
            self.site(f"{path}.{leaf}", "qkv", (source,), (axis,), block)
        for leaf in ("add_q_proj", "add_k_proj", "add_v_proj") if joint else ():
            self.site(f"{path}.{leaf}", "qkv", (context_added,), (axis,), block)
        for leaf in ("to_out.0", "to_add_out"):
            if self.has(f"{path}.{leaf}"):
                self.site(f"{path}.{leaf}", "attn_out", (axis,), ("",), block)
        return axis

    def feed_forward(self, path: str, reads: str, block: str) -> str:
        """net.0.proj and net.2 of a diffusers FeedForward; the axis of its neurons.

        Gated ones (GEGLU, SwiGLU) write the axis twice, value rows first: the value is used linearly, so a scale
        folds into it. An activation such as GELU lets no scale through. One linear in the place
        of a feed-forward has no neurons: "".
        """
        if self.is_moe(path):
            return self.experts(path, block)
        if self.has(path):  # linear_ffn.py
            self.site(path, "ffn_in", (reads,), ("",), block)
            return ""
        first, second = f"{path}.net.0.proj", f"{path}.net.2"
        width = self.columns(second)
        copies = self.rows(first) // width
        fold = rows_fold(first, self.modules[first], 0, width) if copies == 2 else ()
        axis = self.axis(f"{path}.neurons", width, "neuron", fold=fold, cut=True)
        self.site(first, "ffn_in", (reads,), (axis,) * copies, block)
        self.site(second, "ffn_out", (axis,), ("",), block)
        return axis

    def is_moe(self, path: str) -> bool:
        """Whether an expert layer (runtime/moe.py) stands at `path`."""
        return f"{path}.router" in self.modules and f"{path}.experts" in self.modules

    def experts(self, path: str, block: str) -> str:
        """The feed-forwards inside an expert layer. All read its input, and the router too, so nothing folds into it:
        one axis where a shared expert sees every token, else an input for each expert."""
        shared = f"{path}.shared"
        count = sum(1 for _ in self.modules[f"{path}.experts"].children())
        reads = ""
        if self.has(f"{shared}.net.0.proj"):
            reads = self.axis(f"{path}.in", self.columns(f"{shared}.net.0.proj"), "channel")
            self.feed_forward(shared, reads, block)
        for index in range(count):
            self.feed_forward(f"{path}.experts.{index}", reads, block)
        return reads

    def two_layers(self, path: str, role: str, block: str = "", reads: str = "") -> None:
        """linear_1, activation, linear_2 (TimestepEmbedding, text projections)."""
        first, second = f"{path}.linear_1", f"{path}.linear_2"
        if not (self.has(first) and self.has(second)):
            return
        axis = self.axis(f"{path}.neurons", self.rows(first), "neuron", cut=True)
        self.site(first, role, (reads,), (axis,), block)
        self.site(second, role, (axis,), ("",), block)

    def add_rest(self, blocks: tuple[str, ...]) -> None:
        """A site with a role read from its path for every linear that has none yet, in the order of the modules."""
        linears = [path for path, module in self.modules.items() if is_linear(module)]
        beside: dict[str, set[str]] = {}
        for path in linears:
            parent, _, leaf = path.rpartition(".")
            beside.setdefault(parent, set()).add(leaf)
        for path in linears:
            if path not in self.sites:
                block = block_of(path, blocks)
                role = role_of(path, block, beside=frozenset(beside[path.rpartition(".")[0]]))
                self.site(path, role, block=block)

    def finish(self, blocks: tuple[str, ...]) -> Layout:
        """The Layout: embeddings first, then the blocks in order, then what follows them."""
        self.add_rest(blocks)
        order = {block: index for index, block in enumerate(blocks)}

        def place(site: Site) -> tuple[int, int]:
            if site.block:
                return 1, order[site.block]
            after = site.role == "head" or site.name.split(".")[0] in ("norm_out", "proj_out_1", "final_layer")
            return (2 if after else 0), 0

        return Layout(tuple(sorted(self.sites.values(), key=place)), dict(self.axes), blocks)


def block_of(path: str, blocks: tuple[str, ...]) -> str:
    """The block that holds the module or tensor `path`, "" outside the blocks."""
    parts = path.split(".")
    known = set(blocks)
    return next((".".join(parts[:n]) for n in range(2, len(parts) + 1) if ".".join(parts[:n]) in known), "")


def listed(model: nn.Module, *lists: str) -> tuple[str, ...]:
    """Paths of the members of the model's block lists, in forward order."""
    return tuple(f"{name}.{index}" for name in lists for index in range(len(getattr(model, name))))
