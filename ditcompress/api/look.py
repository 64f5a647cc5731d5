"""inspect and export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import bnb
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import output_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..exporters import registry as exporters
from ..loading import meta_model, open_model, plain_model
from ..models import account, adapter_for
from ..ranks import alone
from ..registry import nearest
from ..runtime.blocks import idle_in_blocks
from ..runtime.linear import PackedLinear
from ..runtime.moe import MoEFeedForward, idle_parameters, routed_parts, router_parameters
from ..sharing import copies_of, tied
from .calibration import pick_dtype


def inspect(path: str | Path) -> dict[str, Any]:
    """Architecture, blocks, roles, bytes and bits of a checkpoint, from its headers. The roles cover every tensor."""
    checkpoint, model = open_model(path)
    empty = plain_model(checkpoint.config)
    adapter = adapter_for(checkpoint.config)
    layout = tied(adapter.layout(empty), copies_of(empty))
    blocks: dict[str, int] = {}
    for block in layout.blocks:
        blocks[block.rpartition(".")[0]] = blocks.get(block.rpartition(".")[0], 0) + 1
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    foreign = {name: module for name, module in model.named_modules() if isinstance(module, bnb.DecodedLinear)}
    linears: list[PackedLinear | bnb.DecodedLinear] = [*packed.values(), *foreign.values()]
    weights = sum(int(m.in_features) * int(m.out_features) for m in linears)
    stored = sum(m.stored_bytes for m in packed.values()) + sum(m.stored.bytes for m in foreign.values())
    return {
        "name": Path(path).name,
        "class": checkpoint.class_name,
        "adapter": adapter.__name__.rpartition(".")[2],
        "blocks": blocks,
        "parameters": sum(p.numel() for p in empty.parameters()) + router_parameters(empty),
        "active_parameters": sum(p.numel() for p in empty.parameters())
        + router_parameters(empty)
        - idle_parameters(empty)
        - round(idle_in_blocks(empty)),
        "experts": _experts(empty),
        "bytes": checkpoint.total_bytes,
        "recipe": bnb.recipe_name(checkpoint.config),
        "bits": 8 * stored / weights if weights else None,
        "roles": _roles(checkpoint, empty, layout),
        "kernels": _kernels(packed.values()),
        "layers": [_layer(checkpoint, site, packed.get(site.name), foreign.get(site.name)) for site in layout.sites],
    }


def _kernels(packed: Iterable[PackedLinear]) -> list[dict[str, Any]]:
    """What runs the packed linears, by shape and scheme: the kernel on each kind of device, and how many they are."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for layer in packed:
        shape, done = [layer.out_features, layer.in_features], _done(layer)
        row = rows.setdefault((*shape, done), {"shape": shape, "done": done, **layer.kernels, "layers": 0})
        row["layers"] += 1
    return sorted(rows.values(), key=lambda row: -row["layers"] * row["shape"][0] * row["shape"][1])


def _done(packed: PackedLinear) -> str:
    """What was done to a linear, in words."""
    scheme = packed.scheme
    spec, activation = scheme.weight, scheme.activation
    parts = [f"{spec.format}{spec.params.get('bits', '')} {spec.params.get('layout', '')}".strip()]
    parts.append(f"{activation} input")
    parts += [f"hadamard {scheme.rotate}"] if scheme.rotate else []
    parts += [f"smoothing {scheme.smooth}"] if scheme.smooth != "none" else []
    parts += [f"rank {scheme.rank}"] if scheme.rank else []
    return ", ".join(parts)


def _experts(model: Any) -> dict[str, str]:
    """How every routed part is made, in words, by path."""
    return {
        path: f"{m.active} of {m.count} routed experts{'' if m.shared is None else ', 1 shared'}"
        if isinstance(m, MoEFeedForward)
        else m.extra_repr()
        for path, m in routed_parts(model).items()
    }


def _roles(checkpoint: Checkpoint, empty: Any, layout: Any) -> list[dict[str, Any]]:
    """Parameters and stored bytes by role; the parameters are those of the plain model, to the last one."""
    owner = {entry.name: entry.role for entry in account(empty, layout)}
    sites = {site.name: site.role for site in layout.sites}
    table: dict[str, list[int]] = {}
    total = 0
    for entry in account(empty, layout):
        row = table.setdefault(entry.role, [0, 0, 0])
        row[0] += 1
        row[1] += entry.params
        total += entry.params
    for name, header in checkpoint.tensors.items():
        role = owner.get(name) or sites.get(bnb.owner(name)) or "other"
        table.setdefault(role, [0, 0, 0])[2] += header.stop - header.start
    return [
        {"role": role, "tensors": n, "parameters": p, "share": p / total, "bytes": b, "bits": 8 * b / p if p else 0.0}
        for role, (n, p, b) in sorted(table.items(), key=lambda item: -item[1][1])
    ]


