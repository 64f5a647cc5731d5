"""Steps that learn: the checks of the cards of TerDiT, VQ4DiT and AdaRound, and the whole path on the digits model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditcompress import api, recipe
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.formats.base import dequantize, resolve
from ditcompress.loading import load_model
from ditcompress.models import registry as families
from ditcompress.plan import LayerDecision, WeightSpec
from ditcompress.quantization import adaround, terdit, vq4dit
from ditcompress.quantization.base import Layer
from ditcompress.runtime.linear import normed


def weight(rows: int = 32, columns: int = 48) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


def layer(format_: str, **params: Any) -> Layer:
    return Layer(LayerDecision("layer", "qkv", WeightSpec(format_, params)), weight())


def stored(encoded: Any) -> torch.Tensor:
    return dequantize(encoded.packed.spec, encoded.packed.tensors, encoded.packed.shape)


# --- TerDiT --------------------------------------------------------------------------------------------------------


def ternary(**params: Any) -> terdit.Ternary:
    return terdit.Ternary(layer("ternary", layout="tensor", **params), terdit.Params())


def test_terdit_codes_are_ternary_scale_invariant_and_a_third_is_zero() -> None:
    codes = ternary().codes(torch.randn(500, 500, generator=torch.Generator().manual_seed(1)))
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (codes == 0).float().mean() == pytest.approx(0.310, abs=0.01)
    assert torch.equal(ternary().codes(weight()), ternary().codes(7 * weight()))


def test_terdit_gradients_pass_straight_through_and_alpha_s_is_exact() -> None:
    quantizer = ternary()
    master = weight().requires_grad_(True)
    target = torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    (quantizer(master) * target).sum().backward()
    assert torch.allclose(master.grad, quantizer.alpha.detach() * target)  # type: ignore[arg-type]
    codes = quantizer.codes(weight())
    assert torch.allclose(quantizer.alpha.grad, (codes * target).sum())  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["bits", "base3"])
def test_terdit_what_is_stored_is_what_was_trained(packing: str) -> None:
    quantizer = ternary(packing=packing)
    quantizer.alpha.data.mul_(1.37)
    assert torch.allclose(stored(quantizer.encoded(weight())), quantizer(weight()).detach(), atol=1e-6)
    quantizer.alpha.data.mul_(-1)
    assert torch.allclose(stored(quantizer.encoded(weight())), quantizer(weight()).detach(), atol=1e-6)


def test_terdit_a_zero_adaln_stays_zero_under_the_norm() -> None:
    assert normed(torch.zeros(2, 6), torch.ones(6)).abs().max() == 0
    assert normed(torch.randn(2, 6), torch.ones(6)).square().mean(-1).tolist() == pytest.approx([1, 1], rel=1e-3)


# --- VQ4DiT --------------------------------------------------------------------------------------------------------


def candidates(n: int) -> vq4dit.Candidates:
    return vq4dit.Candidates(layer("vq", bits=4, dim=4), vq4dit.Params(candidates=n))


def test_vq4dit_one_candidate_is_plain_k_means() -> None:
    plain = stored(vq4dit.encode(layer("vq", bits=4, dim=4), vq4dit.Params()))
    assert torch.equal(stored(candidates(1).encoded(weight())), plain)


def test_vq4dit_ratios_start_at_inverse_distances_and_one_hot_is_a_look_up() -> None:
    found = candidates(2)
    vectors = found._vectors(weight())
    distance = (vectors[:, None] - found.codebook.detach()[found.places]).norm(dim=2)
    assert torch.allclose(found.ratios()[:, 0], (distance[:, 1] / distance.sum(1)).float(), atol=1e-3)
    assert not torch.equal(found(weight()), stored(found.encoded(weight())))
    found.logits.data.copy_(torch.tensor([vq4dit.HARD, -vq4dit.HARD]).expand_as(found.logits))
    assert torch.allclose(found(weight()), stored(found.encoded(weight())), atol=1e-3)


def test_vq4dit_frozen_choices_never_move_and_the_layer_settles_before_its_codebook_trains() -> None:
    found = candidates(2)
    optimizer = torch.optim.AdamW([found.logits, found.codebook], lr=0.3)
    shares, choices = [], {}
    for step in range(200):
        optimizer.zero_grad()
        book = found.codebook.detach().clone()
        penalty = found.penalty()
        assert penalty is not None
        ((found(weight()) - weight()).square().mean() + penalty).backward()
        settled = bool(found.settled)
        assert (found.codebook.grad is None or found.codebook.grad.abs().sum() == 0) or settled
        optimizer.step()
        found.after_step(step, 200)
        assert settled or torch.equal(found.codebook.detach(), book)
        now = found.logits.argmax(1)
        for place in found.frozen.nonzero().flatten().tolist():
            assert choices.setdefault(place, int(now[place])) == int(now[place])
        shares.append(found.frozen.float().mean().item())
    assert shares == sorted(shares) and shares[-1] == 1 and found.settled


def test_vq4dit_sizes_of_dit_xl_are_those_of_the_paper() -> None:
    shapes = [(1152, 1152)] * 4 + [(4608, 1152), (1152, 4608), (6912, 1152)]
    for bits, dim, expected in ((8, 4, 159.47), (6, 2, 239.20)):
        fmt, params = resolve(WeightSpec("vq", {"bits": bits, "dim": dim}))
        sizes = [fmt.layout(params, shape)["qweight"][0] for shape in shapes]
        assert 28 * sum(a * b for a, b in sizes) / 2**20 == pytest.approx(expected, abs=0.01)


# --- AdaRound ------------------------------------------------------------------------------------------------------

FORMATS = [("int", {"bits": 4, "layout": "group", "group": 16, "symmetric": False}), ("fp", {"element": "e2m1"}),
           ("fp", {"element": "e3m0"}), ("nf4", {"block": 16})]  # fmt: skip


@pytest.mark.parametrize(("format_", "params"), FORMATS)
def test_adaround_starts_at_the_weight_between_neighbours_and_ends_on_the_grid(format_: str, params: Any) -> None:
    one = layer(format_, **params)
    found = adaround.Rounding(one, adaround.Params())
    inside = (found.lower < weight()) & (weight() < found.lower + found.step)
    assert inside.float().mean() > 0.9
    assert torch.allclose(found(weight())[inside], weight()[inside], atol=1e-4)
    nearest = stored(adaround.encode(one, adaround.Params()))
    assert torch.allclose(stored(found.encoded(weight())), nearest, atol=1e-6)
    found.up.data.copy_(torch.where(torch.rand(found.up.shape) < 0.5, -9.0, 9.0))
    assert torch.allclose(stored(found.encoded(weight())), found(weight()).detach(), atol=1e-6)


def test_adaround_the_penalty_waits_for_the_warm_up_and_is_zero_at_the_ends() -> None:
    found = adaround.Rounding(layer("int", bits=4), adaround.Params())
    assert found.penalty() == 0
    found.after_step(900, 1000)
    assert found.penalty().item() > 0  # type: ignore[union-attr]
    found.up.data.copy_(torch.where(found.up > 0, 9.0, -9.0))
    assert found.penalty().item() == 0  # type: ignore[union-attr]


# --- the whole path ------------------------------------------------------------------------------------------------

SHORT = ["training.images=8", "training.sample_steps=4", "training.batch=16", "training.save_every=10"]


FASTER = {
    "vq4dit-2bit": [
        "rules.1.blocks=0-2",
        "rules.1.weight.iterations=5",
        "rules.1.steps=[{vq4dit: {ratio_rate: 0.5, codebook_rate: 0.003}}]",
    ],
    "ptq4dit-w4a8": [
        "calibration.samples=4",
        "calibration.steps=4",
        "rules.1.blocks=0-2",
        "rules.2.blocks=0-2",
        "rules.1.steps=[{adaround: {rate: 0.02}}]",
        "rules.2.steps=[ptq4dit, {adaround: {rate: 0.02}}]",
    ],
}


def error(folder: Path) -> float:
    """Relative output error at a few fixed inputs."""
    models = [load_model(path)[0] for path in (digits_folder(), folder)]
    family, source = families.get("dit"), torch.Generator().manual_seed(5)
    latents = torch.randn(32, *family.latent_shape(models[0].config), generator=source)
    time, labels = torch.linspace(20, 980, 32).round(), torch.arange(32) % 10
    with torch.no_grad():
        first, second = (family.predict(m, latents, time, {"class_labels": labels}) for m in models)
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize(("name", "gain"), [("terdit", 0.7), ("vq4dit-2bit", 0.95), ("ptq4dit-w4a8", 1.0)])
def test_training_lowers_the_error_of_the_stored_model(tmp_path: Path, name: str, gain: float) -> None:
    for steps in (1, 60):
        few = [*SHORT, *FASTER.get(name, []), f"training.steps={steps}"]
        api.quantize(digits_folder(), name, tmp_path / f"{steps}", overrides=few, device="cpu")
    assert error(tmp_path / "60") < gain * error(tmp_path / "1")


def test_an_interrupted_training_goes_on_and_writes_the_same_bytes(tmp_path: Path) -> None:
    class Stop(Silent):
        def task(self, description: str, total: int) -> Any:
            import contextlib

            @contextlib.contextmanager
            def counted() -> Any:
                left = [17]

                def advance(units: int = 1, said: str = "") -> None:
                    left[0] -= units
                    if description == "train" and left[0] < 0:
                        raise KeyboardInterrupt

                yield advance

            return counted()

    overrides = [*SHORT, "training.steps=24"]
    api.quantize(digits_folder(), "ternary", tmp_path / "whole", overrides=overrides, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        api.quantize(
            digits_folder(), "ternary", tmp_path / "broken", overrides=overrides, device="cpu", reporter=Stop()
        )
    assert not (tmp_path / "broken").exists()
    api.quantize(digits_folder(), "ternary", tmp_path / "broken", overrides=overrides, device="cpu")
    files = [next((tmp_path / n / "transformer").glob("*.safetensors")).read_bytes() for n in ("whole", "broken")]
    assert files[0] == files[1]


def test_the_original_in_memory_is_not_changed() -> None:
    model = families.get("dit").tiny()
    before = copy.deepcopy(model.state_dict())
    chosen = recipe.load_recipe("ternary", ["training.steps=2", "training.images=2", "training.sample_steps=2"])
    result = api.quantize(model, chosen)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(result.model, nn.Module)


def test_bad_recipes_are_one_line(tmp_path: Path) -> None:
    model = families.get("dit").tiny()
    for rule, words in (
        ({"weight": {"format": "int"}, "steps": ["terdit"]}, "give format: ternary"),
        ({"weight": {"format": "vq", "row_scale": True}, "steps": ["vq4dit"]}, "without row_scale"),
        ({"weight": {"format": "int", "bits": 8}, "steps": ["adaround"]}, "use 6 bits or fewer"),
        ({"weight": {"format": "int"}, "output_norm": "rms", "steps": ["rtn"]}, "use terdit"),
        ({"weight": {"format": "ternary"}, "rotate": "full", "steps": ["terdit"]}, "leave out rotate"),
    ):
        few = {"steps": 1, "images": 2, "sample_steps": 2}
        chosen = recipe.parse_recipe({"name": "bad", "training": few, "rules": [rule]}, "test")
        with pytest.raises(DitcompressError, match=r"E202") as caught:
            api.quantize(model, chosen)
        assert words in caught.value.line()
    without = recipe.parse_recipe(
        {"name": "bad", "rules": [{"weight": {"format": "ternary"}, "steps": ["terdit"]}]}, "test"
    )
    with pytest.raises(DitcompressError, match=r"E202.*section training"):
        api.quantize(model, without)
