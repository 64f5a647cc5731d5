"""Heads of attentions with two streams: all on is the dense model, grouped execution equals computing everything."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

import ditcompress
from ditcompress import api
from ditcompress.loading import load_model
from ditcompress.models import registry as families
from ditcompress.models._inputs import built
from ditcompress.routed import RoutedPart, apply_routed, everything_runs, routable_attentions
from ditcompress.runtime.attention import RoutedAttention
from ditcompress.runtime.moe import Router, Routing, routed_parts
from tests.moe.routed_models import both, routed_model
from tests.moe.test_command import FEW

PLACES = {
    "flux": ["transformer_blocks.0.attn"],
    "sd3": ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"],
}
CASES = [(family, path) for family, paths in PLACES.items() for path in paths]
CLASSES = {"flux": FluxTransformer2DModel, "sd3": SD3Transformer2DModel}
CLOSE = {"flux": 1e-6, "sd3": 1e-12}  # diffusers turns positions of FLUX in float32


def qwen() -> nn.Module:
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
              "num_attention_heads": 4, "joint_attention_dim": 48, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    return built(QwenImageTransformer2DModel, config, 0).double()


def of_qwen(model: nn.Module) -> Tensor:
    """A prediction for two samples, of which the second has three words of padding."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, 48, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        return model(x, text, mask, torch.tensor([0.3, 0.9]), [[(1, 4, 4)]] * 2, return_dict=False)[0]  # type: ignore[no-any-return]


def routed_qwen(**fields: Any) -> tuple[nn.Module, nn.Module, Any]:
    model = qwen()
    other = copy.deepcopy(model)
    (part,) = apply_routed(other, {"transformer_blocks.0.attn": RoutedPart(**fields)}).values()
    for n, module in enumerate(m for m in other.modules() if isinstance(m, Router)):
        module.weight.normal_(generator=torch.Generator().manual_seed(n))
    return model, other, part


def test_the_attentions_of_both_streams_are_found() -> None:
    for family, paths in PLACES.items():
        model = families.get(family).tiny()
        assert list(routable_attentions(model, families.get(family).layout(model))) == paths
    model = qwen()
    found = routable_attentions(model, families.get("generic").layout(model))
    assert list(found) == [f"transformer_blocks.{n}.attn" for n in (0, 1)]


@pytest.mark.parametrize(("family", "path"), CASES)
@pytest.mark.parametrize("kind", ["heads", "groups"])
def test_everything_active_is_the_dense_model_and_less_is_not(family: str, path: str, kind: str) -> None:
    fields: dict[str, Any] = {"count": 3, "shared": [1]} if kind == "heads" else {"count": 2}
    dense, other, part = routed_model(family, kind, path, active=fields["count"], **fields)
    a, b = both(family, dense, other)
    assert (a - b).norm() <= CLOSE[family] * a.norm()
    part.active = 1
    _, c = both(family, dense, other)
    assert (a - c).norm() > 1e-6 * a.norm()
    with everything_runs(other):
        _, d = both(family, dense, other)
    assert torch.equal(a, d)  # calibration sees the model's own processor, and the routed one is back after it
    assert torch.equal(both(family, dense, other)[1], c)


@pytest.mark.parametrize(("family", "path"), CASES)
@pytest.mark.parametrize(
    "fields",
    [{"kind": "heads", "count": 3, "active": 2, "shared": [2]}, {"kind": "heads", "count": 4, "active": 1},
     {"kind": "heads", "count": 2, "active": 1, "shared": [0, 3], "score": "learned"},
     {"kind": "groups", "count": 4, "active": 1}, {"kind": "groups", "count": 2, "active": 1}],
)  # fmt: skip
def test_grouped_execution_equals_computing_everything(family: str, path: str, fields: dict[str, Any]) -> None:
    kind, rest = fields["kind"], {k: v for k, v in fields.items() if k != "kind"}
    dense, other, _ = routed_model(family, kind, path, **rest)
    found = both(family, dense, other)[1]
    attn = other.get_submodule(path)
    attn.set_processor(RoutedAttention(reference=True))
    assert torch.allclose(found, both(family, dense, other)[1], atol=1e-12)


