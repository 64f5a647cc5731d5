"""From a configuration to an empty model, trusting nothing: the class must be one of diffusers' own transformers, and
every value is checked against the constructor's annotation before anything is built.

A configuration is data from a stranger. A layer count of 10**9 or a list where a number belongs must end in one
line that names the key, not in an exhausted machine or a traceback.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import DitcompressError

_REMOTE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
_NOT_TRANSFORMERS = ("Dual", "ControlNet")

# The largest integer each kind of key may hold. The keys are matched by substring, the first match counts.
_LIMITS = (
    (("layer", "depth", "num_block", "num_visual", "num_text", "num_experts"), 1000),
    (("sample_size", "sample_height", "sample_width", "max_size", "base_height", "base_width"), 4096),
    (("heads",), 4096),
    (("head_dim",), 4096),
    (("patch",), 64),
    (("theta", "max_seq", "max_position", "vocab", "num_embeds", "length"), 2**24),
)
_LARGEST = 2**20  # every other integer: widths, channels, token counts
_LONGEST = 4096  # entries of a list
_INNER = 2**18  # heads times head width
_POSITIONS = 2**32  # entries of a table of positions that a constructor may compute


@functools.cache
def known_classes() -> tuple[str, ...]:
    """Names of the transformer classes that the installed diffusers itself defines, sorted."""
    import diffusers.models

    structure: dict[str, list[str]] = diffusers.models._import_structure  # type: ignore[attr-defined]
    names = [name for path, listed in structure.items() if path.startswith("transformers.") for name in listed]
    return tuple(sorted(n for n in names if not any(word in n for word in _NOT_TRANSFORMERS)))


def class_of(config: Mapping[str, Any]) -> str:
    """The name of the class that `config` describes, remapped as diffusers does for its old "Transformer2DModel".

    Raises E403 where the configuration asks for foreign code, E320 where it names no class, E321 for an unknown one.
    """
    for key in _REMOTE_KEYS:
        if config.get(key):
            raise DitcompressError(
                "E403", f"config.json: {key}", "asks for code from the checkpoint, which is never run", "remove the key"
            )
    name = config.get("_class_name")
    if isinstance(name, (list, tuple)):
        what = "is a list, which diffusers reads as a module of the checkpoint to run"
        raise DitcompressError("E403", "config.json: _class_name", what, "name a class of diffusers")
    if not isinstance(name, str):
        raise DitcompressError(
            "E320", "config.json: _class_name", f"is {name!r}, expected a name", "add the class name"
        )
    if name == "Transformer2DModel":
        norms = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
        norm = config.get("norm_type")
        name = norms.get(norm, name) if isinstance(norm, str) else name
    if name not in known_classes():
        close = difflib.get_close_matches(name, known_classes(), n=1, cutoff=0.4)
        remedy = f"did you mean {close[0]!r}?" if close else "only transformer classes of diffusers are supported"
        raise DitcompressError("E321", "config.json: _class_name", f"{name!r} is not a diffusers transformer", remedy)
    return name


def _refuse(key: str, value: Any, expected: str) -> DitcompressError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return DitcompressError(
        "E320", f"config.json: {key}", f"is {shown}, expected {expected}", "correct the value or fetch the file again"
    )


def _limit(key: str) -> int:
    return next((limit for words, limit in _LIMITS if any(word in key for word in words)), _LARGEST)


def _expected(annotation: Any) -> tuple[set[type], bool]:
    """The scalar types that an annotation allows (empty: anything) and whether it allows a list."""
    if isinstance(annotation, str) or annotation in (inspect.Parameter.empty, Any):
        return set(), True
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        parts = [_expected(arm) for arm in typing.get_args(annotation)]
        return set().union(*(scalars for scalars, _ in parts)), any(lists for _, lists in parts)
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}, False
    if (origin or annotation) in (list, tuple, dict):
        return set(), True
    return ({annotation}, False) if annotation in (int, float, bool, str, type(None)) else (set(), True)


def _check_number(key: str, value: int | float, lowest: int = -1) -> None:
    """`lowest`: -1 means "the last" or "none" in some lists; a single value may only be so low if its default is."""
    if isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise _refuse(key, value, "a finite number")
    if isinstance(value, int) and not lowest <= value <= _limit(key):
        raise _refuse(key, value, f"an integer from 0 to {_limit(key)}")
    if isinstance(value, float) and abs(value) > 1e9:
        raise _refuse(key, value, "a number below 1e9")


def _check_value(key: str, value: Any, parameter: inspect.Parameter, annotation: Any) -> None:
    scalars, lists = _expected(annotation)
    if value is None:
        if scalars and type(None) not in scalars and parameter.default is not None:
            raise _refuse(key, value, "a value")
        return
    if isinstance(value, (list, tuple)):
        if not lists or len(value) > _LONGEST:
            raise _refuse(key, value, "one value" if not lists else f"at most {_LONGEST} entries")
        for item in value:
            if isinstance(item, (list, tuple)):
                _check_value(key, item, parameter, Any)
            elif isinstance(item, (int, float)):
                _check_number(key, item)
        return
    allowed = tuple(scalars - {type(None)})
    # A float annotation takes an integer; an integer one takes neither a bool nor 16.0.
    fits = type(value) in allowed or (float in allowed and type(value) is int)
    if allowed and not lists and not fits:
        raise _refuse(key, value, " or ".join(sorted(kind.__name__ for kind in allowed)))
    if isinstance(value, (int, float)):
        default = parameter.default if type(parameter.default) is int else 0
        _check_number(key, value, min(default, 0))
        counts = default > 0
        if type(value) is int and value <= 0 and counts and "skip" not in key and "layer" not in key:
            raise _refuse(key, value, "a positive integer")


def _check_products(arguments: Mapping[str, Any]) -> None:
    """Values that are each within bounds can still be absurd together."""

    def number(*keys: str) -> int:
        return next((arguments[key] for key in keys if isinstance(arguments.get(key), int)), 1)

    heads, width = number("num_attention_heads", "num_heads"), number("attention_head_dim", "head_dim")
    if heads * width > _INNER:
        raise _refuse("attention_head_dim", width, f"at most {_INNER} channels over {heads} heads")
    side = max(number("sample_size"), number("pos_embed_max_size")) // max(number("patch_size"), 1)
    if side * side * heads * width > _POSITIONS:
        raise _refuse("sample_size", arguments.get("sample_size"), f"at most {_POSITIONS} position entries")


def checked_arguments(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of `cls` in `config`, checked. Keys that the constructor lacks are left out.

    Raises E320 naming the key.
    """
    constructor = cls.__init__  # type: ignore[misc]
    parameters = inspect.signature(constructor).parameters
    try:
        hints = typing.get_type_hints(inspect.unwrap(constructor))
    except (NameError, TypeError):
        hints = {}
    arguments = {key: value for key, value in config.items() if key in parameters and not key.startswith("_")}
    for key, value in arguments.items():
        parameter = parameters[key]
        _check_value(key, value, parameter, hints.get(key, parameter.annotation))
    _check_products(arguments)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the class's default for every constructor argument that it leaves out."""
    import diffusers.models

    parameters = inspect.signature(getattr(diffusers.models, class_of(config)).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {**defaults, **config}


def build_meta(config: Mapping[str, Any]) -> nn.Module:
    """The model of `config` on the meta device: every shape, no memory.

    Raises E320 (a value is out of range, or the class refuses the combination), E321 and E403 as `class_of`.
    """
    import diffusers.models

    name = class_of(config)
    cls = getattr(diffusers.models, name)
    arguments = checked_arguments(cls, config)
    try:
        with torch.device("meta"):
            model: nn.Module = cls(**arguments)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ArithmeticError, LookupError) as error:
        what = f"{name} cannot be built from it: {type(error).__name__}: {error}"
        raise DitcompressError("E320", "config.json", what, "compare it with the model's original file") from error
    return model.eval()
