"""How one linear is stored and run, as config.json says it.

The text comes from a file that anyone may have edited, and a scheme that is read loosely runs and gives wrong images:
an unknown mode or a one-bit input must be refused, not guessed at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DitcompressError
from ..formats.base import resolve, stored_layout
from ..plan import ActivationSpec, WeightSpec

WHERE = "config.json: quantization_config"
MOST_RANK = 2**16  # far above any width, far below an allocation that overflows


class Strict(BaseModel):
    """Fields from config.json: none unknown, none converted (1 is no true, "8" no 8)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Weight(Strict):
    format: str
    params: dict[str, Any]


class _Activation(Strict):
    mode: Literal["none", "token", "tensor", "static"] = "none"
    bits: int = Field(8, ge=2, le=8)
    symmetric: bool = True
    group: int = Field(0, ge=0)
    element: Literal["int", "e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2"] = "int"
    scale: Literal["float32", "e8m0", "e4m3"] = "float32"


class _Fields(Strict):
    weight: _Weight
    activation: _Activation
    smooth: Literal["none", "fold", "online"]
    rank: int = Field(ge=0, le=MOST_RANK)
    rotate: int = Field(0, ge=0)
    low_rank_input: Literal["rounded", "float"] = "rounded"
    output_norm: bool = False


def refuse(where: str, error: ValidationError) -> DitcompressError:
    """The first fault that pydantic found, as E320 with the key's full name."""
    fault = error.errors(include_url=False)[0]
    key = ".".join([where, *(str(part) for part in fault["loc"])])
    return DitcompressError("E320", key, f"is not valid ({fault['msg']})", "compress the original again")


@dataclass(frozen=True)
class Scheme:
    """What replaces a weight, how the input is rounded, whether it is divided by a smoothing vector before, the rank of
    the low-rank part, the order of the Hadamard transform of the (smoothed) input, 0 for none, and whether the output
    is divided by its root mean square and multiplied by a gain (TerDiT)."""

    weight: WeightSpec
    activation: ActivationSpec = field(default_factory=ActivationSpec)
    smooth: str = "none"
    rank: int = 0
    rotate: int = 0
    low_rank_input: str = "rounded"
    output_norm: bool = False

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str = WHERE) -> Scheme:
        """E320 names the key that is missing, unknown or out of range."""
        try:
            fields = _Fields.model_validate(value)
        except ValidationError as error:
            raise refuse(where, error) from None
        weight = WeightSpec(fields.weight.format, fields.weight.params)
        try:
            resolve(weight)
        except ValidationError as error:
            raise refuse(f"{where}.weight.params", error) from None
        except DitcompressError as error:  # a format we do not have: the input's fault here, not the command line's
            raise DitcompressError("E320", f"{where}.weight.format", error.what, "upgrade ditcompress") from None
        return Scheme(
            weight,
            ActivationSpec(**fields.activation.model_dump()),
            fields.smooth,
            fields.rank,
            fields.rotate,
            fields.low_rank_input,
            fields.output_norm,
        )

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{suffix: (shape, dtype)} of everything stored in place of a weight (out, in)."""
        rows, columns = shape
        stored = dict(stored_layout(self.weight, shape))
        if self.rank:
            stored["low_rank_up"] = ((rows, self.rank), torch.bfloat16)
            stored["low_rank_down"] = ((self.rank, columns), torch.bfloat16)
        if self.smooth == "online":
            stored["smooth"] = ((columns,), torch.float32)
        if self.rotate:
            stored["rotate_sign"] = ((-(-columns // 8),), torch.uint8)
        if self.output_norm:
            stored["output_gain"] = ((rows,), torch.float32)
        if self.activation.mode == "static":
            stored["input_scale"] = ((1,), torch.float32)
            if not self.activation.symmetric:
                stored["input_zero"] = ((1,), torch.float32)
        return stored