@pytest.mark.parametrize(
    "fields", [{"kind": "heads", "count": 3, "shared": [2]}, {"kind": "groups", "count": 2}], ids=["heads", "groups"]
)
def test_positions_and_padding_of_qwen_image_are_kept(fields: dict[str, Any]) -> None:
    dense, other, part = routed_qwen(**fields, active=fields["count"])
    a = of_qwen(dense)
    assert (a - of_qwen(other)).norm() < 1e-6 * a.norm()
    part.active = 1
    found = of_qwen(other)
    assert (a - found).norm() > 1e-6 * a.norm()
    other.get_submodule("transformer_blocks.0.attn").set_processor(RoutedAttention(reference=True))
    assert torch.allclose(found, of_qwen(other), atol=1e-12)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_streams_are_told_apart_and_of_groups_each_has_the_same_load(family: str) -> None:
    dense, other, part = routed_model(family, "groups", PLACES[family][0], count=4, active=1)
    seen: list[Routing] = []
    part.seen = seen.append
    both(family, dense, other)
    text, image = seen
    assert image.chosen.shape[0] == 3 * 16 and text.chosen.shape[0] > 3 * 16
    for found in seen:
        counts = torch.bincount(found.chosen[found.chosen >= 0], minlength=4)
        assert len(set(counts.tolist())) == 1
    part.added.weight.zero_()
    before = seen[1].probabilities
    both(family, dense, other)
    text, image = seen[2:]
    assert torch.equal(image.probabilities, before)  # the image has a router of its own
    assert torch.allclose(text.probabilities, torch.full_like(text.probabilities, 0.25))


def test_a_text_that_ends_in_its_block_needs_no_queries() -> None:
    path = "transformer_blocks.1.attn"
    for kind, fields in (("heads", {"count": 4}), ("groups", {"count": 2})):
        dense, other, part = routed_model("sd3", kind, path, active=1, **fields)
        seen: list[Routing] = []
        part.seen = seen.append
        other.get_submodule(f"{path}.add_q_proj").register_forward_hook(lambda m, a, y: pytest.fail("was computed"))
        both("sd3", dense, other)
        assert len(seen) == 1 and len(seen[0].probabilities) == 3 * 16


def saved(family: str, folder: Path) -> Path:
    families.get(family).tiny().save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("method", ["moh", "uoe"])
def test_a_checkpoint_of_two_streams_trains_loads_and_is_quantized(family: str, method: str, tmp_path: Path) -> None:
    path = saved(family, tmp_path / "dense")
    more = (*FEW, "training.learning_rate=0.001", "training.sample_steps=4")
    done = api.moe(path, tmp_path / "m", method=method, overrides=more, distill_steps=8)
    assert done["distilled"]["last"] < done["distilled"]["first"]
    assert [p for p in done["layers"] if p.endswith("head_router")] == [f"{p}.head_router" for p in PLACES[family]]
    flops = done["block_linear_flops_per_token"]
    assert flops["active"] < flops["dense"]
    theirs, (ours, _) = CLASSES[family].from_pretrained(tmp_path / "m"), load_model(tmp_path / "m")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    a, b = both(family, ours.double(), theirs.double())
    assert torch.allclose(a, b, atol=1e-9) and routed_parts(theirs)
    few = ("calibration.samples=2", "calibration.steps=2")
    result = ditcompress.quantize(CLASSES[family].from_pretrained(tmp_path / "m"), "w8a8", overrides=few)
    assert result.model is not None
    a, b = both(family, theirs.double(), result.model.double())
    assert (a - b).norm() < 0.2 * a.norm()


@pytest.mark.parametrize("method", ["moh", "uoe"])
def test_everything_active_is_the_original_on_disk(method: str, tmp_path: Path) -> None:
    path = saved("sd3", tmp_path / "dense")
    numbers = {"shared": 1, "active": 3} if method == "moh" else {"active": 4}
    facts = api.moe(path, tmp_path / "m", method=method, overrides=FEW, **numbers)
    dense, other = (SD3Transformer2DModel.from_pretrained(p).double() for p in (path, tmp_path / "m"))
    a, b = both("sd3", dense, other)
    assert torch.allclose(a, b, atol=1e-5)
    flops = facts["block_linear_flops_per_token"]
    assert flops["dense"] - flops["active"] == 2 * 64 * 64  # the text's queries in the last block, which nobody reads