def _layer(
    checkpoint: Checkpoint, site: Any, packed: PackedLinear | None, foreign: bnb.DecodedLinear | None
) -> dict[str, Any]:
    if foreign is not None:
        done = f"{bnb.NAME} {foreign.stored.kind}"
        bits = 8 * foreign.stored.bytes / (site.in_features * site.out_features)
    elif packed is None:
        entry = checkpoint.tensors[f"{site.name}.weight"]
        done, bits = f"kept, {str(entry.dtype).removeprefix('torch.')}", 8.0 * entry.dtype.itemsize
    else:
        done, bits = _done(packed), 8 * packed.stored_bytes / (packed.in_features * packed.out_features)
    return {
        "name": site.name,
        "role": site.role,
        "block": site.block,
        "shape": [site.out_features, site.in_features],
        "bits": bits,
        "done": done,
    }


def export(
    folder: str | Path,
    out: str | Path,
    format: str = "diffusers",
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write a compressed model in another format; facts about what was written. E205 for a model that is not ours."""
    alone("export")
    reporter = reporter or Silent()
    exporter = exporters.get(format)
    checkpoint, _ = open_model(folder)
    if bnb.used(checkpoint.config):
        raise DitcompressError("E205", folder, "is stored by bitsandbytes", "export a result of another recipe")
    if format == "diffusers" and (checkpoint.quantization or {}).get("experts"):
        raise DitcompressError(
            "E205", folder, "has expert layers, which no plain model has", "use --format safetensors"
        )
    if checkpoint.quantization is None:
        raise DitcompressError("E205", folder, "is not compressed", "give the output of `ditcompress quantize`")
    target = Path(out)
    facts = {"format": format, "out": str(out)}
    if dry_run:
        return {**facts, "layers": len(meta_layers(checkpoint)), "written": False}
    if exporter.NEEDS_FOLDER:
        with output_folder(target, overwrite=overwrite, inputs=[Path(folder)]) as partial:
            facts |= exporter.export(checkpoint, partial, pick_dtype(dtype))
        return facts
    target = target if target.suffix == ".safetensors" else target.with_name(target.name + ".safetensors")
    if Path(folder).resolve() in (target.resolve(), *target.resolve().parents):
        raise DitcompressError("E501", target, "is or lies inside the input", "give another --out")
    if target.exists() and not overwrite:
        raise DitcompressError("E501", target, "exists already", "give --overwrite or another --out")
    with output_folder(target.with_name(f".{target.name}.export"), overwrite=True) as partial:
        facts |= exporter.export(checkpoint, partial / target.name, pick_dtype(dtype))
        (partial / target.name).replace(target)
    _remove_folder(target.with_name(f".{target.name}.export"))
    return {**facts, "out": str(target)}


def explain(name: str) -> dict[str, Any]:
    """The docstring and parameters of anything registered, or (for the plural of a kind) everything of that kind.
    E201 for a name that nothing has."""
    from ..evaluation import distribution, external, extractors, layouts, metrics
    from ..formats.base import registry as formats
    from ..mixture import registry as mixtures
    from ..pruning.base import registry as prunings
    from ..pruning.width import registry as widths
    from ..quantization.base import registry as steps

    kinds = {
        "steps": steps, "pruning methods": prunings, "width methods": widths, "expert methods": mixtures,
        "formats": formats, "metrics": metrics.registry, "distributions": distribution.registry,
        "external": external.registry, "extractors": extractors.registry, "layouts": layouts.registry,
        "exporters": exporters,
    }  # fmt: skip
    if name in kinds:
        rows = {n: _first_line(kinds[name].get(n)) for n in kinds[name].names()}
        return {"kind": name, "names": rows}
    asked, name = name, name if any(name in r.names() for r in kinds.values()) else name.replace("-", "_")
    registry = next((r for r in kinds.values() if name in r.names()), None)
    if registry is None:
        known = [*kinds, *(n for r in kinds.values() for n in r.names())]
        raise DitcompressError("E201", asked, "is no step, format, metric or extractor", nearest(asked, known))
    module = registry.get(name)
    params = getattr(module, "Params", None)
    return {
        "name": name,
        "kind": registry.kind,
        "text": (module.__doc__ or "").strip(),
        "parameters": {key: str(f.default) for key, f in params.model_fields.items()} if params else {},
        "about": (params.__doc__ or "").strip() if params else "",
    }


def _first_line(module: Any) -> str:
    return (module.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ")


def _remove_folder(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def meta_layers(checkpoint: Checkpoint) -> list[str]:
    """Names of the packed linears."""
    return [name for name, module in meta_model(checkpoint.config).named_modules() if isinstance(module, PackedLinear)]
