"""Changes of structure: fold a scale, reorder units, cut units, split a feed-forward into experts, remove blocks.

Each is exact where the axis says so: the writers' rows and the readers' columns change together, at their own
offsets where an axis is one of several that are concatenated. The contract suite holds every family's table to it.

Terms: an axis has `size` channels in units of `unit_size` (a head, a neuron); a unit index counts units, not channels.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .errors import DitcompressError
from .models import Depth, shortened
from .models.base import Axis, Layout, Site


def readers(layout: Layout, axis: str) -> tuple[Site, ...]:
    """The sites with `axis` along their columns."""
    return tuple(site for site in layout.sites if axis in site.reads)


def writers(layout: Layout, axis: str) -> tuple[Site, ...]:
    """The sites with `axis` along their rows."""
    return tuple(site for site in layout.sites if axis in site.writes)


def spans(layout: Layout, names: tuple[str, ...], total: int, axis: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of each place of `axis` in a concatenation `names` of `total` channels; "" takes what is left."""
    known = sum(layout.axes[name].size for name in names if name)
    start = 0
    for name in names:
        size = layout.axes[name].size if name else total - known
        if name == axis:
            yield start, start + size
        start += size


def _axis(layout: Layout, axis: str | Axis) -> Axis:
    return axis if isinstance(axis, Axis) else layout.axes[axis]


def fold_producers(tensors: Mapping[str, Tensor], axis: Axis, s: Tensor) -> dict[str, Tensor]:
    """The weights after the producers of `axis` absorb a division by `s` (size,): readers are left alone.

    Returns a new dict; `tensors` is not modified. The arithmetic is float64, the dtypes stay.
    Raises E205 for an axis that no producer can absorb, KeyError for a tensor that is missing.
    """
    if not axis.fold:
        raise DitcompressError("E205", axis.name, "no producer can absorb a scale", "smooth this input online")
    result = dict(tensors)
    s = s.detach().double()
    for fold in axis.fold:
        tensor = result[fold.tensor]
        changed = tensor.detach().double()
        rows = changed[fold.start : fold.stop]
        scale = s.to(tensor.device).reshape(-1, *[1] * (tensor.ndim - 1))
        rows = (rows + 1) / scale - 1 if fold.rule == "one_plus" else rows / scale
        changed = torch.cat([changed[: fold.start], rows, changed[fold.stop :]])
        result[fold.tensor] = changed.to(tensor.dtype)
    return result


def apply_fold(tensors: Mapping[str, Tensor], axis: str | Axis, layout: Layout, s: Tensor) -> dict[str, Tensor]:
    """The weights after the channels of `axis` are divided by `s` (size,) and every reader's columns multiplied by it.

    `tensors`: name -> tensor with at least every fold tensor and every reader's weight. Returns a new dict; the
    tensors of `tensors` are not modified. The arithmetic is float64, the dtypes stay.
    Raises E205 for an axis that no producer can absorb, KeyError for a tensor that is missing.
    """
    axis = _axis(layout, axis)
    result = fold_producers(tensors, axis, s)
    s = s.detach().double()
    for site in readers(layout, axis.name):
        name = f"{site.name}.weight"
        weight = result[name]
        columns = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        for start, stop in spans(layout, site.reads, weight.shape[1], axis.name):
            columns[start:stop] = s.to(weight.device)
        result[name] = (weight.detach().double() * columns).to(weight.dtype)
    return result


def unit_channels(axis: Axis, units: Sequence[int]) -> Tensor:
    """Channel indices of `units` in their order."""
    first = torch.as_tensor(list(units), dtype=torch.long) * axis.unit_size
    return (first[:, None] + torch.arange(axis.unit_size)).flatten()


def _selection(layout: Layout, names: tuple[str, ...], total: int, axis: Axis, kept: Tensor) -> Tensor:
    """Indices into a concatenation in which every place of `axis` is replaced by its channels `kept`."""
    parts, end = [], 0
    for start, stop in spans(layout, names, total, axis.name):
        parts += [torch.arange(end, start), start + kept]
        end = stop
    return torch.cat([*parts, torch.arange(end, total)])


def _select(linear: nn.Linear, dim: int, index: Tensor) -> None:
    """Keep rows (`dim` 0, and the bias) or columns (`dim` 1) `index` of `linear`, in that order, in place."""
    index = index.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, index), linear.weight.requires_grad)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, index), linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _linear(model: nn.Module, site: Site) -> nn.Linear:
    module = model.get_submodule(site.name)
    if not isinstance(module, nn.Linear):
        what = f"is {type(module).__name__}, expected an unpacked linear"
        raise DitcompressError("E205", site.name, what, "change the structure before quantizing")
    return module


