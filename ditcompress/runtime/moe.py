"""A feed-forward as experts: some neurons are always on, a router chooses for each token which of the others run.

    y = bias + Shared(x) + sum over the chosen experts of gate_e(x) * E_e(x)        (Dense2MoE, section 1 of the paper)

Tokens are sorted by expert and every expert runs one dense product over its own tokens; nothing is computed and then
masked, no token is dropped, and an expert without tokens does not run. The router is float32 in every model dtype:
rounded logits flip the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .linear import PackedLinear

Gate = Literal["one", "share", "norm", "softmax"]
Choice = Literal["token", "expert"]


class Router(nn.Module):
    """Logits of every expert from a token: float32 `weight` (experts, features) and `bias` (experts,), which stay
    float32 when the model changes dtype."""

    weight: Tensor
    bias: Tensor
    STORED = ("weight", "bias")

    def __init__(self, features: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(experts, features))
        self.register_buffer("bias", torch.zeros(experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        kept = {name: getattr(self, name) for name in self.STORED}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before if before.is_meta else before.to(after.device))
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, features) in any dtype to float32 logits (n, experts)."""
        with torch.autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens.float(), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]} experts, float32"


@dataclass(frozen=True)
class Routing:
    """Of n tokens (or samples): probabilities of all experts (n, experts), the chosen ones (n, active), their gates
    (n, active). Where experts choose tokens, a row of `chosen` is as long as there are experts and ends in -1."""

    probabilities: Tensor
    chosen: Tensor
    gates: Tensor


class Routed(nn.Module):
    """What all routed parts have in common: `count` experts, `active` of them for a token, and `seen`, which is told
    of every routing (counting, the balance loss). `balanced` says whether training evens out their use."""

    router: Router
    count: int
    active: int
    balanced = True
    seen: Callable[[Routing], None] | None = None

    def tell(self, found: Routing) -> Routing:
        """`found`, after `seen` has been told."""
        if self.seen is not None:
            self.seen(found)
        return found


def straight_through(probabilities: Tensor) -> Tensor:
    """Ones that carry the gradient of `probabilities` while these are trained."""
    ones = torch.ones_like(probabilities)
    trained = torch.is_grad_enabled() and probabilities.requires_grad
    return ones + probabilities - probabilities.detach() if trained else ones


