"""bitsandbytes: its NF4, FP4 (QLoRA, Dettmers et al. 2023) and LLM.int8() (Dettmers et al. 2022) as it stores them.

bitsandbytes quantizes; what it gives is stored under the names that stock diffusers reads back, and decoded again here
in plain torch, so that `inspect` and `evaluate` need no GPU. 4-bit weights are cut into blocks of the *flattened*
matrix, first code in the high half of a byte. The CPU kernel of bitsandbytes 0.50 reads them as if every row began a
new block, which is wrong wherever the block does not divide the columns (0.24 relative error for 160 columns where 0.09
is right); flattened it reads them right. `encode` therefore checks both the stored bytes and the library's reading.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.reader import Checkpoint
from .console import Reporter
from .errors import DitcompressError, some
from .formats import nf4
from .measures import sqnr_db

NAME = "bitsandbytes"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# the values of codes 0 to 15, in units of the block's largest magnitude (bitsandbytes.functional.get_4bit_type)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
TABLES = {"nf4": nf4.TABLE, "fp4": (*(v / 12 for v in _FP4), *(-v / 12 for v in _FP4))}
_STATE = "weight.quant_state.bitsandbytes__"
_SLACK = 1.25  # how much worse than the oracle a round trip may be; double quantization costs some percent
_COPY = "quantize the original again"


@dataclass(frozen=True)
class Stored:
    """One linear as it lies in a checkpoint: nf4, fp4 or int8, the bytes of everything stored in place of its weight,
    and from which magnitude int8 leaves an input column in floating point (0: none)."""

    kind: str
    bytes: int
    threshold: float = 0.0


class DecodedLinear(nn.Linear):
    """A linear whose weight was decoded from `stored`; it computes in floating point what bitsandbytes computes."""

    stored: Stored

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(int8_input(x, self.stored.threshold) if self.stored.kind == "int8" else x)


def int8_input(x: Tensor, threshold: float) -> Tensor:
    """The input (..., K) of LLM.int8() after rounding: int8 with one scale a row; columns in which any row reaches the
    threshold stay as they are (`int8_vectorwise_quant` and `int8_mixed_scaled_mm` of bitsandbytes)."""
    rows = x.reshape(-1, x.shape[-1])
    large = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    scale = rows.masked_fill(large, 0).abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    rounded = torch.round(rows / scale) * scale
    return torch.where(large.any(0), rows, rounded).reshape(x.shape)


def used(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json says that bitsandbytes quantized it."""
    fields = config.get("quantization_config")
    return isinstance(fields, Mapping) and fields.get("quant_method") == NAME


def recipe_name(config: Mapping[str, Any]) -> str:
    """The recipe in a model's config.json, "bitsandbytes nf4" where it is not ours, "" for a model as it was."""
    fields: Any = config.get("quantization_config") or {}
    if not used(config):
        return str(fields.get("recipe", ""))
    return f"{NAME} {'int8' if fields.get('load_in_8bit') else fields.get('bnb_4bit_quant_type', 'fp4')}"


# --- which linears ---------------------------------------------------------------------------------------------------


def _skips(key: str, name: str) -> bool:
    """diffusers' rule (`_replace_with_bnb_linear`): a skipped `key` keeps the linear `name` as it is."""
    return key in (name, name.rpartition(".")[2]) or f"{key}." in name