def _take(model: nn.Module, axis: Axis, layout: Layout, units: Sequence[int]) -> None:
    """Rebuild every site of `axis` with `units`, in that order."""
    kept = unit_channels(axis, units)
    for site in writers(layout, axis.name):
        linear = _linear(model, site)
        _select(linear, 0, _selection(layout, site.writes, linear.out_features, axis, kept))
    for site in readers(layout, axis.name):
        linear = _linear(model, site)
        _select(linear, 1, _selection(layout, site.reads, linear.in_features, axis, kept))


def _check_units(axis: Axis, units: Sequence[int], *, every: bool) -> None:
    count = axis.size // axis.unit_size
    if not axis.cut:
        raise DitcompressError("E205", axis.name, "its units cannot be changed one by one", "choose another axis")
    if len(set(units)) != len(units) or any(not 0 <= unit < count for unit in units):
        raise ValueError(f"{axis.name}: unit indices must differ and lie in 0..{count - 1}")
    if every and len(units) != count:
        raise ValueError(f"{axis.name}: expected all {count} units, got {len(units)}")


def permute_units(model: nn.Module, axis: str | Axis, layout: Layout, order: Sequence[int]) -> None:
    """Reorder the units of `axis` in place: unit `order[i]` moves to place i. The model's output stays the same."""
    axis = _axis(layout, axis)
    _check_units(axis, order, every=True)
    _take(model, axis, layout, order)


