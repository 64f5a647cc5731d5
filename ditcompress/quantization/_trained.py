"""Steps that learn their codes: the student's weights pass through a quantizer while the teacher is imitated.

A step module with `trainable(layer, params) -> Quantizer` takes part; with `AFTER = True` it is also given the stored
form that the encoding step made (`trainable(layer, params, encoded)`), and may be left out. Inputs are smoothed,
rotated and rounded as they will be at run time (straight-through gradients). All layers are trained together on states
of the teacher's trajectories.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..distill.comparison import Imitating
from ..distill.data import Batch, Trajectories
from ..distill.losses import output_loss
from ..engine import Linear, sign_of
from ..hadamard import rotate, unrotate
from ..models.base import Layout
from ..plan import LayerDecision, Plan
from ..runtime.activation import fake_quantize
from ..runtime.linear import normed
from .base import CPU, Encoded, Layer, registry, step_module


class Quantizer(nn.Module):
    """The trainable form of one weight. `trains_weight`: whether the weight itself is trained beside the parameters;
    `rates`: learning rates of parameters (by name, "weight" and "bias" included) that have one of their own."""

    trains_weight = False
    trains_bias = False
    rates: Mapping[str, float] = {}

    def forward(self, weight: Tensor) -> Tensor:
        """The weight (out, in) as the student uses it."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """What is added to the loss, a scalar."""
        return None

    def after_step(self, step: int, steps: int) -> None:
        """What follows an update."""

    def encoded(self, weight: Tensor) -> Encoded:
        """The stored form."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tuned:
    """What training found: stored forms by site, and other tensors (biases) by full name."""

    encoded: Mapping[str, Encoded]
    tensors: Mapping[str, Tensor]
    losses: Sequence[float] = field(default_factory=tuple)


def trained_step(decision: LayerDecision) -> tuple[ModuleType, Any] | None:
    """The step of a decision that learns, with its parameters."""
    for step in decision.steps:
        if hasattr(registry.get(step.name), "trainable"):
            return step_module(step)
    return None


def optional(decision: LayerDecision) -> bool:
    """Whether the plan is whole without the decision's training."""
    found = trained_step(decision)
    return found is None or getattr(found[0], "AFTER", False)


class _Round(nn.Module):
    """The quantizer of a layer around its smoothing, as a parametrization of the linear's weight."""

    smooth: Tensor | None

    def __init__(self, quantizer: Quantizer, smooth: Tensor | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("smooth", smooth)

    def forward(self, weight: Tensor) -> Tensor:
        if self.smooth is None:
            return self.quantizer(weight)
        return self.quantizer(weight * self.smooth) / self.smooth


class _RoundInput:
    """Forward pre-hook: the input as it will be rounded, gradients straight through."""

    def __init__(
        self, decision: LayerDecision, smooth: Tensor | None, sign: Tensor | None,
        static: tuple[Tensor, Tensor | None] | None,
    ) -> None:  # fmt: skip
        self.spec, self.smooth, self.static = decision.activation, smooth, static or (None, None)
        self.sign, self.block = sign, decision.rotate

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0].detach()
        divided = x if self.smooth is None else x / self.smooth
        divided = divided if self.sign is None else rotate(divided, self.sign, self.block)
        rounded = fake_quantize(divided, self.spec, *self.static).to(x.dtype)
        rounded = rounded if self.sign is None else unrotate(rounded, self.sign, self.block)
        rounded = rounded if self.smooth is None else rounded * self.smooth
        return (arguments[0] + (rounded - x), *arguments[1:])


