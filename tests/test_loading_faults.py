"""What stock diffusers would only warn about, or load wrongly, is refused at both doors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers import WanTransformer3DModel as Wan
from safetensors.torch import load_file, save_file

import ditcompress
from ditcompress import api
from ditcompress.errors import DitcompressError
from ditcompress.loading import DitcompressConfig, load_model
from ditcompress.models import dit
from ditcompress.runtime.linear import PackedLinear

LAYER = "transformer_blocks.0.attn1.to_k"
DOORS: dict[str, Callable[[Path], Any]] = {"ours": load_model, "stock": DiTTransformer2DModel.from_pretrained}
each_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@pytest.fixture
def damaged(w4a8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(w4a8, tmp_path / "model"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def failure(door: Callable[[Path], Any], folder: Path) -> DitcompressError:
    with pytest.raises(DitcompressError) as caught:
        door(folder)
    return caught.value


@each_door
def test_a_packed_layer_without_its_scale(door: Any, damaged: Path) -> None:
    change_tensors(damaged, lambda t: t.pop(f"{LAYER}.scale"))
    error = failure(door, damaged)
    assert error.code == "E315" and f"{LAYER}.scale" in str(error)


@each_door
def test_a_tensor_that_the_scheme_does_not_know(door: Any, damaged: Path) -> None:
    change_tensors(damaged, lambda t: t.update({f"{LAYER}.low_rank_up": torch.ones(4, 4)}))
    error = failure(door, damaged)
    assert error.code == "E316" and f"{LAYER}.low_rank_up" in str(error)


@each_door
@pytest.mark.parametrize("name,dtype", [("qweight", torch.float32), ("scale", torch.bfloat16)])
def test_a_packed_tensor_in_another_dtype(door: Any, damaged: Path, name: str, dtype: torch.dtype) -> None:
    change_tensors(damaged, lambda t: t.update({f"{LAYER}.{name}": t[f"{LAYER}.{name}"].to(dtype)}))
    error = failure(door, damaged)
    assert error.code == "E318" and f"{LAYER}.{name}" in str(error) and str(dtype)[6:] in str(error)


CONFIG_FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "version": lambda q: q.update(version=2),
    "schemes": lambda q: q.pop("schemes"),
    "layers": lambda q: q.update(layers=[LAYER]),
    f"layers.{LAYER}": lambda q: q["layers"].update({LAYER: "77"}),
    "rotation": lambda q: q.update(rotation=True),
    "schemes.0.activation.mode": lambda q: q["schemes"]["0"]["activation"].update(mode="x"),
}


@each_door
@pytest.mark.parametrize("key,change", CONFIG_FAULTS.items(), ids=CONFIG_FAULTS)
def test_a_configuration_that_cannot_be_followed(door: Any, damaged: Path, key: str, change: Any) -> None:
    change_config(damaged, change)
    error = failure(door, damaged)
    assert error.code == "E320" and error.where.endswith(f"quantization_config.{key}")


def test_quantizing_while_loading_is_refused_with_the_way_to_do_it(tiny_dit: Path) -> None:
    with pytest.raises(DitcompressError, match="ditcompress quantize") as caught:
        DiTTransformer2DModel.from_pretrained(tiny_dit, quantization_config=DitcompressConfig({}, {}))
    assert caught.value.code == "E205"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_doors_keep_in_float32_what_the_class_keeps_there(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = Wan(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    small.save_pretrained(tmp_path / "wan")
    api.quantize(tmp_path / "wan", "w8a16", tmp_path / "small")
    ours, _ = load_model(tmp_path / "small", dtype=dtype)
    stock = Wan.from_pretrained(tmp_path / "small", torch_dtype=dtype).state_dict()
    assert ours.scale_shift_table.dtype == torch.float32
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == stock[name].dtype and torch.equal(tensor, stock[name]), name


def test_load_is_the_checked_door(w4a8: Path) -> None:
    model, checkpoint = ditcompress.load(w4a8, dtype=torch.bfloat16)
    assert isinstance(model.get_submodule(LAYER), PackedLinear) and checkpoint.quantization is not None
    assert "load" in dir(ditcompress)


def test_a_bfloat16_pipeline_keeps_the_stored_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))  # fmt: skip # noqa: E501
    DiTPipeline(dit.tiny(), vae, DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    api.quantize(tmp_path / "pipe", "w8a16", tmp_path / "small")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "small", torch_dtype=torch.bfloat16)
    layer = pipe.transformer.get_submodule(LAYER)
    on_disk = load_file(tmp_path / "small/transformer/diffusion_pytorch_model.safetensors")
    assert layer.bias.dtype == torch.bfloat16
    for name, tensor in layer.stored_tensors().items():
        assert tensor.dtype == on_disk[f"{LAYER}.{name}"].dtype and torch.equal(tensor, on_disk[f"{LAYER}.{name}"])


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_us_imports_nothing_heavy() -> None:
    code = """
    import sys, ditcompress
    print(sorted({"torch", "diffusers", "transformers", "numpy", "pydantic"} & set(sys.modules)))
    """
    assert fresh(code) == "[]"


def test_a_tool_that_only_looks_for_the_module_does_not_lose_the_registration() -> None:
    code = """
    import sys, ditcompress
    hook = next(f for f in sys.meta_path if type(f).__module__ == "ditcompress")
    import diffusers
    assert "diffusers.quantizers.auto" not in sys.modules
    path = [diffusers.__path__[0] + "/quantizers"]
    assert hook.find_spec("diffusers.quantizers.auto", path) is not None
    import diffusers.quantizers.auto as auto
    print("ditcompress" in auto.AUTO_QUANTIZER_MAPPING, hook in sys.meta_path)
    """
    assert fresh(code).splitlines()[-1] == "True False"
