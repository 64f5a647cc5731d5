"""The linear layer that runs a packed weight: what is in memory is what is on disk.

forward: x / smooth (where smoothing is online) -> Hadamard (where rotated) -> quantize the input -> product -> +
low-rank part, of the quantized input (as DiTAS) or of the float one (as SVDQuant) -> + bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.base import dequantize
from ..hadamard import rotate, unpack_signs, unrotate
from .ops import cpu_int8, reference
from .ops.quantize_activation import fake_quantize, quantize_token, quantize_token_asymmetric
from .scheme import Scheme


def kernel_for(scheme: Scheme, device: torch.device) -> str:
    """The name of the op that runs this scheme on this device."""
    weight, activation = scheme.weight, scheme.activation
    plain_int8 = (
        weight.format == "int"
        and weight.params.get("bits", 8) == 8
        and weight.params.get("layout", "row") == "row"
        and weight.params.get("symmetric", True)
    )
    plain_token = activation.mode == "token" and activation.element == "int" and not activation.group
    if device.type == "cpu" and plain_int8 and plain_token and cpu_int8.available():
        return cpu_int8.NAME
    return reference.NAME


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
        self._row_sum: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves devices as usual; a change of dtype (`.half()`, `.to(bf16)`) reaches only the bias, because rounding
        float32 scales would change the model."""
        kept = {name: getattr(self, name) for name in self.stored}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before if before.is_meta else before.to(after.device))
        self._row_sum = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._row_sum = None  # of the codes that are about to be replaced
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The float32 weight (out, in) of the original linear as approximated: decoded, unsmoothed, low rank added.
        For code that looks at `linear.weight` (dtype, device, export); the forward pass does not use it."""
        weight = self.dequantize()
        if self.scheme.rotate:
            weight = unrotate(weight, self._sign(), self.scheme.rotate)
        return weight / self.smooth if self.scheme.smooth == "online" else weight

    @property
    def stored_bytes(self) -> int:
        """Bytes stored in place of the weight; the bias is not counted."""
        return sum(getattr(self, name).numel() * getattr(self, name).element_size() for name in self.stored)

    def stored_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.stored}

    def dequantize(self) -> Tensor:
        """Float32 (out, in) that meets the smoothed input, low-rank part included."""
        weight = self._decoded()
        if self.scheme.rank:
            weight = weight + self.low_rank_up.float() @ self.low_rank_down.float()
        return weight

    def _sign(self) -> Tensor:
        return unpack_signs(self.rotate_sign, self.in_features)

    def _decoded(self) -> Tensor:
        return dequantize(self.scheme.weight, self.stored_tensors(), (self.out_features, self.in_features))

    def extra_repr(self) -> str:
        weight, activation = self.scheme.weight, self.scheme.activation
        bits = 8 * self.stored_bytes / (self.in_features * self.out_features)
        more = f", hadamard {self.scheme.rotate}" if self.scheme.rotate else ""
        return f"{self.in_features}, {self.out_features}, {weight.format} {bits:.2f} bits, input {activation}{more}"

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.scheme.smooth == "online":
            x = x / self.smooth.to(dtype) if dtype == torch.float32 else (x.float() / self.smooth)
        if self.scheme.rotate:
            x = rotate(x.float(), self._sign(), self.scheme.rotate)
        integer = kernel_for(self.scheme, x.device) == cpu_int8.NAME
        y = self._integer(x, dtype) if integer else self._reference(x, dtype)
        y = y if self.bias is None else y + self.bias.to(dtype)
        return normed(y, self.output_gain) if self.scheme.output_norm else y

    def _integer(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """INT8 by INT8, rescaled in float32; the result is in `dtype`."""
        spec = self.scheme.activation
        if spec.symmetric:
            codes, scale = quantize_token(x, spec.bits)
            zero = row_sum = None
        else:
            codes, scale, zero = quantize_token_asymmetric(x, spec.bits)
            if self._row_sum is None or self._row_sum.device != x.device:
                self._row_sum = self.qweight.sum(1, dtype=torch.int32).float()
            row_sum = self._row_sum
        y = cpu_int8.product(codes, scale, zero, self.qweight, self.scale, row_sum)
        if self.scheme.rank:
            rounded = codes.float() * scale if zero is None else (codes.float() - zero) * scale
            y = y + self._low_rank(x.float() if self.scheme.low_rank_input == "float" else rounded)
        return y.to(dtype)

    def _reference(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        spec = self.scheme.activation
        if spec.mode == "none":
            rounded = x.to(dtype)
        else:
            scale = self.input_scale if spec.mode == "static" else None
            zero = self.input_zero if spec.mode == "static" and not spec.symmetric else None
            rounded = fake_quantize(x, spec, scale, zero).to(dtype)
        y = reference.product(rounded, self._decoded().to(dtype))
        if not self.scheme.rank:
            return y
        return y + self._low_rank(x.to(dtype) if self.scheme.low_rank_input == "float" else rounded)

    def _low_rank(self, x: Tensor) -> Tensor:
        down = torch.nn.functional.linear(x, self.low_rank_down.to(x.dtype))
        return torch.nn.functional.linear(down, self.low_rank_up.to(x.dtype))


def replace_linears(model: nn.Module, layers: Mapping[str, Scheme], dtype: torch.dtype | None = None) -> None:
    """Put a PackedLinear in place of each named linear; keeps the device (meta included)."""
    for name, scheme in layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        with torch.device(linear.weight.device):
            packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, scheme, dtype)
        model.set_submodule(name, packed)
