"""What a plan does differently from what its recipe says, in words."""

from __future__ import annotations

from ..models.base import Layout, Site
from ..plan import Plan
from ..recipe import Recipe


def fallbacks(recipe: Recipe, plan: Plan, layout: Layout) -> list[str]:
    """One line for each kind of fallback that the plan takes: groups that do not divide a width, transforms in blocks,
    ranks above a width."""
    widths = {site.name: (site.in_features, site.out_features) for site in layout.sites}
    short: dict[tuple[int, int], int] = {}
    blocks: dict[tuple[int, int], int] = {}
    for layer in plan.layers:
        width = widths[layer.site][0]
        group = int(layer.weight.params.get("group", 0)) if layer.weight.params.get("layout") == "group" else 0
        for size in {group, layer.activation.group} - {0}:
            if width % size:
                short[(size, width)] = short.get((size, width), 0) + 1
        if layer.rotate and layer.rotate != width:
            blocks[(layer.rotate, width)] = blocks.get((layer.rotate, width), 0) + 1
    asked = max((rule.rank for rule in recipe.rules), default=0)
    least = min((min(widths[layer.site]) for layer in plan.layers if layer.rank), default=asked)
    return [
        *(f"group {g} does not divide width {w} ({n} linears): the last group of a row is shorter"
          for (g, w), n in sorted(short.items())),
        *(f"width {w} is transformed in blocks of {b} ({n} linears)" for (b, w), n in sorted(blocks.items())),
        *([f"rank {asked} is above width {least}: the width is used there"] if asked > least else []),
    ]  # fmt: skip


def unfolded(plan: Plan, whole: Layout, layout: Layout) -> list[str]:
    """A line where linears that stand in several places cannot fold their smoothing, which each place has producers of
    its own for: `layout` is that of what is stored, `whole` that of all places."""
    by_site, before = layout.by_name(), whole.by_name()
    kept = [
        layer.site
        for layer in plan.layers
        if layer.smooth == "fold" and _folds(before[layer.site], whole) and not _folds(by_site[layer.site], layout)
    ]
    what = f"{len(kept)} shared linears smooth their inputs at run time: each place has its own producer"
    return [what] if kept else []


def _folds(site: Site, layout: Layout) -> bool:
    return bool(site.reads[0]) and bool(layout.axes[site.reads[0]].fold)