def cut_units(model: nn.Module, axis: str | Axis, layout: Layout, units: Sequence[int]) -> None:
    """Remove `units` from every site of `axis` in place; the linears really become smaller.

    The attention's head counts and the widths that diffusers keeps as attributes follow. `layout` describes the
    model before the cut; compute it anew afterwards. Raises E205 for an axis that cannot be cut, or cut to nothing.
    """
    axis = _axis(layout, axis)
    _check_units(axis, units, every=False)
    removed = set(units)
    kept = [unit for unit in range(axis.size // axis.unit_size) if unit not in removed]
    if not kept:
        raise _nothing_left(axis.name)
    _take(model, axis, layout, kept)
    _update_widths(model, axis, layout, len(kept))


def _nothing_left(axis: str) -> DitcompressError:
    return DitcompressError("E205", axis, "every unit would be removed", "keep at least one, or drop the block")


def _update_widths(model: nn.Module, axis: Axis, layout: Layout, count: int) -> None:
    """Bring the attributes that `forward` or diffusers' own tools read in line with the cut linears."""
    width = count * axis.unit_size
    owners = {site.name.rpartition(".")[0] for site in writers(layout, axis.name)}
    for owner in (model.get_submodule(path) for path in sorted(owners)):
        if axis.unit == "head":
            new = {"heads": count, "sliceable_head_dim": count, "inner_dim": width, "inner_kv_dim": width}
        else:
            new = {"mlp_hidden_dim": width}
        for name, value in new.items():
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, value)
    for site in readers(layout, axis.name):
        module = model.get_submodule(site.name)
        if hasattr(module, "_tp_packed_row_blocks"):  # tensor parallelism splits concatenated columns by it
            sizes = [width if name == axis.name else layout.axes[name].size for name in site.reads]
            module._tp_packed_row_blocks = sizes  # type: ignore[assignment]


def narrow_index(layout: Layout, kept: Mapping[str, Sequence[int]]) -> Iterator[tuple[Site, int, Tensor]]:
    """(site, dimension, indices to keep) for every linear that an axis of `kept` (name -> units) reaches: dimension 0
    are its rows and bias, 1 its columns. Several axes of one concatenation are cut together."""
    channels = {name: unit_channels(layout.axes[name], units) for name, units in kept.items()}
    for site in layout.sites:
        for dim, names, total in ((0, site.writes, site.out_features), (1, site.reads, site.in_features)):
            if not set(names) & set(channels):
                continue
            parts, start = [], 0
            known = sum(layout.axes[name].size for name in names if name)
            for name in names:
                size = layout.axes[name].size if name else total - known
                inside = channels[name] if name in channels else torch.arange(size)
                parts.append(start + inside)
                start += size
            yield site, dim, torch.cat(parts)


def narrow(model: nn.Module, layout: Layout, kept: Mapping[str, Sequence[int]]) -> None:
    """Keep only the units `kept` of each named axis, in place, as `cut_units` does for one axis. Works on meta models.

    Raises E205 for an axis that cannot be cut, or cut to nothing, KeyError for one that is not there.
    """
    for name, units in kept.items():
        if not units:
            raise _nothing_left(name)
        _check_units(layout.axes[name], units, every=False)
    for site, dim, index in narrow_index(layout, kept):
        _select(_linear(model, site), dim, index)
    axes = dict(layout.axes)
    for name, units in kept.items():
        axes[name] = replace(axes[name], size=len(units) * axes[name].unit_size)
    after = replace(layout, axes=axes)
    for name, units in kept.items():
        _update_widths(model, axes[name], after, len(units))


class SplitFeedForward(nn.Module):
    """Experts that all fire: their sum and one shared bias are the dense feed-forward.

    `bias` (features,) or None. The call takes what the dense module took.
    """

    def __init__(self, experts: Sequence[nn.Module], bias: Tensor | None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        total: Tensor = sum(expert(hidden) for expert in self.experts)  # type: ignore[assignment]
        return total if self.bias is None else total + self.bias


def _common_module(model: nn.Module, names: set[str]) -> str:
    """Path of the innermost module that holds all of `names` and can be called (a ModuleList cannot)."""
    parts = [name.split(".") for name in sorted(names)]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == parts[0][shared] for path in parts):
        shared += 1
    while shared and isinstance(model.get_submodule(".".join(parts[0][:shared])), (nn.ModuleList, nn.ModuleDict)):
        shared -= 1
    return ".".join(parts[0][:shared])


def feed_forward_path(model: nn.Module, axis: str | Axis, layout: Layout) -> str:
    """Path of the module that holds all sites of a neuron axis and nothing else.

    Raises E205 where there is none, as in a single block of FLUX, whose output linear also reads the attention.
    """
    axis = _axis(layout, axis)
    into, out = writers(layout, axis.name), readers(layout, axis.name)
    names = {site.name for site in (*into, *out)}
    owner = _common_module(model, names)
    inside = {site.name for site in layout.sites if site.name.startswith(f"{owner}.")}
    alone = len(out) == 1 and out[0].reads == (axis.name,)
    if axis.unit != "neuron" or inside != names or not alone:
        remedy = "split a feed-forward that is a module of its own"
        raise DitcompressError("E205", axis.name, "is not the hidden layer of a module of its own", remedy)
    return owner


def split_ffn(
    model: nn.Module, axis: str | Axis, layout: Layout, partition: Sequence[Sequence[int]]
) -> SplitFeedForward:
    """The feed-forward of `axis` as one expert per group of `partition`, whose groups hold every neuron once.

    Returns the new module and leaves the model as it is; `feed_forward_path` tells where to put it.
    """
    return SplitFeedForward(*expert_modules(model, axis, layout, partition))


def expert_modules(
    model: nn.Module, axis: str | Axis, layout: Layout, partition: Sequence[Sequence[int]], *, overlap: bool = False
) -> tuple[list[nn.Module], Tensor | None]:
    """One narrow copy of the feed-forward of `axis` per group of `partition`, without its output bias (features,),
    which comes beside them. Their sum and the bias are the dense module, unless groups `overlap`; the model is left as
    it is."""
    axis = _axis(layout, axis)
    path = feed_forward_path(model, axis, layout)
    for units in partition if overlap else [[unit for group in partition for unit in group]]:
        _check_units(axis, units, every=not overlap)
    dense = model.get_submodule(path)
    (reader,) = readers(layout, axis.name)
    inner = reader.name[len(path) + 1 :]
    bias = getattr(dense.get_submodule(inner), "bias", None)
    experts = []
    for group in partition:
        expert = copy.deepcopy(dense)
        expert.get_submodule(inner).bias = None  # type: ignore[assignment]
        _take(_Rooted(expert, path), axis, layout, group)
        experts.append(expert)
    return experts, None if bias is None else bias.detach().clone()


class _Rooted(nn.Module):
    """Lets the table's paths, which start at the model, find the parts of one detached module at `path`."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        self.module, self.path = module, path

    def get_submodule(self, target: str) -> nn.Module:
        return self.module.get_submodule(target[len(self.path) + 1 :])


# --- whole blocks ----------------------------------------------------------------------------------------------------


@contextmanager
def without_blocks(model: nn.Module, depth: Depth, removed: Collection[str]) -> Iterator[nn.Module]:
    """The running model as it is without the blocks `removed`: its lists and its configuration are exchanged inside and
    put back afterwards; no weight is copied."""
    config = dict(model.config)  # type: ignore[arg-type]
    named = {**config, "_class_name": config.get("_class_name") or type(model).__name__}
    shorter = shortened(named, depth, removed)
    changed = {key: value for key, value in shorter.items() if key in config and config[key] != value}
    lists = {owner: getattr(model, owner) for owner in depth.lists}
    gone = set(removed)
    try:
        for owner, blocks in lists.items():
            kept = [block for number, block in enumerate(blocks) if f"{owner}.{number}" not in gone]
            setattr(model, owner, nn.ModuleList(kept))
        model.register_to_config(**changed)  # type: ignore[operator]
        yield model
    finally:
        for owner, blocks in lists.items():
            setattr(model, owner, blocks)
        model.register_to_config(**{key: config[key] for key in changed})  # type: ignore[operator]


def remove_blocks(model: nn.Module, depth: Depth, removed: Collection[str]) -> nn.Module:
    """A copy of `model` without the blocks `removed`, renumbered; `model` is not changed."""
    with without_blocks(model, depth, removed):
        return copy.deepcopy(model)
