"""Which blocks of a model can go, and the configuration of what is left.

Read from the class, not from a table: the configuration's integers that count blocks are found by building the model
with one less, and a block may go when the shorter model that stock diffusers builds has, block for block, the tensors
and settings of the blocks that stay. What a class does by block *number* in its `forward` no shape shows; those few
classes are named below.

Terms: a *unit* is what goes together: one block, or several where one integer counts two lists or a long skip joins
two blocks. Units are named after their first block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import DitcompressError
from ._config import build_meta, class_of, with_defaults
from .base import Layout

# Lists of block numbers, and lists with one entry a block, among the keys of diffusers' configurations.
INDEX_KEYS = ("dual_attention_layers", "vace_layers")
PER_BLOCK_KEYS = ("capacity_factors", "layer_types")

_NUMBERED = {
    "AceStepTransformer1DModel": "its attention windows alternate by block number",
    "BriaFiboTransformer2DModel": "every block has a caption projection of its own number",
    "BriaFibo2Transformer2DModel": "captions enter at fixed block numbers",
    "ChromaTransformer2DModel": "one network makes all modulations by block number",
    "ConsisIDTransformer3DModel": "face features enter at fixed block numbers",
    "HiDreamImageTransformer2DModel": "every block has a caption projection of its own number",
    "MotifVideoTransformer3DModel": "its last blocks have another part by their number",
    "WanAnimateTransformer3DModel": "face features enter at fixed block numbers",
    "WanAnimate2Transformer3DModel": "features enter at fixed block numbers",
}
_FIRST_STAYS = {
    "DiTTransformer2DModel": "the head is modulated from the first block's embedding",
    "LatteTransformer3DModel": "positions are added inside the first pair",
}
_LONG_SKIPS = ("HunyuanDiT2DModel",)  # block i feeds block n - 1 - i
_COUNTS = re.compile(r"layer|depth|block")
_NO_SETTING = ("training", "layer_id", "layer_idx", "layer_index", "block_idx", "idx")


@dataclass(frozen=True)
class Unit:
    """Blocks that go together, named after the first."""

    blocks: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.blocks[0]


@dataclass(frozen=True)
class Depth:
    """`units` that may go, in forward order; `fixed`: every other block and why it stays; `keys`: the configuration's
    integer of each list; `lists`: the number of blocks in each."""

    units: tuple[Unit, ...]
    fixed: Mapping[str, str]
    keys: Mapping[str, str]
    lists: Mapping[str, int] = field(default_factory=dict)

    def of(self, names: Collection[str]) -> tuple[str, ...]:
        """The blocks of the named units, in forward order."""
        return tuple(block for unit in self.units if unit.name in names for block in unit.blocks)


def _place(block: str) -> tuple[str, int]:
    owner, _, number = block.rpartition(".")
    return owner, int(number)


def _lists(layout: Layout) -> dict[str, int]:
    lists: dict[str, int] = {}
    for block in layout.blocks:
        lists[_place(block)[0]] = lists.get(_place(block)[0], 0) + 1
    return lists


def settings(block: nn.Module) -> tuple[Any, ...]:
    """What a block is apart from its values: names and shapes of tensors, classes and plain attributes of its parts."""
    tensors = [(name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()]
    plain = [
        (path, type(part).__name__, key, value)
        for path, part in block.named_modules()
        for key, value in sorted(vars(part).items())
        if key[0] != "_" and key not in _NO_SETTING and isinstance(value, (bool, int, float, str, tuple, type(None)))
    ]
    return (type(block).__name__, tuple(tensors), tuple(map(repr, plain)))


def _rest(model: nn.Module, lists: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors outside the lists."""
    prefixes = tuple(f"{name}." for name in lists)
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(prefixes)}


def _built(config: Mapping[str, Any]) -> nn.Module | None:
    try:
        return build_meta(config)
    except DitcompressError:
        return None


