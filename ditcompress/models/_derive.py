"""The table of sites and axes of any diffusers transformer, derived from its structure.

Block lists are the model's own lists of modules that contain linears. An axis is claimed only where the structure
proves it: sharing an input is safe for statistics when query, key and value are projections of one attention of a
stream with itself; cutting and folding need a class whose arithmetic was read (the sets below). Everything else gets
an input of its own and stays online, which is never wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn

from ._table import Table, block_of, is_linear, rows_fold
from .base import Layout

_QUERY = ("to_q", "to_query", "q_proj", "q_linear")
_KEY = ("to_k", "to_key", "k_proj")
_VALUE = ("to_v", "to_value", "v_proj")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_OUT = ("to_out.0", "to_out", "to_add_out")
_CROSS = re.compile(r"cross|attn2|encoder_attn|adapter|_to_|pooler|resampler", re.IGNORECASE)

# Gate, value and output linear of out(act(gate(x)) * value(x)), as the classes of diffusers name them.
_GATED = (
    ("linear_1", "linear_2", "out_projection"),  # AuraFlow
    ("linear_1", "linear_3", "linear_2"),  # Lumina
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_proj", "up_proj", "linear_fc2"),  # Ernie
    ("gate", "up", "down"),  # Krea
    ("gate_layer", "proj", "out"),  # Qwen-Image 2.1
    ("wi_0", "wi_1", "wo"),  # T5
)
_FEED_FORWARD = ("FeedForward",)
_TWO_LAYERS = {"TimestepEmbedding": "time_embedding", "PixArtAlphaTextProjection": "embedding"}

# Processors that send the values through nothing but the weighted sum over tokens, one head at a time.
_PLAIN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "JointAttnProcessor2_0",
    "AuraFlowAttnProcessor2_0",
    "CogVideoXAttnProcessor2_0",
    "FluxAttnProcessor",
    "QwenDoubleStreamAttnProcessor2_0",
)


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's block lists in forward order: its direct lists of modules that contain a linear.

    A list of bare linears or embeddings is none, nor is one whose members have no linear.
    """

    def holds_linear(module: nn.Module) -> bool:
        return any(is_linear(part) and part is not module for part in module.modules())

    lists = [(name, child) for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
    return tuple(name for name, child in lists if len(child) and all(holds_linear(member) for member in child))


def derive(model: nn.Module) -> Layout:
    """The Layout of any model; every linear is a site."""
    table = Table(model)
    blocks = tuple(f"{name}.{i}" for name in block_lists(model) for i in range(len(getattr(model, name))))
    table.add_rest(blocks)  # first, so that the sites stay in the order of the modules
    children: dict[str, set[str]] = defaultdict(set)
    for path in table.modules:
        if table.has(path):
            parent, _, leaf = path.rpartition(".")
            children[parent].add(leaf)
            grandparent, _, middle = parent.rpartition(".")
            if middle in ("to_out", "net"):
                children[grandparent].add(f"{middle}.{leaf}")
    for path, leaves in children.items():
        block = block_of(path, blocks)
        kind = type(table.modules[path]).__name__
        if kind in _FEED_FORWARD and "net.2" in leaves and table.has(f"{path}.net.0.proj"):
            table.feed_forward(path, "", block)
        elif kind in _TWO_LAYERS:
            table.two_layers(path, _TWO_LAYERS[kind], block)
        _attention(table, path, leaves, block)
        _gated(table, path, leaves, block)
    return table.finish(blocks)


def _pick(leaves: set[str], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in leaves), "")


