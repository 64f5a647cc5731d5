"""Text sides of two-stream blocks that become linear: what they compute, their fit, and that the result loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditcompress import api, prune
from ditcompress.errors import DitcompressError
from ditcompress.loading import load_model
from ditcompress.models import registry as families
from ditcompress.models._inputs import built
from ditcompress.pruning import Probe
from ditcompress.pruning.width import cut_axes, linear_text, narrowing
from ditcompress.pruning.width.linear_text import Params
from ditcompress.text_stream import Nothing, TextInput, parts_of, runs, stand_ins, text_replaced

from .models import deep, inputs, run, same_everywhere
from .test_width_methods import context

B = "transformer_blocks"
FEW = ["samples=1", "steps=2", "timesteps=1", "batch=1"]
OPTIONS: dict[str, Any] = {"width_ratio": 0.3, "width_method": "linear-text", "width_overrides": FEW}
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Texts:
    """The modulated text and the text after each block of one forward pass."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self.attended: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}
        self.handles = []
        for n in range(count):
            block = model.get_submodule(f"{B}.{n}")
            see = lambda m, a, k, n=n: self.attended.__setitem__(n, k["encoder_hidden_states"])  # noqa: E731
            self.handles.append(block.get_submodule("attn").register_forward_pre_hook(see, with_kwargs=True))
            after = lambda m, a, y, n=n: self.left.__setitem__(n, y[0])  # noqa: E731
            self.handles.append(block.register_forward_hook(after))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_zeros_pass_the_anchors_text_on_and_linears_add_to_it(family: str) -> None:
    model = deep(family)
    group = [f"{B}.0", f"{B}.1", f"{B}.2"]
    made = stand_ins(model, group)
    for module in made.values():
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    given = inputs(family, model)
    with text_replaced(model, {(group[0], group[-1]): made}):
        seen = Texts(model, 3)
        run(family, model, given)
        assert torch.equal(seen.attended[1], seen.attended[0]) and torch.equal(seen.attended[2], seen.attended[0])
        assert torch.equal(seen.left[1], seen.left[0]) and torch.equal(seen.left[2], seen.left[0])
        end: Any = made[f"{B}.2.ff_context"]
        nn.init.normal_(end.weight)
        nn.init.normal_(made[f"{B}.1.norm1_context"].project.weight)  # type: ignore[arg-type, union-attr]
        run(family, model, given)
        first = seen.attended[0]
        step: Any = made[f"{B}.1.norm1_context"]
        torch.testing.assert_close(seen.attended[1], first + first @ step.project.weight.T)
        assert torch.equal(seen.attended[2], first) and torch.equal(seen.left[1], seen.left[0])
        torch.testing.assert_close(seen.left[2], seen.left[0] + seen.left[0] @ end.weight.T)
        seen.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(isinstance(m, (TextInput, Nothing)) for m in model.modules())


def test_the_fit_is_least_squares_from_the_anchors_text_and_groups_grow() -> None:
    model = deep("sd3")
    found = context("sd3", model, 0.45)
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn((4, *found.adapter.latent_shape(model.config)), generator=draw)
    cond = found.adapter.random_conditions(model.config, 4, draw)
    found.probes = (Probe(0, latents, torch.full((4,), 400), cond, 1.0),)
    made = narrowing(found, linear_text, cut_axes(found.layout, "both"), Params(ridge=1e-10))
    assert made.damage is not None and 0 < made.damage < 1 and not made.kept
    seen = Texts(model, 4)
    with torch.no_grad():
        found.predict(found.probes[0])
    seen.close()
    for (anchor, last), modules in made.text.items():
        a, z = int(anchor.rpartition(".")[2]), int(last.rpartition(".")[2])
        for n in range(a + 1, z + 1):
            x, y = (seen.attended[k].flatten(0, -2).double() for k in (a, n))
            module: Any = modules[f"{B}.{n}.norm1_context"]
            wide = torch.cat([x, torch.ones(len(x), 1).double()], 1)
            wanted = torch.linalg.lstsq(wide, y - x).solution
            assert len(x) > x.shape[1] and torch.allclose(module.project.weight.T.double(), wanted[:-1], atol=1e-3)
        x, y = (seen.left[k].flatten(0, -2).double() for k in (a, z))
        wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], 1), y - x).solution
        end: Any = modules[f"{B}.{z}.ff_context"]
        assert torch.allclose(end.weight.T.double(), wanted[:-1], atol=1e-3)
    alone = narrowing(found, linear_text, [], Params(ridge=1e-10, longest=1))
    assert {int(z.rpartition(".")[2]) - int(a.rpartition(".")[2]) for a, z in alone.text} == {1}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_result_is_the_same_in_memory_in_a_folder_and_for_stock_diffusers(family: str, tmp_path: Path) -> None:
    model, made, loaded = same_everywhere(family, tmp_path, OPTIONS)
    ((anchor, last),) = made.facts["width"]["text"]
    d = 64
    count = int(last.rpartition(".")[2]) - int(anchor.rpartition(".")[2])
    lost = 6 * d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1) + d * (d + 1)  # modulation, feed-forward, output
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in loaded.parameters())
    assert gone == count * (lost - d * (d + 1)) - d * (d + 1)
    with pytest.raises(DitcompressError, match="E322"):
        prune(loaded, **OPTIONS)


