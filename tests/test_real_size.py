"""benchmarks/real_size.py: the checkpoint it makes, and how it measures and limits memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from conftest import ROOT
from fluxc.families.klein import KLEIN
from fluxc.families.prompting import render_template

sys.path.insert(0, str(ROOT / "benchmarks"))

import real_size_checkpoint as made
import real_size_faults
import real_size_grown as grown
import real_size_place
from real_size_watch import START, watched

ALLOCATES = """\
import json, sys, time
def tell(event, **more):
    print(json.dumps({"tool": "fluxc", "message": event, "event": event, "title": "fill", **more}), file=sys.stderr)
tell("begins")
held = b"x" * (300 << 20)
time.sleep(0.3)
tell("done", seconds=0.3)
print("made", flush=True)
"""


@pytest.mark.parametrize("widths", ["klein-4b", "klein-9b", "dev"])
def test_tensors_are_those_of_diffusers_and_transformers(widths: str) -> None:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    shape = made.Shape(widths, 2, 3, made.LEAST_LAYERS[widths])
    with torch.device("meta"):
        encoder = (
            Mistral3ForConditionalGeneration(Mistral3Config.from_dict(shape.text_encoder))
            if widths == "dev"
            else Qwen3ForCausalLM(Qwen3Config.from_dict(shape.text_encoder))
        )
        models = {
            "transformer": Flux2Transformer2DModel.from_config(shape.transformer),
            "text_encoder": encoder,
            "vae": AutoencoderKLFlux2.from_config(shape.vae),
        }
    for component, tensors in shape.tensors().items():
        expected = {name: tuple(value.shape) for name, value in models[component].state_dict().items()}
        if shape.text_encoder["tie_word_embeddings"]:
            expected.pop("lm_head.weight", None)
        if component == "text_encoder" and shape.is_dev:
            inner, ours = "model.language_model.", "language_model.model."
            expected = {ours + name.removeprefix(inner): s for name, s in expected.items() if name.startswith(inner)}
        assert tensors == expected


def test_a_grown_checkpoint_makes_the_image_of_flux2_nano_in_diffusers(tmp_path: Path) -> None:
    from diffusers import Flux2KleinPipeline

    small, text = (
        json.loads((made.NANO / name / "config.json").read_text()) for name in ("transformer", "text_encoder")
    )
    configs = {
        "transformer": small
        | {
            "attention_head_dim": 64,
            "axes_dims_rope": [16] * 4,
            "num_attention_heads": 8,
            "joint_attention_dim": 3 * 64,
        }
        | {"num_layers": 3, "num_single_layers": 8, "timestep_guidance_channels": 256},
        "text_encoder": text
        | {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
        | {"intermediate_size": 200, "num_hidden_layers": 30, "max_window_layers": 30}
        | {"layer_types": ["full_attention"] * 30},
    }
    grown.make(tmp_path / "grown", configs)
    images = []
    for folder in (made.NANO, tmp_path / "grown"):
        pipeline = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        latents = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(1))
        arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "latents": latents}
        text_arguments = {"max_sequence_length": 32, "text_encoder_out_layers": (9, 18, 27)}
        images.append(pipeline(prompt="a red circle", output_type="np", **arguments, **text_arguments).images[0])
    assert images[0].std() > 0.1
    assert np.sqrt(np.mean((images[1] - images[0]) ** 2)) < 0.002


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_grown_checkpoint_has_the_tensors_of_its_size(component: str) -> None:
    config = grown.configs_of(made.Shape())[component]
    same = made.Shape().tensors()[component]
    found = grown.tensors_of(component, config)
    other = {"x_embedder.weight", "proj_out.weight"} if component == "transformer" else set()
    assert {name for name in {*found, *same} if found.get(name) != same.get(name)} == other


def test_published_klein_4b_is_as_large_as_published() -> None:
    sizes = {
        component: sum(made._bytes_of(name, shape) for name, shape in tensors.items())
        for component, tensors in made.Shape().tensors().items()
    }
    assert round(sizes["transformer"] / 1e9, 2) == 7.75
    assert round(sizes["text_encoder"] / 1e9, 2) == 8.04
    assert round(sizes["vae"] / 1e9, 3) == 0.168


def test_numbers_follow_from_seed_and_name_and_are_rounded_as_torch_rounds() -> None:
    name = "transformer_blocks.0.attn.to_out.0.weight"
    (chunk,) = made.chunks_of("transformer", name, (1000, 256), seed=5)
    values = np.random.Generator(np.random.SFC64(np.random.SeedSequence(chunk.seed))).standard_normal(
        chunk.shape, np.float32
    )
    values *= np.float32(1 / 16)
    rows = np.array(chunk.outliers)
    assert len(rows) == 2
    values[rows] *= 4
    bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    assert made.draw(chunk) == bits.tobytes()
    (other,) = made.chunks_of("transformer", name.replace("0.attn", "1.attn"), (1000, 256), seed=5)
    assert other.outliers == chunk.outliers
    assert made.draw(other) != made.draw(chunk)


def test_shards_hold_what_one_file_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"model.layers.{n}.self_attn.o_proj.weight": (300, 64) for n in range(5)} | {"model.norm.weight": (64,)}
    monkeypatch.setattr(made, "CHUNK", 64 * 100)
    for folder, limit in (("one", 10**9), ("several", 90_000)):
        (tmp_path / folder).mkdir()
        monkeypatch.setitem(made.SHARDS, "text_encoder", limit)
        made.write_component(tmp_path / folder, "text_encoder", tensors, made.random_pieces("text_encoder", seed=1))
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as whole:
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "several" / file, "pt") as part:
                assert torch.equal(part.get_tensor(name), whole.get_tensor(name))
        assert whole.get_tensor("model.norm.weight").eq(1).all()


def test_tokenizer_has_qwens_special_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    made.write_tokenizer(folder)
    rendered = render_template(folder, "Qwen2Tokenizer", KLEIN.prompts, folder)
    assert rendered == {
        "prefix": "<|im_start|>user\n",
        "suffix": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "pad_id": 151643,
    }


def test_a_stage_is_measured_and_ended_above_the_limit() -> None:
    command = [sys.executable, "-c", ALLOCATES]
    run = watched(command, limit=2 << 30)
    stages = {stage.title: stage for stage in run.stages}
    assert (run.status, run.out, run.over_limit) == (0, "made\n", False)
    assert stages[START].held < 100 << 20
    assert 300 << 20 <= stages["fill"].held <= stages["fill"].resident < 400 << 20
    ended = watched(command, limit=150 << 20)
    assert ended.over_limit
    assert ended.status == -9
    assert ended.out == ""


def test_a_filled_disk_has_the_room_that_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 64 << 20
    monkeypatch.setattr(
        real_size_faults, "_free", lambda folder: free - (folder / real_size_faults.FILLER).stat().st_size
    )
    real_size_faults.fill(tmp_path, 40 << 20)
    assert (tmp_path / real_size_faults.FILLER).stat().st_size == 24 << 20


def test_bundles_are_compared_by_everything_but_their_time(tmp_path: Path) -> None:
    for number, built in enumerate(("monday", "tuesday")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "bundle.json").write_text(json.dumps({"name": "a", "provenance": {"built_at": built}}))
        (folder / "weights").write_bytes(b"1")
    first, second = (real_size_place.hashes(tmp_path / name) for name in "01")
    assert real_size_place.compared(second, first).startswith("The same bytes in all 2 files")
    (tmp_path / "1" / "weights").write_bytes(b"2")
    assert real_size_place.compared(real_size_place.hashes(tmp_path / "1"), first) == "**1 of 2 files differ**: weights"
