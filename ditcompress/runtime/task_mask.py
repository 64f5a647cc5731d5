"""Experts that the timestep alone chooses: a mask over a block's input (Switch-DiT, arXiv 2403.09176, section 3.2).

    mask = 1 + sum over the chosen experts of g_e E_e(x),   out = block(x * mask) + (1 - mask) * x

g is the softmax of a linear map of SiLU(time embedding), not normalised over the chosen ones; E_e is one linear layer
that starts at zero, with which the block is as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .moe import Routed, Router, Routing


class TimeEmbedding:
    """The timesteps that a model was last given, and what embeds them: `proj` (n,) -> (n, F), `embed` (n, F) -> (n, D).

    Called as a hook before the model's own projection of timesteps, it keeps its argument. The modules are in a tuple,
    so that no part of the model owns them a second time.
    """

    def __init__(self, proj: nn.Module, embed: nn.Module) -> None:
        self.parts = (proj, embed)
        self.timesteps: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.timesteps = args[0].detach()

    @property
    def width(self) -> int:
        return int(self.parts[1].linear_2.out_features)  # type: ignore[union-attr, arg-type]

    def at(self, timesteps: Tensor) -> Tensor:
        """Embeddings (n, D) of timesteps (n,)."""
        proj, embed = self.parts
        weight = next(embed.parameters(), None)
        dtype = torch.float32 if weight is None else weight.dtype
        return embed(proj(timesteps).to(dtype))  # type: ignore[no-any-return]


class TaskMask(Routed):
    """Belongs to one block, whose call it surrounds by hooks: `before` and `after`.

    `weight` (experts, D, D) and `bias` (experts, D) are those of the experts. The embedding of a DiT is the block's
    own, which has not run yet when the block is called: its timesteps come with the call.
    """

    balanced = False

    def __init__(self, features: int, experts: int, active: int, time: TimeEmbedding) -> None:
        super().__init__()
        self.count, self.active, self.time = experts, active, time
        self.router = Router(time.width, experts)
        self.weight = nn.Parameter(torch.zeros(experts, features, features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(experts, features), requires_grad=False)
        self.held: tuple[Tensor, Tensor] | None = None

    def probabilities(self, embedding: Tensor) -> Tensor:
        """Of every expert (n, experts), float32, from time embeddings (n, D)."""
        return self.router(nn.functional.silu(embedding)).softmax(-1)

    def route(self, timesteps: Tensor) -> Routing:
        """The experts of samples by their timesteps (n,)."""
        found = self.probabilities(self.time.at(timesteps))
        gates, chosen = found.topk(self.active, dim=-1)
        return self.tell(Routing(found, chosen, gates))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """The mask (n, T, D) of inputs (n, T, D): every expert runs once, on the samples that chose it."""
        total = torch.ones_like(x)
        for expert in routing.chosen.unique().tolist():
            rows, place = (routing.chosen == expert).nonzero(as_tuple=True)
            part = nn.functional.linear(x[rows], self.weight[expert], self.bias[expert])
            total = total.index_add(0, rows, part * routing.gates[rows, place, None, None].to(x.dtype))
        return total

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """The same by its definition, sample by sample."""
        rows = []
        for n, sample in enumerate(x):
            y = torch.ones_like(sample)
            for expert, gate in zip(routing.chosen[n].tolist(), routing.gates[n], strict=True):
                y = y + gate.to(x.dtype) * (sample @ self.weight[expert].T + self.bias[expert])
            rows.append(y)
        return torch.stack(rows)

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Hook: the block reads x * mask."""
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        timesteps = kwargs.get("timestep")
        if timesteps is None or timesteps.dim() != 1:
            timesteps = self.time.timesteps
        assert timesteps is not None
        mask = self(x, self.route(timesteps.reshape(-1).expand(len(x))))
        self.held = (x, mask)
        if args:
            return (x * mask, *args[1:]), dict(kwargs)
        return args, {**kwargs, "hidden_states": x * mask}

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook: what the mask took from x comes back. Of several streams the last is x's."""
        assert self.held is not None
        (x, mask), self.held = self.held, None
        if isinstance(output, tuple):
            return (*output[:-1], output[-1] + (1 - mask) * x)
        return output + (1 - mask) * x

    def extra_repr(self) -> str:
        return f"{self.active} of {self.count} active, by timestep"
