"""Routed attentions and blocks in a model: what `quantization_config.routed` says of them, and the parts themselves.

A part is a child of the module that it routes and works by a hook or in the module's own call, so that no name of the
model changes: what reads names (loading, quantization) sees the same linears.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from diffusers.models.attention_processor import Attention
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from .errors import DitcompressError
from .models import adapter_for
from .models.base import Layout
from .runtime.attention import RoutedAttention
from .runtime.blocks import BlockRouter, Embedding, Member
from .runtime.heads import GroupRouter, HeadRouter, Score
from .runtime.moe import Routed
from .runtime.scheme import WHERE, Strict, refuse
from .runtime.task_mask import TaskMask, TimeEmbedding

Kind = Literal["mask", "heads", "groups", "blocks"]
CHILDREN: dict[str, str] = {
    "mask": "task_mask", "heads": "head_router", "groups": "head_router", "blocks": "block_router",
}  # fmt: skip
STREAMS = {"dit": 1, "pixart": 1, "flux": 2, "sd3": 2, "qwen_image": 2}  # families whose blocks' calls are known
TIMED = ("dit", "pixart", "flux", "sd3")  # those whose time projection reads 0-1000
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0")  # no linear or rotary attention
JOINT = ("JointAttnProcessor2_0", "FluxAttnProcessor", "QwenDoubleStreamAttnProcessor2_0")


class RoutedPart(Strict):
    """One entry: `count` experts, heads, groups of heads or blocks that are routed, and how many of them are `active`.

    "mask" surrounds the block at this path with `count` timestep experts; "heads" routes the attention's heads but the
    `shared` ones by `score`; "groups" lets `count` groups of heads take their tokens; "blocks" starts at this path a
    group of `count` consecutive blocks, whose router weighs tokens by `alpha` against the embedding by 1 - alpha.
    """

    kind: Kind
    count: int = Field(ge=1, le=4096)
    active: int = Field(ge=0)
    shared: list[int] = Field(default_factory=list)
    score: Score = "query"
    alpha: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> RoutedPart:
        if self.active > self.count:
            raise ValueError(f"{self.active} of {self.count} cannot be active")
        if self.active == 0 and not (self.kind == "heads" and self.shared):
            raise ValueError("nothing is active")
        return self

    @staticmethod
    def from_json(value: Any, where: str) -> RoutedPart:
        """E320 names the key that is missing, unknown or out of range."""
        try:
            return RoutedPart.model_validate(value)
        except ValidationError as error:
            raise refuse(where, error) from None


def routed_paths(parts: Mapping[str, RoutedPart]) -> list[str]:
    """Paths of the modules that hold the parts' own tensors."""
    return [f"{path}.{CHILDREN[part.kind]}" for path, part in parts.items()]


def family(model: nn.Module, known: Collection[str] = STREAMS.keys()) -> str:
    """The family whose blocks' calls are known; E205 for another one."""
    name = adapter_for(type(model).__name__).__name__.rpartition(".")[2]
    config: Any = model.config
    if name not in known or config.get("zero_cond_t"):  # Qwen-Image edits: two times for a sample
        what = "has blocks whose calls are not known here"
        raise DitcompressError("E205", type(model).__name__, what, "use a method of feed-forwards, as moe-best")
    return name


def routable_attentions(model: nn.Module, layout: Layout) -> dict[str, str]:
    """Path and head axis of every self-attention of the blocks, of one stream or of two, in forward order."""
    found = {}
    for site in layout.sites:
        path = site.name.rpartition(".")[0]
        if site.block and site.name.endswith(".to_q") and site.writes[0] and _is_known(model.get_submodule(path)):
            found[path] = site.writes[0]
    return found


def _is_known(attn: nn.Module) -> bool:
    """Whether `attn` is self-attention without anything that its default processor would add to what
    runtime/attention.py computes. By the processors' names, which not every diffusers has."""
    kind = type(getattr(attn, "processor", None)).__name__
    joint = getattr(attn, "added_kv_proj_dim", None) is not None
    if kind not in (JOINT if joint else PLAIN) or getattr(attn, "fused_projections", False):
        return False
    if not isinstance(attn, Attention):  # FLUX; its single blocks have no output linear of the attention's own
        return joint and not getattr(attn, "pre_only", False)
    extras = ("group_norm", "spatial_norm")
    other = attn.is_cross_attention or attn.residual_connection or attn.rescale_output_factor != 1.0
    return not other and not any(getattr(attn, name, None) for name in extras) and attn.to_k is not None


def apply_routed(model: nn.Module, parts: Mapping[str, RoutedPart]) -> dict[str, Routed]:
    """Give the model its routed parts, all weights zero; works on the meta device. E320 where one does not fit."""
    if not parts:
        return {}
    layout = adapter_for(type(model).__name__).layout(model)
    times: dict[int, TimeEmbedding] = {}
    attentions = routable_attentions(model, layout)
    made: dict[str, Routed] = {}
    for path, part in parts.items():
        where = f"{WHERE}.routed.{path}"
        known = attentions if part.kind in ("heads", "groups") else layout.blocks
        if path not in known:
            raise DitcompressError("E320", where, "is no such part of this model", "convert the original again")
        if part.kind == "mask":
            routed: Routed = _masked(model, layout, path, part, times)
        elif part.kind == "blocks":
            routed = _grouped(model, layout, path, part, where)
        else:
            routed = _headed(model, path, part, where)
        made[f"{path}.{CHILDREN[part.kind]}"] = routed
    return made