def share_of(tokens: int, active: int, count: int) -> int:
    """How many of a sample's tokens an expert takes that chooses them itself: all with all active, at least one."""
    return min(tokens, max(1, -(-tokens * active // count)))


def assignments(chosen: Tensor, tokens: int) -> Tensor:
    """Experts of every token (n * tokens, experts), -1 where one did not take it, from `chosen` (n, experts, t)."""
    n, experts = chosen.shape[:2]
    taken = torch.zeros(n, experts, tokens, dtype=torch.bool, device=chosen.device).scatter_(2, chosen, True)
    number = torch.arange(experts, device=chosen.device)[:, None].expand(experts, tokens)
    return torch.where(taken, number, -1).transpose(1, 2).reshape(n * tokens, experts).sort(-1, descending=True).values


class MoEFeedForward(Routed):
    """Stands where a dense feed-forward stood and takes what it took.

    `shared` may be None; `bias` (features,) is that of the dense output; `active` experts run for each token, any
    number up to all of them. `gate` "one": chosen experts count fully, so that with all of them active this is the
    dense layer. "share": active * p_e / sum of the chosen p, one on average. "norm": p_e / sum of the chosen p, for
    `copies`, experts that each hold the same neurons of the dense layer. "softmax": p_e as it is (DiT-MoE).

    `choice` "expert" (UoE): every expert takes the tokens of a sample that score highest there, active / experts of
    them, so that loads are equal; a token that none takes meets the shared neurons and the bias alone.
    """

    def __init__(
        self, shared: nn.Module | None, experts: Sequence[nn.Module], bias: Tensor | None, features: int, active: int,
        gate: Gate = "one", copies: bool = False, choice: Choice = "token",
    ) -> None:  # fmt: skip
        super().__init__()
        self.shared = shared
        self.experts = nn.ModuleList(experts)
        self.router = Router(features, len(experts))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.count, self.active, self.gate, self.copies = len(experts), active, gate, copies
        self.choice, self.balanced = choice, choice == "token"
        self.dense: float | None = None  # neurons of the dense layer over those of an expert, where that is known

    def route(self, tokens: Tensor) -> Routing:
        """The experts of tokens (n, features). When the router is trained, gates of one carry the gradient of the
        probability (straight through)."""
        probabilities = self.router(tokens).softmax(-1)
        top, chosen = probabilities.topk(self.active, dim=-1)
        if self.gate == "softmax":
            gates = top
        elif self.gate != "one":
            gates = top / top.sum(-1, keepdim=True).clamp_min(1e-20) * (self.active if self.gate == "share" else 1)
        else:
            gates = straight_through(top)
        return self.tell(Routing(probabilities, chosen, gates))

    def _always(self, tokens: Tensor) -> Tensor:
        total = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        return total if self.bias is None else total + self.bias.to(total.dtype)

    def _taken(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, experts, t) that the experts take of samples (n, T, features), and their gates of that shape."""
        probabilities = self.router(samples).softmax(-1)
        taken = share_of(samples.shape[1], self.active, self.count)
        top, chosen = probabilities.transpose(1, 2).topk(taken, dim=-1)
        self.tell(Routing(probabilities.flatten(0, 1), assignments(chosen, samples.shape[1]), top))
        return chosen, straight_through(top)

    def _by_experts(self, samples: Tensor) -> Tensor:
        """(n, T, features) to the same shape, where experts choose their tokens."""
        n, length, _ = samples.shape
        tokens = samples.flatten(0, 1)
        total, (chosen, gates) = self._always(tokens), self._taken(samples)
        first = torch.arange(n, device=tokens.device)[:, None] * length
        for number, expert in enumerate(self.experts):
            rows = (first + chosen[:, number]).flatten()
            part = expert(tokens[rows]) * gates[:, number].flatten()[:, None].to(total.dtype)
            total = total.index_add(0, rows, part.to(total.dtype))
        return total.reshape(n, length, -1)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.choice == "expert" and self.active and hidden_states.numel():
            samples = hidden_states.reshape(-1, *hidden_states.shape[-2:])
            return self._by_experts(samples).reshape(*hidden_states.shape[:-1], -1)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = self._always(tokens)
        if self.active == 0:
            return total.reshape(*hidden_states.shape[:-1], total.shape[-1])
        routing = self.route(tokens)
        order = routing.chosen.flatten().argsort(stable=True)
        counts = torch.bincount(routing.chosen.flatten(), minlength=len(self.experts)).tolist()
        gates, start = routing.gates.flatten(), 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                own = order[start : start + count]
                rows = own // self.active
                part = expert(tokens[rows]) * gates[own, None].to(total.dtype)
                total = total.index_add(0, rows, part.to(total.dtype))
            start += count
        return total.reshape(*hidden_states.shape[:-1], total.shape[-1])

    def reference(self, hidden_states: Tensor) -> Tensor:
        """The same by its definition, token by token: what `forward` is tested against."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.choice == "expert":
            samples = hidden_states.reshape(-1, *hidden_states.shape[-2:])
            (chosen, gates), total = self._taken(samples), self._always(tokens).reshape(*samples.shape[:2], -1)
            for n, number in torch.cartesian_prod(torch.arange(len(samples)), torch.arange(self.count)).tolist():
                for token, gate in zip(chosen[n, number].tolist(), gates[n, number], strict=True):
                    total[n, token] += gate.to(total.dtype) * self.experts[number](samples[n, token][None])[0]
            return total.reshape(*hidden_states.shape[:-1], -1)
        routing, rows = self.route(tokens), []
        for n, token in enumerate(tokens):
            y = self._always(token[None])[0]
            for expert, gate in zip(routing.chosen[n].tolist(), routing.gates[n], strict=True):
                y = y + gate.to(y.dtype) * self.experts[expert](token[None])[0]
            rows.append(y)
        return torch.stack(rows).reshape(*hidden_states.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.active} of {len(self.experts)} active, gate {self.gate}"


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """E * sum_e f_e P_e with f the share of the assignments and P the mean probability (Dense2MoE; DiT-MoE
    `models.py`): 1 at uniform use, E when everything goes to one expert. `probabilities` (n, E), `chosen` (n, k)."""
    experts = probabilities.shape[1]
    share = torch.bincount(chosen.flatten(), minlength=experts).float() / chosen.numel()
    return experts * (share.to(probabilities.device) * probabilities.mean(0)).sum()


def routed_parts(model: nn.Module) -> dict[str, Routed]:
    """Every routed part of a model by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Routed)}


def feed_forwards(model: nn.Module) -> dict[str, MoEFeedForward]:
    """The expert layers of a model by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEFeedForward)}


def idle_parameters(model: nn.Module) -> int:
    """Parameters that a token does not meet: those of the experts that are not chosen, packed weights as matrices."""

    def size(expert: nn.Module) -> int:
        packed = [m for m in expert.modules() if isinstance(m, PackedLinear)]
        return sum(p.numel() for p in expert.parameters()) + sum(m.in_features * m.out_features for m in packed)

    return sum((len(m.experts) - m.active) * size(m.experts[0]) for m in feed_forwards(model).values())


def router_parameters(model: nn.Module) -> int:
    """Weights and biases of all routers, which are buffers."""
    return sum(m.weight.numel() + m.bias.numel() for m in model.modules() if isinstance(m, Router))