def split(model: nn.Module, planned: Iterable[str]) -> tuple[list[str], list[str]]:
    """The linears that can be quantized, and the names to skip that leave diffusers no other choice.

    A class's `_keep_in_fp32_modules` are never quantized. diffusers compares a skipped name with the last part of every
    name too, so a head `proj_out` cannot be skipped where blocks have a quantized `proj_out`: it is quantized as well.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = [kept] if isinstance(kept, str) else list(kept)
    wanted = {name for name in planned if not any(_skips(key, name) for key in kept)}
    while True:
        rest = [name for name in linears if name not in wanted and not any(_skips(key, name) for key in kept)]
        forced = {name for name in rest if any(_skips(name, other) for other in wanted)}
        if not forced:
            return [name for name in linears if name in wanted], rest
        wanted |= forced


def config_of(params: Mapping[str, Any], skip: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, with every key of diffusers' BitsAndBytesConfig."""
    kind = params["quant_type"]
    return {
        "quant_method": NAME,
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": "fp4" if kind == "int8" else kind,
        "bnb_4bit_use_double_quant": bool(params.get("double_quant", False)),
        "bnb_4bit_compute_dtype": params.get("compute_dtype", "float32"),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": float(params.get("threshold", 6.0)),
        "llm_int8_skip_modules": list(skip),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


# --- encoding --------------------------------------------------------------------------------------------------------


def library() -> Any:
    """`bitsandbytes.functional`, imported without its chatter; E204 where it cannot be."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import bitsandbytes.functional as functional
    except (ImportError, OSError, RuntimeError) as error:
        raise DitcompressError("E204", NAME, f"cannot be imported ({error})", "pip install bitsandbytes") from None
    finally:
        logging.disable(before)
    return functional


def encode(site: str, weight: Tensor, params: Mapping[str, Any]) -> tuple[dict[str, Tensor], float, bool]:
    """What bitsandbytes stores of a weight (N, K) under names after `site.`, the SQNR in dB of what that decodes to,
    and whether the library's own reading on this CPU is right. E702 where the round trip is worse than it must be."""
    weight = weight.float().contiguous()
    functional, kind = library(), params["quant_type"]
    if kind == "int8":
        codes, scale, _ = functional.int8_vectorwise_quant(weight)
        tensors = {"weight": codes, "SCB": scale.float()}
        decoded = decode(site, tensors, weight.shape)
        again = functional.int8_vectorwise_dequant(codes, scale).float()
        right = torch.allclose(again, decoded, rtol=1e-5, atol=0)
    else:
        codes, state = functional.quantize_4bit(
            weight, blocksize=params["blocksize"], quant_type=kind, compress_statistics=params["double_quant"]
        )
        state.dtype = getattr(torch, params["compute_dtype"])
        tensors = {"weight": codes, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
        decoded = decode(site, tensors, weight.shape)
        state.dtype = torch.float32
        right = _same(functional.dequantize_4bit(codes, state), decoded)
        state.shape = torch.Size([weight.numel()])
        if not _same(functional.dequantize_4bit(codes, state), decoded):
            raise _unsound(site, "bitsandbytes does not read back what it stored")
    _check(site, weight, decoded, params)
    return tensors, sqnr_db(weight, decoded), right


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.float().flatten(), expected.flatten(), rtol=1e-5, atol=1e-30)


def _unsound(site: str, what: str) -> DitcompressError:
    return DitcompressError("E702", f"{site}.weight", what, "keep this layer, or choose another bitsandbytes release")


def _check(site: str, weight: Tensor, decoded: Tensor, params: Mapping[str, Any]) -> None:
    """E702 when the stored bytes decode to something worse than our own rounding to the same values gives."""
    found, best = (_error(weight, value) for value in (decoded, oracle(weight, params)))
    if not found <= _SLACK * best + 1e-6:  # also for NaN
        raise _unsound(site, f"comes back with relative error {found:.3g}, its format gives {best:.3g}")


def _error(weight: Tensor, value: Tensor) -> float:
    return float((value - weight).norm() / weight.norm().clamp_min(1e-30))


def oracle(weight: Tensor, params: Mapping[str, Any]) -> Tensor:
    """`weight` (N, K) rounded by ourselves to the nearest values of its format, with unrounded scales."""
    kind = params["quant_type"]
    if kind == "int8":
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        return torch.round(weight / scale) * scale
    size = params["blocksize"]
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % size)).reshape(-1, size)
    if kind == "nf4":
        own = nf4.Params(block=size)
        grid = nf4.fit(blocks, own)
        rounded = nf4.value(nf4.code(blocks, grid, own), grid, own)
    else:
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30)
        values = torch.tensor(sorted(set(TABLES[kind])))
        rounded = values[torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2)] * scale
    return rounded.flatten()[: weight.numel()].reshape(weight.shape)


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(site: str, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The float32 weight of `shape` from the tensors stored under `site.`; E323 where they do not belong together."""
    if "SCB" in tensors:
        return tensors["weight"].float() * (tensors["SCB"].float() / 127).unsqueeze(1)
    (key,) = (name for name in tensors if name.startswith(_STATE))
    state = _state(site, tensors[key])
    absmax = tensors["weight.absmax"]
    count, size = math.prod(shape), int(state["blocksize"])
    if "nested_offset" in state:
        nested = _blockwise(tensors, absmax, int(state["nested_blocksize"]))
        absmax = nested + float(state["nested_offset"])
    packed = tensors["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
    if len(codes) != count or len(absmax) != -(-count // size) or list(state["shape"]) != list(shape):
        raise DitcompressError("E323", f"{site}.weight", "its sizes do not belong together", _COPY)
    values = tensors["weight.quant_map"].float()[codes]
    return (values * absmax.float().repeat_interleave(size)[:count]).reshape(tuple(shape))


def _blockwise(tensors: Mapping[str, Tensor], codes: Tensor, size: int) -> Tensor:
    """The scales of a doubly quantized weight, before their mean is added."""
    values = tensors["weight.nested_quant_map"].float()[codes.long()]
    return values * tensors["weight.nested_absmax"].float().repeat_interleave(size)[: len(codes)]


def _state(site: str, packed: Tensor) -> dict[str, Any]:
    """The numbers that bitsandbytes keeps as JSON in a tensor of bytes; E323 where they are none that it writes."""
    try:
        state = json.loads(bytes(packed.numpy()).decode())
        sound = state["blocksize"] in BLOCKS and isinstance(state["shape"], list)
        if "nested_offset" in state:
            sound = (
                sound and math.isfinite(float(state["nested_offset"])) and 0 < int(state["nested_blocksize"]) < 2**20
            )
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise DitcompressError("E323", f"{site}.{_STATE}", "is not a state of bitsandbytes", _COPY)
    return state


# --- checkpoints -----------------------------------------------------------------------------------------------------


def layers(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every linear that bitsandbytes stores, by name, from the headers alone; empty for other checkpoints."""
    if not used(checkpoint.config):
        return {}
    kinds: dict[str, str] = {}
    for name in checkpoint.tensors:
        site, found, kind = name.partition(f".{_STATE}")
        if found:
            kinds[site] = kind
        elif name.endswith(".SCB"):
            kinds[name.removesuffix(".SCB")] = "int8"
    sizes = dict.fromkeys(kinds, 0)
    for name, entry in checkpoint.tensors.items():
        if (site := owner(name)) in sizes and not name.endswith(".bias"):
            sizes[site] += entry.stop - entry.start
    threshold = checkpoint.config["quantization_config"].get("llm_int8_threshold", 6.0)
    threshold = float(threshold) if isinstance(threshold, (int, float)) else 6.0
    return {site: Stored(kind, sizes[site], threshold) for site, kind in kinds.items()}


def owner(name: str) -> str:
    """The linear a stored tensor belongs to."""
    site, found, _ = name.partition(".weight.")
    return site if found else name.rpartition(".")[0]


def expected(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint with these layers holds, from those of the plain model."""
    every = dict(shapes)
    for site, stored in layers(checkpoint).items():
        if f"{site}.weight" not in every:
            continue  # `check_tensors` will name it
        rows, columns = every[f"{site}.weight"]
        if stored.kind == "int8":
            every[f"{site}.SCB"] = (rows,)
            optional = ["weight_format"]
        else:
            every[f"{site}.weight"] = ((rows * columns + 1) // 2, 1)
            every |= {f"{site}.weight.quant_map": (16,)}
            optional = ["weight.nested_absmax", "weight.nested_quant_map", f"{_STATE}{stored.kind}", "weight.absmax"]
        for name in (f"{site}.{suffix}" for suffix in optional):
            if name in checkpoint.tensors:  # its size hangs on the block, which `decode` checks
                every[name] = tuple(checkpoint.tensors[name].shape)
    return every


def read(checkpoint: Checkpoint, site: str, shape: Sequence[int]) -> Tensor:
    """The decoded float32 weight of a stored linear. E315 where a part of it is missing."""
    names = [name for name in checkpoint.tensors if name.startswith((f"{site}.weight", f"{site}.SCB"))]
    tensors = {name.removeprefix(f"{site}."): checkpoint.read(name) for name in names}
    try:
        return decode(site, tensors, shape)
    except (KeyError, IndexError, RuntimeError) as error:
        raise DitcompressError("E315", f"{site}.weight", f"cannot be decoded ({error})", _COPY) from None


def mark(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Turn the named linears of `model` into `DecodedLinear`s; E320 for a name that is none."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, facts in stored.items():
        if name not in linears:
            raise DitcompressError("E320", name, "is not a linear of this model", _COPY)
        linears[name].__class__ = DecodedLinear
        linears[name].stored = facts  # type: ignore[assignment]


def note_cpu(misread: Sequence[str], reporter: Reporter) -> None:
    """Say once which layers the CPU kernel misreads."""
    if misread:
        reporter.note(
            f"bitsandbytes' CPU kernel misreads {len(misread)} layers whose columns are no multiple of the block "
            f"({some(misread, 1)}); their stored bytes are right, blocks run over the flattened matrix as on a GPU"
        )