@contextmanager
def everything_runs(model: nn.Module) -> Iterator[None]:
    """Inside, attentions compute all heads for all tokens and no block is skipped: all their linears are called, as
    calibration needs it. Expert feed-forwards stay as they are."""
    routers = [m for m in model.modules() if isinstance(m, BlockRouter)]
    attentions: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "processor", None), RoutedAttention)]
    routed = [attn.processor for attn in attentions]
    before = [router.active for router in routers]
    try:
        for router in routers:
            router.active = router.count
        for attn in attentions:
            attn.processor = attn.processor.dense
        yield
    finally:
        for router, active in zip(routers, before, strict=True):
            router.active = active
        for attn, processor in zip(attentions, routed, strict=True):
            attn.processor = processor


def _placed(owner: nn.Module, name: str, part: Routed, like: Tensor) -> None:
    """Make `part` a child of `owner` in the dtype and on the device of `like`."""
    dtype = like.dtype if like.dtype.is_floating_point else None
    owner.add_module(name, part.to(like.device, dtype).train(owner.training))


def width_of(layout: Layout, block: str) -> int:
    """Features of a token that enters a block."""
    return next(s.in_features for s in layout.sites if s.block == block and s.role in ("qkv", "ffn_in"))


def _headed(model: nn.Module, path: str, part: RoutedPart, where: str) -> Routed:
    attn: Any = model.get_submodule(path)
    heads, features = int(attn.heads), int(attn.to_q.in_features)
    wrong = part.kind == "groups" and heads % part.count
    if part.kind == "heads":
        wrong = part.count + len(set(part.shared)) != heads or any(not 0 <= h < heads for h in part.shared)
    if wrong:
        what = f"does not fit {heads} heads"
        raise DitcompressError("E320", where, what, "convert the original again")
    added = int(attn.add_q_proj.in_features) if getattr(attn, "to_add_out", None) is not None else 0
    routed = (
        HeadRouter(features, heads, part.shared, part.active, part.score, added)
        if part.kind == "heads"
        else GroupRouter(features, part.count, part.active, added)
    )
    _placed(attn, CHILDREN[part.kind], routed, next(attn.to_out.parameters()))
    attn.set_processor(RoutedAttention(attn.processor))
    return routed


def _time(model: nn.Module, block: str) -> tuple[nn.Module, nn.Module]:
    """What projects and embeds the timestep: the block's own where it has one, else the model's."""
    own = f"{block}.norm1.emb"
    names = dict(model.named_modules())
    path = own if own in names else next(n.rpartition(".")[0] for n in names if n.endswith(".timestep_embedder"))
    return names[f"{path}.time_proj"], names[f"{path}.timestep_embedder"]


def _masked(model: nn.Module, layout: Layout, path: str, part: RoutedPart, times: dict[int, TimeEmbedding]) -> TaskMask:
    family(model, TIMED)
    block = model.get_submodule(path)
    proj, embed = _time(model, path)
    if id(proj) not in times:
        times[id(proj)] = TimeEmbedding(proj, embed)
        proj.register_forward_pre_hook(times[id(proj)])
    mask = TaskMask(width_of(layout, path), part.count, part.active, times[id(proj)])
    _placed(block, CHILDREN["mask"], mask, next(block.parameters()))
    block.register_forward_pre_hook(mask.before, with_kwargs=True)
    block.register_forward_hook(mask.after)
    return mask


def _of_dit(block: nn.Module, given: dict[str, Any]) -> Tensor:
    embed: Any = block.norm1.emb  # type: ignore[union-attr]
    return embed(given["timestep"], given["class_labels"], hidden_dtype=given["hidden_states"].dtype)  # type: ignore[no-any-return]


def _named(name: str) -> Embedding:
    return lambda block, given: given[name]


def _grouped(model: nn.Module, layout: Layout, path: str, part: RoutedPart, where: str) -> BlockRouter:
    kind = family(model)
    owner, _, first = path.rpartition(".")
    blocks = list(model.get_submodule(owner).children())
    members = blocks[int(first) : int(first) + part.count]
    taken = any("forward" in vars(block) for block in members)
    if len(members) < part.count or taken or any(getattr(b, "context_pre_only", False) for b in members):
        raise DitcompressError("E320", where, "is no free group of blocks", "convert the original again")
    block: Any = members[0]
    embedding = {"dit": _of_dit, "pixart": _named("timestep")}.get(kind, _named("temb"))
    if kind == "dit":
        condition = int(block.norm1.linear.in_features)
    elif kind == "pixart":
        condition = int(model.adaln_single.linear.out_features)  # type: ignore[union-attr, arg-type]
    else:
        condition = int(_time(model, path)[1].linear_2.out_features)  # type: ignore[union-attr, arg-type]
    streams = STREAMS[kind]
    router = BlockRouter(width_of(layout, path), streams, condition, part.count, part.active, part.alpha, embedding)
    _placed(block, CHILDREN["blocks"], router, next(block.parameters()))
    for place, member in enumerate(members):
        member.forward = Member(member, router, place)  # type: ignore[method-assign, assignment]
    return router
