"""The linear layer that runs a packed weight: what is in memory is what is on disk.

forward: x / smooth (where smoothing is online) -> Hadamard (where rotated) -> quantize the input -> product -> +
low-rank part, of the quantized input (as DiTAS) or of the float one (as SVDQuant) -> + bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.base import is_int8, resolve
from ..formats.base import registry as formats
from ..hadamard import rotate, unpack_signs, unrotate
from . import fusion
from .kernels import DEVICES, KERNELS, Decode, choose
from .ops import _decoded
from .ops.base import Made
from .scheme import Scheme

FORMATS = formats.all()  # imported now: a traced forward pass cannot import
NORM_EPS = 1e-5


def normed(y: Tensor, gain: Tensor) -> Tensor:
    """y / rms(y) * gain over the last dimension (TerDiT, section 3.2)."""
    return y * torch.rsqrt(y.float().square().mean(-1, keepdim=True) + NORM_EPS).to(y.dtype) * gain.to(y.dtype)


class PackedLinear(nn.Module):
    """A linear whose weight is stored packed. Works on the meta device; dtypes of the stored tensors never change."""

    qweight: Tensor
    scale: Tensor
    smooth: Tensor
    rotate_sign: Tensor
    low_rank_up: Tensor
    low_rank_down: Tensor
    output_gain: Tensor
    input_scale: Tensor
    input_zero: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scheme: Scheme, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.stored = scheme.layout((out_features, in_features))
        for name, (shape, stored_dtype) in self.stored.items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored_dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self._params = resolve(scheme.weight)[1]
        self._how = _decoded.described(scheme.weight.format, self._params, [*self.stored])
        self.is_int8 = is_int8(scheme.weight)
        self.kernels = {device: choose(scheme, device) for device in DEVICES}
        self.decode_when: Decode = "call"
        self.rounding: str | None = None  # of `fusion`
        self._made: dict[tuple[str, torch.dtype, bool], Made] = {}  # of the kernels, from the stored tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves devices as usual; a change of dtype (`.half()`, `.to(bf16)`) reaches only the bias, because rounding
        float32 scales would change the model."""
        kept = {name: getattr(self, name) for name in self.stored}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before if before.is_meta else before.to(after.device))
        self._made = {}
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._made, self.rounding = {}, None  # from tensors that are about to be replaced
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The float32 weight (out, in) of the original linear as approximated: decoded, unsmoothed, low rank added.
        For code that looks at `linear.weight` (dtype, device, export); the forward pass does not use it."""
        weight = self.dequantize()
        if self.scheme.rotate:
            weight = unrotate(weight, self.signs(), self.scheme.rotate)
        return weight / self.smooth if self.scheme.smooth == "online" else weight

    @property
    def stored_bytes(self) -> int:
        """Bytes stored in place of the weight; the bias is not counted."""
        return sum(getattr(self, name).numel() * getattr(self, name).element_size() for name in self.stored)

    def stored_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.stored}

    def dequantize(self) -> Tensor:
        """Float32 (out, in) that meets the smoothed input, low-rank part included."""
        weight = self.decoded()
        if self.scheme.rank:
            weight = weight + self.low_rank_up.float() @ self.low_rank_down.float()
        return weight

    def signs(self) -> Tensor:
        """Of the rotation, float32 (in,)."""
        return unpack_signs(self.rotate_sign, self.in_features)

    def decoded(self) -> Tensor:
        """Float32 (out, in) of the stored codes alone."""
        fmt = FORMATS[self.scheme.weight.format]
        codes, grid = fmt.unpack(self.stored_tensors(), self._params, (self.out_features, self.in_features))
        values: Tensor = fmt.value(codes, grid, self._params)
        return values

    @property
    def decodes(self) -> bool:
        """Whether the kernel needs the weight in another form than the stored one, at each call unless it is kept."""
        return self.kernel(self.qweight.device.type) == "reference" or self.qweight.dtype != torch.int8

    def kernel(self, device: str) -> str:
        """The name of the kernel that runs on a kind of device."""
        return self.kernels.get(device, "reference")

    @property
    def made_bytes(self) -> int:
        """Bytes that kernels keep beside the stored tensors."""
        own = {t.data_ptr() for t in self.stored_tensors().values()}
        made = [t for kept in self._made.values() for t in kept.values()]
        return sum(t.numel() * t.element_size() for t in made if t.data_ptr() not in own)

    def as_int8(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """INT8 codes (rows, in) and scales (rows, 1) of the rows from `start` to `stop`; needs `is_int8`."""
        stop, stored = self.out_features if stop is None else stop, self.stored_tensors()
        if stop - start < self.out_features:
            stored = {name: t[start:stop] if len(t) == self.out_features else t for name, t in stored.items()}
        shape = (stop - start, self.in_features)
        if torch.compiler.is_compiling() and self.qweight.dtype != torch.int8 and self.qweight.is_cpu:
            return _decoded.as_int8(self._how, stored, shape)
        found: tuple[Tensor, Tensor] = FORMATS[self.scheme.weight.format].as_int8(stored, self._params, shape)
        return found

    def extra_repr(self) -> str:
        weight, activation = self.scheme.weight, self.scheme.activation
        bits = 8 * self.stored_bytes / (self.in_features * self.out_features)
        more = f", hadamard {self.scheme.rotate}" if self.scheme.rotate else ""
        return f"{self.in_features}, {self.out_features}, {weight.format} {bits:.2f} bits, input {activation}{more}"

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is not None:
            found = fusion.product(self, x)
            if found is not None:
                return found
            x = fusion.plain(x)
        kernel = self.kernel(x.device.type)
        y: Tensor = KERNELS[kernel].run(self, x, self._prepared(kernel, x.dtype), x.dtype)
        return normed(y, self.output_gain) if self.scheme.output_norm else y

    def transformed(self, x: Tensor) -> Tensor:
        """x smoothed and rotated, which is what is rounded; float32 where anything was done."""
        if self.scheme.smooth == "online":
            x = x.float() / self.smooth
        return rotate(x.float(), self.signs(), self.scheme.rotate) if self.scheme.rotate else x

    def _prepared(self, kernel: str, dtype: torch.dtype) -> Made:
        keep = self.decode_when == "load"
        made = self._made.get((kernel, dtype, keep))
        if made is None:
            made = KERNELS[kernel].prepare(self, dtype, keep)
            self._made = {(kernel, dtype, keep): made}
        return made


def replace_linears(model: nn.Module, layers: Mapping[str, Scheme], dtype: torch.dtype | None = None) -> None:
    """Put a PackedLinear in place of each named linear; keeps the device (meta included)."""
    for name, scheme in layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        with torch.device(linear.weight.device):
            packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, scheme, dtype)
        model.set_submodule(name, packed)