def _gated(table: Table, path: str, leaves: set[str], block: str) -> None:
    triple = next((names for names in _GATED if leaves.issuperset(names)), None)
    if triple is None:
        return
    gate, value, out = (f"{path}.{leaf}" if path else leaf for leaf in triple)
    width = table.columns(out)
    if not table.rows(gate) == table.rows(value) == width or table.columns(gate) != table.columns(value):
        return
    shared = table.axis(f"{path}.in", table.columns(gate), "channel")
    fold = rows_fold(value, table.modules[value], 0, width)
    neurons = table.axis(f"{path}.neurons", width, "neuron", fold=fold, cut=True)
    table.site(gate, "ffn_in", (shared,), (neurons,), block)
    table.site(value, "ffn_in", (shared,), (neurons,), block)
    table.site(out, "ffn_out", (neurons,), ("",), block)


def _attention(table: Table, path: str, leaves: set[str], block: str) -> None:
    query, key, value = _pick(leaves, _QUERY), _pick(leaves, _KEY), _pick(leaves, _VALUE)
    if not (query and key and value):
        return
    plain = _plain_heads(table, path, query, key, value, leaves)
    heads = ("",) if not plain else (_heads(table, path, leaves, value),)
    own, context = _attention_inputs(table, path, query, key, value)
    for leaf in (query, key, value):
        source = own if leaf == query else context
        table.site(f"{path}.{leaf}", "qkv", (source,), heads, block)
    added = [leaf for leaf in _ADDED if leaf in leaves]
    if added:
        stream = table.axis(f"{path}.added.in", table.columns(f"{path}.{added[0]}"), "channel")
        for leaf in added:
            table.site(f"{path}.{leaf}", "qkv", (stream,), heads, block)
    for leaf in _OUT:
        if leaf in leaves:
            table.site(f"{path}.{leaf}", "attn_out", heads, ("",), block)


def _attention_inputs(table: Table, path: str, query: str, key: str, value: str) -> tuple[str, str]:
    """The axis of the query's input ("" where it has none of its own) and of the keys' and values'."""
    module = table.modules[path]
    widths = {table.columns(f"{path}.{leaf}") for leaf in (query, key, value)}
    crossed = bool(_CROSS.search(path)) or getattr(module, "is_cross_attention", False) is True
    if not crossed and len(widths) == 1:
        shared = table.axis(f"{path}.in", widths.pop(), "channel")
        return shared, shared
    if table.columns(f"{path}.{key}") != table.columns(f"{path}.{value}"):
        return "", ""
    return "", table.axis(f"{path}.context.in", table.columns(f"{path}.{key}"), "channel")


def _plain_heads(table: Table, path: str, query: str, key: str, value: str, leaves: set[str]) -> bool:
    """Whether whole heads can be cut and values scaled: known arithmetic, equal widths, norms within a head."""
    module = table.modules[path]
    if type(getattr(module, "processor", None)).__name__ not in _PLAIN_PROCESSORS:
        return False
    width, heads = table.rows(f"{path}.{value}"), getattr(module, "heads", 0)
    if (query, key, value) != ("to_q", "to_k", "to_v") or not heads or width % heads:
        return False
    if any(leaf not in (*_QUERY, *_KEY, *_VALUE, *_ADDED, *_OUT) for leaf in leaves):
        return False
    writers = [leaf for leaf in (query, key, value, *_ADDED) if leaf in leaves]
    readers = [leaf for leaf in _OUT if leaf in leaves]
    norms = [m for n, m in module.named_children() if "norm" in n]
    inside = all(p.numel() <= width // heads for norm in norms for p in norm.parameters())
    same = all(table.rows(f"{path}.{leaf}") == width for leaf in writers)
    return bool(readers) and same and inside and all(table.columns(f"{path}.{leaf}") == width for leaf in readers)


def _heads(table: Table, path: str, leaves: set[str], value: str) -> str:
    width, heads = table.rows(f"{path}.{value}"), int(table.modules[path].heads)  # type: ignore[arg-type]
    writers = [f"{path}.{leaf}" for leaf in (value, "add_v_proj") if leaf in leaves]
    fold = tuple(f for writer in writers for f in rows_fold(writer, table.modules[writer], 0, width))
    return table.axis(f"{path}.heads", width, "head", unit_size=width // heads, fold=fold, cut=True)