class _Norm(nn.Module):
    """RMS norm after a linear, with a gain for each channel (TerDiT, section 3.2)."""

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def hook(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return normed(output, self.gain)


class Imitation(Imitating):
    """The training task: a quantized copy of the model against the model itself."""

    def __init__(
        self, model: nn.Module, layout: Layout, plan: Plan, statistics: Mapping[str, Any], steps: Any,
        data: Trajectories, *, batch: int, total: int, features: float, output: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        blocks = layout.blocks if features else ()
        super().__init__(model, copy.deepcopy(model), data, batch, blocks)
        self.features, self.output, self.total = features, output, total
        self.quantizers: dict[str, Quantizer] = {}
        self.norms: dict[str, _Norm] = {}
        smooth = _smoothing(model, layout, plan, statistics, steps)
        sites = layout.by_name()
        for decision in plan.layers:
            site = sites[decision.site]
            sign = sign_of(decision, site, seed)
            self._wrap(decision, statistics.get(site.input_key), smooth.get(site.name), sign, steps, seed)
        for name in self.parameters():
            self._tensor(name).requires_grad_(True)
        self._set_gains([d.site for d in plan.layers if d.output_norm])
        self.begun = {name: tensor.detach().clone() for name, tensor in self.parameters().items()}

    def _wrap(
        self, decision: LayerDecision, statistics: Any, smooth: Tensor | None, sign: Tensor | None, steps: Any,
        seed: int,
    ) -> None:  # fmt: skip
        linear: Any = self.student.get_submodule(decision.site)
        weight = linear.weight.detach().float()
        layer = Layer(decision, weight, statistics, smooth, sign, torch.Generator().manual_seed(seed)).to(weight.device)
        smooth, sign = layer.smooth, layer.sign
        found = trained_step(decision)
        if found is None or getattr(found[0], "AFTER", False):
            encoded = steps.encode(Linear(decision, weight, statistics, smooth, seed, sign)).to(weight.device)
        if found is None:  # rounded once, and part of what the others learn to live with
            fixed = encoded.dequantize()
            fixed = fixed if sign is None else unrotate(fixed, sign, decision.rotate)
            linear.weight.data.copy_(fixed if smooth is None else fixed / smooth)
        else:
            more = (encoded,) if getattr(found[0], "AFTER", False) else ()
            quantizer = found[0].trainable(layer, found[1], *more)
            self.quantizers[decision.site] = quantizer
            parametrize.register_parametrization(linear, "weight", _Round(quantizer, smooth), unsafe=True)
        if decision.activation.mode != "none":
            wants = decision.activation.mode == "static"
            static = steps.static(decision, weight, statistics, smooth, sign) if wants else None
            static = static and tuple(None if part is None else part.to(weight.device) for part in static)
            linear.register_forward_pre_hook(_RoundInput(decision, smooth, sign, static))
        if decision.output_norm:
            self.norms[decision.site] = _Norm(torch.ones(len(weight), device=weight.device))
            linear.register_forward_hook(self.norms[decision.site].hook)

    def _set_gains(self, sites: Sequence[str]) -> None:
        """Gains under which the normalised output of the rounded linear is nearest to the teacher's on one batch."""
        if not sites:
            return
        first = self.data.batch(0, max(self.size, 64))
        seen: dict[str, list[Tensor]] = {}
        handles = []
        for site in sites:
            for model in (self.teacher, self.student):
                module = model.get_submodule(site)
                handles.append(module.register_forward_hook(
                    lambda m, a, y, site=site: seen.setdefault(site, []).append(y.detach())))  # fmt: skip
        with torch.no_grad():
            for model in (self.teacher, self.student):
                self.data.adapter.predict(model, first.latents, first.timestep, first.cond)
        for handle in handles:
            handle.remove()
        for site, (wanted, found) in seen.items():
            wanted, found = wanted.reshape(-1, wanted.shape[-1]), found.reshape(-1, found.shape[-1])
            power = found.square().sum(0).clamp_min(1e-12)
            self.norms[site].gain.data.copy_((wanted * found).sum(0) / power)

    # --- the task of the trainer ---------------------------------------------------------------------------------

    def _tensor(self, name: str) -> Tensor:
        site, _, local = name.partition("::")
        linear = self.student.get_submodule(site)
        if local == "weight":
            return linear.parametrizations.weight.original  # type: ignore[union-attr, return-value]
        if local == "bias":
            return linear.bias  # type: ignore[return-value]
        if local == "gain":
            return self.norms[site].gain
        return dict(self.quantizers[site].named_parameters())[local]

    def parameters(self) -> dict[str, Tensor]:
        names = []
        for site, quantizer in self.quantizers.items():
            names += [f"{site}::{name}" for name, _ in quantizer.named_parameters()]
            names += [f"{site}::weight"] if quantizer.trains_weight else []
            if quantizer.trains_bias and self.student.get_submodule(site).bias is not None:
                names.append(f"{site}::bias")
        names += [f"{site}::gain" for site in self.norms]
        return {name: self._tensor(name) for name in names}

    def rates(self) -> dict[str, float]:
        found = {}
        for name in self.parameters():
            site, _, local = name.partition("::")
            own = self.quantizers[site].rates if site in self.quantizers else {}
            if local in own:
                found[name] = own[local]
        return found

    def loss(self, step: int, part: int) -> Tensor:
        output, features = self.compare(step, part)
        loss = self.output * output + self.features * features
        penalties = [p for p in (q.penalty() for q in self.quantizers.values()) if p is not None]
        return loss + torch.stack(penalties).mean() if penalties else loss

    def after_step(self, step: int) -> None:
        for quantizer in self.quantizers.values():
            quantizer.after_step(step, self.total)

    def extra(self) -> dict[str, Tensor]:
        return {f"{site}::{name}": t for site, q in self.quantizers.items() for name, t in q.named_buffers()}

    def restore(self, extra: Mapping[str, Tensor]) -> None:
        for name, tensor in extra.items():
            site, _, local = name.partition("::")
            dict(self.quantizers[site].named_buffers())[local].copy_(tensor)

    @torch.no_grad()
    def settle(self, batch: Batch, shares: Sequence[float] = (1.0, 0.5, 0.25, 0.0)) -> float:
        """Go only so far from where training began to where it ended as held-out states like best; that share."""
        given = (batch.latents, batch.timestep, batch.cond)
        wanted = self.data.adapter.predict(self.teacher, *given).float()
        ended = {name: tensor.detach().clone() for name, tensor in self.parameters().items()}

        def error(share: float) -> float:
            for name, tensor in self.parameters().items():
                tensor.copy_(torch.lerp(self.begun[name], ended[name], share))
            return float(output_loss(self.data.adapter.predict(self.student, *given).float(), wanted))

        errors = {share: error(share) for share in shares}
        best = min(shares, key=lambda share: errors[share])
        error(best)
        return best

    def result(self, losses: Sequence[float]) -> Tuned:
        encoded, tensors = {}, {}
        for site, quantizer in self.quantizers.items():
            linear = self.student.get_submodule(site)
            rounding: Any = linear.parametrizations.weight[0]  # type: ignore[union-attr, index]
            weight = linear.parametrizations.weight.original.detach().float()  # type: ignore[union-attr, operator]
            effective = weight if rounding.smooth is None else weight * rounding.smooth
            encoded[site] = quantizer.encoded(effective).to(CPU)
            if quantizer.trains_bias and linear.bias is not None:
                tensors[f"{site}.bias"] = linear.bias.detach().to(CPU, copy=True)  # type: ignore[union-attr, operator]
        for site, norm in self.norms.items():
            extra = {"output_gain": norm.gain.detach().to(CPU, torch.float32, copy=True)}
            encoded[site] = replace(encoded[site], extra=extra)
        return Tuned(encoded, tensors, tuple(losses))


def _smoothing(
    model: nn.Module, layout: Layout, plan: Plan, statistics: Mapping[str, Any], steps: Any
) -> dict[str, Tensor]:
    """The smoothing vector of every smoothed site, chosen as the engine will choose it."""
    decisions = plan.by_site()
    groups: dict[tuple[str, str], list[str]] = {}
    for site in layout.sites:
        if site.name in decisions and decisions[site.name].smooth != "none":
            groups.setdefault((site.block, site.input_key), []).append(site.name)
    found: dict[str, Tensor] = {}
    for (_, key), names in groups.items():
        weights = [model.get_submodule(name).weight.detach().float() for name in names]  # type: ignore[union-attr, operator]
        s = steps.prepare([decisions[name] for name in names], weights, statistics.get(key))
        if s is not None:
            found |= {name: s.float() for name in names}
    return found
