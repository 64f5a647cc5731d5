"""The role of a linear from its module path: one ordered list of patterns for every diffusers transformer.

The first pattern that matches wins. Inside a block, names say which part of attention or feed-forward a linear is;
outside, whether it embeds time, embeds the input, or is the head.
"""

from __future__ import annotations

import re

_ATTENTION = r"(attn|attention|mha|face_adapter)"
_GATED = r"(gate|up|gate_up|w1|w3|gate_proj|up_proj|gate_up_proj|gate_layer|swish_linear|wi(_\d)?)"

_IN_BLOCK = (
    (r"(timestep|time)_embed", "time_embedding"),
    # Gains, shifts and gates computed from the time or the label. "film" is T5Film's name for the same thing.
    (r"(adaln|modulation|film|scale_output)|(^|\.)(\w+_)?mod\.|(^|\.)norm\w*\.linear(_\d)?$", "modulation"),
    (r"(^|\.)(to_)?(q|k|v|qkv|kv|query|key|value)(_t|_proj|_linear|_proj_cam)?$", "qkv"),
    (r"(^|\.)(to_added_qkv|to_qkv_mlp_proj|add_[qkv]_proj|(img|txt)_(attn_)?(qkv|kv)(_proj)?)$", "qkv"),
    (rf"{_ATTENTION}.*\.(to_gate|to_g|gate_proj|output_gate)$", "qkv"),
    (r"(^|\.)(to_out(\.0)?|to_out_t(\.0)?|to_add_out|o_proj|out_proj|out_proj_cam|(img|txt)_attn_proj)$", "attn_out"),
    (rf"{_ATTENTION}\w*\.(proj|out_layer|out)$", "attn_out"),
    (r"(^|\.)net\.0\.proj$|(^|\.)(proj_mlp|fc1|linear_fc1|linear_in|in_layer|ff_in)$", "ffn_in"),
    (r"(ff|ffn|mlp|feed_forward)\w*(\.\w+)*\.(linear_1|linear_3|proj_in|proj|0)$", "ffn_in"),
    (rf"(^|\.){_GATED}(\.0)?$", "ffn_in"),
    # AuraFlow's linear_1 and linear_2 both write its hidden layer; Lumina's linear_2 is the way out (see `role_of`).
    (r"(^|\.)net\.2$|(^|\.)(down|down_proj|w2|wo|fc2|linear_fc2|linear_out|out_projection|ff_out)$", "ffn_out"),
    (r"(ff|ffn|mlp|feed_forward)\w*(\.\w+)*\.(linear_2|proj_out|out_layer|out|2|3)$", "ffn_out"),
    (r"(^|\.)proj_out$", "ffn_out"),
)

_OUTSIDE = (
    (r"^(norm_out|final_layer\.(norm|adaln)|proj_out_1|out_layer\.modulation)\b.*", "modulation"),
    (r"(^|\.)((\w+_)?proj_out\w*|\w*final_\w+|final\.\w+|head|spec_out|unpatch\w*)(\.[\w-]+)*$", "head"),
    (r"(^|\.)(\w+_)?(lm_head|audio_heads?|out_layer\.out_layer)(\.\w+)*$", "head"),
    (r"scale_shift|_gate\.linear$|adaln_proj|modulation|distilled_guidance_layer", "modulation"),
    (r"(timestep|time_|(^|[._])t_embed|t_block|guidance_embed|time\.|adaln_single|adaln_global)", "time_embedding"),
    (
        r"(embed|caption|context|text|txt|patch|proj_in|class|label|pool|clip|image_proj|x_proj|cond|_emb\b)",
        "embedding",
    ),
    (r"(^|\.)(img_in|in_proj|input_proj|projection|global_proj|\w*inputs_projection)(\.\w+)*$", "embedding"),
    (r"(encoder\w*\.|_proj(ector)?(\.\w+)?$|cross_attention_proj|init_repr)", "embedding"),
)


def _first(path: str, patterns: tuple[tuple[str, str], ...]) -> str:
    return next((role for pattern, role in patterns if re.search(pattern, path, re.IGNORECASE)), "other")


def role_of(path: str, block: str, *, beside: frozenset[str] = frozenset()) -> str:
    """One of base.ROLES for the linear at `path`; `block` is the path of its block, "" outside the blocks.

    `beside`: last names of the linears with the same parent, needed for the one name that means two things.
    """
    if not block:
        role = _first(path, _OUTSIDE)
        return _first(path, _IN_BLOCK) if role == "other" else role
    inner = path[len(block) + 1 :]
    if inner.endswith(".linear_2") and "out_projection" in beside:
        return "ffn_in"
    return _first(inner or path, _IN_BLOCK)
