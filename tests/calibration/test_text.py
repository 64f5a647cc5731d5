"""Prompts through the pipelines' own encoders: tiny random pipelines of every text family, saved as diffusers does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from ditcompress import api
from ditcompress.calibration.conditions import Conditions, get_conditions
from ditcompress.calibration.text import from_pipeline
from ditcompress.checkpoint.reader import open_checkpoint
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.models import adapter_for, flux, pixart, sd3

PROMPTS = ["a red cube", "two dogs on a hill", "rain"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip(width: int, *, projected: bool) -> dict[str, Any]:
    """A CLIP tokenizer of single letters with a two-layer text model of `width`."""
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=width, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    tokenizer = transformers.CLIPTokenizer({w: i for i, w in enumerate(words)}, [], model_max_length=77)
    return {"tokenizer": tokenizer, "text_encoder": cls(config)}


def t5(width: int = 48) -> dict[str, Any]:
    """A T5 tokenizer of letters and a two-layer encoder."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": transformers.T5EncoderModel(config)}


def numbered(parts: dict[str, Any], number: int) -> dict[str, Any]:
    return {f"{name}_{number}": part for name, part in parts.items()}


def pixart_pipeline() -> Any:
    return diffusers.PixArtAlphaPipeline(
        **t5(), vae=None, transformer=pixart.tiny(), scheduler=diffusers.DPMSolverMultistepScheduler()
    )


def sd3_pipeline(third: bool = True) -> Any:
    last = t5() if third else {"tokenizer": None, "text_encoder": None}
    return diffusers.StableDiffusion3Pipeline(
        **clip(16, projected=True), **numbered(clip(16, projected=True), 2), **numbered(last, 3), vae=None,
        transformer=sd3.tiny(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def sd3_without_t5() -> Any:
    return sd3_pipeline(third=False)


def flux_pipeline() -> Any:
    return diffusers.FluxPipeline(
        **clip(32, projected=False), **numbered(t5(), 2), vae=None, transformer=flux.tiny(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


PIPELINES = {"pixart": pixart_pipeline, "sd3": sd3_pipeline, "sd3-no-t5": sd3_without_t5, "flux": flux_pipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines") / request.param
    PIPELINES[request.param]().save_pretrained(folder)
    return folder


def absent(pipeline: Path) -> dict[str, None]:
    """The components that diffusers wants named when they were saved as absent."""
    index = json.loads((pipeline / "model_index.json").read_text())
    return {name: None for name, value in index.items() if value == [None, None]}


def encoded(pipeline: Path, count: int = 5) -> Conditions:
    source = open_checkpoint(pipeline)
    return get_conditions(source, adapter_for(source.config), count, 0, prompts=PROMPTS)


def test_every_prompt_is_encoded_once_and_drives_the_model(pipeline: Path) -> None:
    found = encoded(pipeline)
    assert (found.distinct, found.count, found.prompts) == (3, 5, tuple(PROMPTS))
    assert "3 prompts" in found.source
    source = open_checkpoint(pipeline)
    adapter = adapter_for(source.config)
    model = adapter.tiny()
    taken = found.take([0, 4, 3])
    assert torch.equal(*(taken.cond["encoder_hidden_states"][i] for i in (0, 2)))  # the fourth image is prompt 0 again
    latents = torch.randn(3, *adapter.latent_shape(model.config), generator=torch.Generator().manual_seed(0))
    latents[2] = latents[0]
    with torch.no_grad():
        output = adapter.predict(model, latents, torch.full((3,), 500.0), taken.cond)
    assert torch.allclose(output[0], output[2], atol=1e-5)
    assert output.isfinite().all()


def test_the_encoding_is_that_of_the_pipeline_itself(pipeline: Path) -> None:
    kind = json.loads((pipeline / "model_index.json").read_text())["_class_name"]
    whole = getattr(diffusers, kind).from_pretrained(pipeline, **absent(pipeline), torch_dtype=torch.float32)
    more = {} if kind == "FluxPipeline" else {"do_classifier_free_guidance": True}
    again = [PROMPTS] if kind == "FluxPipeline" else [PROMPTS, PROMPTS] if "3" in kind else []
    with torch.no_grad():
        expected = whole.encode_prompt(PROMPTS, *again, **more)[0]
    assert torch.equal(encoded(pipeline).cond["encoder_hidden_states"], expected)


def test_a_guided_family_has_the_empty_prompt_as_its_null_branch(pipeline: Path) -> None:
    found = encoded(pipeline)
    if pipeline.name == "flux":
        assert found.null is None
        return
    assert found.null is not None
    null = found.null["encoder_hidden_states"]
    assert torch.allclose(null[0], null[2])
    assert null.shape == found.cond["encoder_hidden_states"].shape


def test_a_pipeline_is_quantized_with_its_own_prompts(pipeline: Path, tmp_path: Path) -> None:
    little = ["calibration.samples=2", "calibration.steps=2"]
    done = api.quantize(pipeline, "w4a8", tmp_path / "out", overrides=little)
    assert done.path is not None
    reloaded = diffusers.DiffusionPipeline.from_pretrained(done.path, **absent(pipeline), torch_dtype=torch.float32)
    assert type(reloaded.transformer).__name__ == type(PIPELINES[pipeline.name]().transformer).__name__
    for change in (False, True):  # another text encoder makes other conditions of the same prompts
        copied, reporter = tmp_path / str(change), Silent()
        shutil.copytree(pipeline, copied)  # with its times
        if change:
            os.utime(copied / "text_encoder" / "config.json", (1, 1))
        api.quantize(copied, "w4a8", tmp_path / f"{change}-out", overrides=little, reporter=reporter)
        assert any("earlier run are used" in note for note in reporter.notes) != change


def test_an_unknown_pipeline_asks_for_a_conditions_file(pipeline: Path, tmp_path: Path) -> None:
    copied = tmp_path / "other"
    shutil.copytree(pipeline, copied)
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "_class_name": "ChromaPipeline"}))
    with pytest.raises(DitcompressError, match="--conditions FILE") as caught:
        from_pipeline(copied, PROMPTS, 2, {})
    assert caught.value.code == "E330"


def test_broken_text_encoders_are_one_clear_line(pipeline: Path, tmp_path: Path) -> None:
    copied = tmp_path / "broken"
    shutil.copytree(pipeline, copied)
    (copied / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(DitcompressError, match="text encoders do not run") as caught:
        from_pipeline(copied, PROMPTS, 2, {})
    assert "\n" not in caught.value.line()