def _counters(config: Mapping[str, Any], lists: Mapping[str, int], model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The lists that each counting integer shortens by one; only integers that change nothing else."""
    full, found = with_defaults(config), {}
    for key, value in sorted(full.items()):
        if type(value) is not int or value < 2 or value not in lists.values() or not _COUNTS.search(key):
            continue
        fewer = _built({**config, key: value - 1})
        if fewer is None:
            continue
        change = {name: size - len(getattr(fewer, name)) for name, size in lists.items()}
        moved = tuple(name for name, by in change.items() if by)
        alike = all(change[name] == 1 and lists[name] == value for name in moved)
        if moved and alike and _rest(fewer, lists) == _rest(model, lists):
            found[key] = moved
    return found


def depth_of(config: Mapping[str, Any], layout: Layout) -> Depth:
    """The units of a model and what fixes the other blocks; builds models without data only."""
    name, lists = class_of(config), _lists(layout)
    if name in _NUMBERED:
        return Depth((), dict.fromkeys(layout.blocks, _NUMBERED[name]), {}, lists)
    model = build_meta(config)
    counters = _counters(config, lists, model)
    keys = {owner: key for key, owners in counters.items() for owner in owners}
    uncounted = "no setting of the configuration counts its list alone"
    fixed = {block: uncounted for block in layout.blocks if _place(block)[0] not in keys}
    known = {block: settings(model.get_submodule(block)) for block in layout.blocks}
    units, cache = [], dict[str, nn.Module | None]()
    for unit in _candidates(name, counters, lists):
        why = _reason(unit, name, config, Depth((), {}, keys, lists), known, cache)
        if why:
            fixed |= dict.fromkeys(unit.blocks, why)
        else:
            units.append(unit)
    order = {block: number for number, block in enumerate(layout.blocks)}
    paired = {block for unit in units for block in unit.blocks}
    fixed |= {b: "is the middle of the long skips" for b in layout.blocks if b not in paired and b not in fixed}
    return Depth(tuple(sorted(units, key=lambda unit: order[unit.name])), fixed, keys, lists)


def _candidates(name: str, counters: Mapping[str, tuple[str, ...]], lists: Mapping[str, int]) -> Iterator[Unit]:
    for owners in counters.values():
        count = lists[owners[0]]
        if name in _LONG_SKIPS:
            pairs = range(count // 2 - 1)
            yield from (Unit(tuple(f"{o}.{i}" for o in owners for i in (n, count - 1 - n))) for n in pairs)
        else:
            yield from (Unit(tuple(f"{owner}.{n}" for owner in owners)) for n in range(count))


def _reason(
    unit: Unit,
    name: str,
    config: Mapping[str, Any],
    depth: Depth,
    known: Mapping[str, tuple[Any, ...]],
    cache: dict[str, nn.Module | None],
) -> str:
    """Why a unit has to stay; "" where it may go."""
    if any(_place(block)[1] == 0 for block in unit.blocks) and name in _FIRST_STAYS:
        return _FIRST_STAYS[name]
    shorter = shortened(config, depth, unit.blocks)
    key = json.dumps(shorter, sort_keys=True, default=str)
    if key not in cache:
        cache[key] = _built(shorter)
    model = cache[key]
    if model is None:
        return "the configuration allows no such model"
    left = {owner: count - sum(_place(b)[0] == owner for b in unit.blocks) for owner, count in depth.lists.items()}
    if any(len(getattr(model, owner)) != count for owner, count in left.items()):
        return "another list of blocks refers to it by number"
    places = renumbered(depth, unit.blocks).items()
    if any(settings(model.get_submodule(new)) != known[old] for old, new in places):
        return "stock diffusers builds the last block, or blocks of its number, otherwise"
    return ""


def renumbered(depth: Depth, removed: Collection[str]) -> dict[str, str]:
    """Old to new path of every block that stays."""
    gone = set(removed)
    result: dict[str, str] = {}
    for owner, count in depth.lists.items():
        kept = [number for number in range(count) if f"{owner}.{number}" not in gone]
        result |= {f"{owner}.{old}": f"{owner}.{new}" for new, old in enumerate(kept)}
    return result


def shortened(config: Mapping[str, Any], depth: Depth, removed: Collection[str]) -> dict[str, Any]:
    """`config` without the blocks `removed`: counts lowered, tables of block numbers renumbered."""
    gone = {owner: sorted(n for o, n in map(_place, removed) if o == owner) for owner in depth.lists}
    result = dict(config)
    for owner, key in depth.keys.items():
        result[key] = depth.lists[owner] - len(gone[owner])
    main = max(depth.keys, key=lambda owner: depth.lists[owner], default="")
    kept = [n for n in range(depth.lists.get(main, 0)) if n not in gone[main]]
    full = with_defaults(config)
    for key in INDEX_KEYS:
        if isinstance(full.get(key), (list, tuple)):
            result[key] = type(full[key])(kept.index(n) for n in full[key] if n in kept)
    for key in PER_BLOCK_KEYS:
        if isinstance(full.get(key), (list, tuple)) and len(full[key]) == depth.lists.get(main):
            result[key] = type(full[key])(full[key][n] for n in kept)
    if not removed:
        return dict(config)
    return result


def renamed(name: str, new_paths: Mapping[str, str]) -> str:
    """The new name of a tensor or module, given what `renumbered` found."""
    parts = name.split(".")
    for length in range(2, len(parts)):
        owner = ".".join(parts[:length])
        if owner in new_paths:
            return ".".join([new_paths[owner], *parts[length:]])
    return name