def test_it_trains_quantizes_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    deep("sd3").save_pretrained(tmp_path / "original")  # type: ignore[operator]
    prune(tmp_path / "original", 0.25, tmp_path / "small", method="magnitude", **OPTIONS)
    few: dict[str, Any] = {"steps": 2, "batch": 2, "images": 2, "sample_steps": 2, "device": "cpu"}
    api.distill(tmp_path / "original", tmp_path / "small", tmp_path / "trained", checkpointing=True, **few)
    names = load_file(tmp_path / "small" / WEIGHTS), load_file(tmp_path / "trained" / WEIGHTS)
    (project,) = [name for name in names[0] if name.endswith("project.weight")][:1]
    assert not torch.equal(names[0][project], names[1][project])
    api.quantize(tmp_path / "trained", "w8a16", tmp_path / "packed")
    facts = api.inspect(tmp_path / "packed")
    assert any(row["name"] + ".weight" == project and row["bits"] < 16 for row in facts["layers"])
    model, _ = load_model(tmp_path / "packed")
    code = (
        "import ditcompress, torch; from diffusers import SD3Transformer2DModel as M\n"
        f"m = M.from_pretrained({str(tmp_path / 'packed')!r}).eval().requires_grad_(False)\n"
        "y = m(torch.ones(1, 4, 8, 8), torch.ones(1, 5, 48), torch.ones(1, 32), torch.tensor([500]))[0]\n"
        "print(float(y.double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    with torch.no_grad():
        y = model(torch.ones(1, 4, 8, 8), torch.ones(1, 5, 48), torch.ones(1, 32), torch.tensor([500]))[0]
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(float(y.double().sum()), rel=1e-4)
    with pytest.raises(DitcompressError, match="E205"):
        api.export(tmp_path / "packed", tmp_path / "plain")


def test_qwen_blocks_have_a_text_side_too() -> None:
    from diffusers import QwenImageTransformer2DModel

    sizes: dict[str, Any] = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3}
    sizes |= {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 24}
    sizes["axes_dims_rope"] = (4, 6, 6)
    model = built(QwenImageTransformer2DModel, sizes, 0)
    (stretch,) = runs(model, families.get("generic").layout(model).blocks)
    made = stand_ins(model, stretch)
    before = sum(p.numel() for p in model.parameters())
    with text_replaced(model, {(stretch[0], stretch[-1]): made}):
        seen = Texts(model, 3)
        with torch.no_grad():
            y = model(
                hidden_states=torch.ones(1, 16, 16), encoder_hidden_states=torch.ones(1, 5, 24),
                encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.bool), timestep=torch.ones(1),
                img_shapes=[[(1, 4, 4)]],
            )[0]  # fmt: skip
        seen.close()
        assert bool(y.isfinite().all())
        step: Any = made[f"{B}.1.txt_norm1"]
        torch.testing.assert_close(seen.attended[1], seen.attended[0] + step.project(seen.attended[0]))
        end: Any = made[f"{B}.2.txt_mlp"]
        assert torch.equal(seen.left[1], seen.left[0])
        torch.testing.assert_close(seen.left[2], seen.left[1] + end(seen.left[1]))
        d = 64
        lost = 6 * d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1) + d * (d + 1)
        after = sum(p.numel() for p in model.parameters())
        assert before - after == 2 * lost - 3 * d * (d + 1)
        assert {s.name for s in families.get("generic").layout(model).sites} >= {f"{B}.1.txt_norm1.project"}


def test_blocks_that_only_look_alike_have_no_text_side() -> None:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
    from diffusers.models.transformers.transformer_flux2 import Flux2TransformerBlock
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformerBlock

    assert parts_of(FluxTransformerBlock(16, 2, 8)) is not None
    assert parts_of(Flux2TransformerBlock(16, 2, 8)) is None  # modulates beside its norm
    assert parts_of(HunyuanVideoTransformerBlock(2, 8, 2.0)) is None  # gives (image, text)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("dit", {}, r"E205 .*no neighbouring blocks with a text stream"),
        ("pixart", {}, "E205"),
        ("sd3", {"width_ratio": 0.99}, r"E203 bad-option\]: --width-ratio 0.99: linears save 0\.6"),
        ("sd3", {"width_overrides": ["longest=0"]}, "E203"),
    ],
)
def test_bad_options_are_one_line(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DitcompressError, match=message):
        prune(deep(family), **{**OPTIONS, **options})


@pytest.mark.parametrize("how", ["nowhere", "twice", "turned", "single", "missing", "more"])
def test_a_damaged_entry_is_refused_by_both_doors(how: str, tmp_path: Path) -> None:
    model, out = deep("flux"), tmp_path / "linear"
    prune(model, **OPTIONS).model.save_pretrained(out)  # type: ignore[union-attr]
    config = json.loads((out / "config.json").read_text())
    listed = config["quantization_config"]["text"]
    tensors = load_file(out / WEIGHTS)
    gone = next(name for name in tensors if name.endswith("project.weight"))
    if how == "missing":
        save_file({n: t for n, t in tensors.items() if n != gone}, out / WEIGHTS)
    elif how == "more":
        save_file({**tensors, gone.replace("project", "linear"): tensors[gone] + 1}, out / WEIGHTS)
    else:
        entry = {"nowhere": ["a", "b"], "twice": listed[0], "turned": listed[0][::-1], "single": [f"single_{B}.0"] * 2}
        config["quantization_config"]["text"] = [*(listed if how == "twice" else []), entry[how]]
        (out / "config.json").write_text(json.dumps(config))
    code = {"missing": "E315", "more": "E316"}.get(how, "E320")
    with pytest.raises(DitcompressError, match=code):
        load_model(out)
    with pytest.raises(DitcompressError, match=code):
        type(model).from_pretrained(out)  # type: ignore[attr-defined]
