"""Every stage against diffusers on the same input: as the report of each build records it, and on random models."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from conftest import NANO, RecordingProgress, compile_into, copy_checkpoint, exported
from fluxc.base.safetensors import read_header
from fluxc.fidelity.metrics import relative_error
from fluxc.graph import OPSET, export
from fluxc.graph.bind import argument_names
from fluxc.graph.compose import compose_body
from fluxc.graph.export import trace
from fluxc.graph.modules import Signal
from fluxc.targets.onnxruntime.lower import lower
from fluxrt.schedule import flow_match_sigmas
from quick import QUICK
from test_dev import PROMPTS


def report(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "report" / "report.json").read_text())["targets"]


def test_in_full_precision_every_stage_equals_diffusers(exact_bundle: Path) -> None:
    figures = report(exact_bundle)["onnxruntime"]
    for stage in ("text_error", "prologue_error", "step_error", "decode_error"):
        assert figures[stage] <= 1e-3, stage
    assert figures["image_psnr_db_worst"] >= 50
    assert len(figures["prompts"]) == 8
    assert all(len(prompt["step_error"]) == 24 for prompt in figures["prompts"])


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-nvfp4"])
def test_with_nvfp4_every_steps_velocity_keeps_its_direction(nano_bundle: Path, target: str) -> None:
    figures = report(nano_bundle)[target]
    assert figures["step_cosine"] >= 0.98
    assert all(len(prompt["step_cosine"]) == 24 for prompt in figures["prompts"])
    for stage in ("text_error", "prologue_error", "decode_error"):
        assert figures[stage] <= 1e-3, stage


def test_rounding_activations_changes_the_result(nano_bundle: Path) -> None:
    figures = report(nano_bundle)
    assert figures["onnxruntime-nvfp4"]["step_error"] > figures["onnxruntime"]["step_error"]


@pytest.mark.parametrize("size", [(64, 64), (256, 512), (1024, 1024), (2048, 2048)])
@pytest.mark.parametrize("steps", [1, 4, 24, 50])
def test_schedule_equals_diffusers(size: tuple[int, int], steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    tokens = size[0] // 16 * (size[1] // 16)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    even = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=even, mu=compute_empirical_mu(image_seq_len=tokens, num_steps=steps))
    np.testing.assert_allclose(flow_match_sigmas(tokens, steps), scheduler.sigmas.numpy(), rtol=2e-6)


SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": [8, 8, 8, 8],
    "mlp_ratio": 3.0,
    "rope_theta": 2000,
    "eps": 1e-6,
}


LENGTH = 7


def traced(embedded: bool) -> dict[str, onnx.ModelProto]:
    return exported("transformer", {**SMALL, "guidance_embeds": embedded}, LENGTH, cfg_batch=not embedded)


@pytest.mark.parametrize(("embedded", "branches", "grid"), [(True, 1, (3, 5)), (False, 2, (4, 4)), (False, 1, (7, 3))])
def test_a_step_of_a_random_model_equals_diffusers(embedded: bool, branches: int, grid: tuple[int, int]) -> None:
    """dev's embedded guidance, klein's two branches, one branch; sizes whose rows and columns differ."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    config = {**SMALL, "guidance_embeds": embedded}
    model = Flux2Transformer2DModel.from_config(config).eval()
    tokens = grid[0] * grid[1]
    pieces = traced(embedded)
    neutral = {
        "prologue": pieces["prologue"],
        "body": compose_body(pieces, 2, 2, LENGTH),
        "epilogue": pieces["epilogue"],
    }
    weights = {name: value.numpy() for name, value in model.state_dict().items()}

    latents, text = torch.randn(1, tokens, 16), torch.randn(branches, LENGTH, 48)
    sigma, next_sigma, guidance = 0.7, 0.4, 3.0
    with torch.no_grad():
        velocities = model(
            hidden_states=latents.expand(branches, -1, -1),
            encoder_hidden_states=text,
            timestep=torch.full((branches,), sigma),
            guidance=torch.full((branches,), guidance) if embedded else None,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 16, *grid)),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text),
            return_dict=False,
        )[0]
    velocity = velocities[:1]
    if branches == 2:
        velocity = velocities[1:] + guidance * (velocities[:1] - velocities[1:])
    expected = latents + (next_sigma - sigma) * velocity

    state = {
        "latents": latents.numpy(),
        "text": text.numpy(),
        "columns": np.array(grid[1]),
        "sigma": np.array(sigma, dtype=np.float32),
        "next_sigma": np.array(next_sigma, dtype=np.float32),
        "guidance": np.array(guidance, dtype=np.float32),
    }
    for name, model_proto in neutral.items():
        state.update(run(model_proto, name, weights, state))
    assert relative_error(state["next_latents"], expected.numpy()) < 1e-5


def run(
    neutral: onnx.ModelProto, name: str, weights: dict[str, np.ndarray], state: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Run a neutral graph with fp32 weights held in the graph."""
    arguments = argument_names(neutral)
    lowered = lower(neutral, arguments, dict.fromkeys(weights, "F32"), {}, "none")
    wanted = [value.name for value in lowered.graph.input]
    for weight in [w for w in wanted if w not in arguments]:
        lowered.graph.initializer.append(onnx.numpy_helper.from_array(weights[weight], weight))
    kept = [value for value in lowered.graph.input if value.name in arguments]
    inputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del lowered.graph.input[:]
    lowered.graph.input.extend(inputs)
    session = onnxruntime.InferenceSession(lowered.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {value.name: state[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_the_bundles_text_encoder_loads_in_transformers_and_encodes_alike(nano_bundle: Path) -> None:
    """The bundle is a diffusers folder: an unmodified loader must get the embeddings the pipeline takes."""
    from transformers import Qwen3ForCausalLM

    import fluxrt

    encoder = Qwen3ForCausalLM.from_pretrained(nano_bundle / "text_encoder", dtype=torch.float32)
    pipeline = fluxrt.load(nano_bundle)
    prompt = "a small blue ring at the top on a white background"
    ids, mask = pipeline.tokenize([prompt])
    with torch.no_grad():
        states = encoder(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True
        ).hidden_states
    expected = torch.cat([states[k] for k in (9, 18, 27)], dim=-1).numpy()
    assert relative_error(pipeline.encode_text(prompt, 1.0), expected) < 1e-5


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_tokens_padding_mask_and_embeddings_of_klein_are_diffusers(exact_bundle: Path, prompt: str) -> None:
    """dev's are in test_dev.py."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    import fluxrt

    encoder = Qwen3ForCausalLM.from_pretrained(NANO / "text_encoder", dtype=torch.float32)
    tokenizer = Qwen2TokenizerFast.from_pretrained(NANO / "tokenizer")
    seen: dict[str, Any] = {}
    encoder.register_forward_pre_hook(lambda _module, _args, given: seen.update(given), with_kwargs=True)
    with torch.no_grad():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(encoder, tokenizer, prompt, max_sequence_length=32)
    with fluxrt.load(exact_bundle, target="onnxruntime") as pipeline:
        ids, mask = pipeline.tokenize([prompt])
        text = pipeline.encode_text(prompt, 1.0)
    np.testing.assert_array_equal(ids, seen["input_ids"].numpy())
    np.testing.assert_array_equal(mask, seen["attention_mask"].numpy())
    assert relative_error(text, expected.numpy()) < 1e-5


def test_the_small_decoder_equals_diffusers(tmp_path: Path) -> None:
    """A VAE whose decoder has other widths than its encoder, as the one that is published for faster decoding."""
    from diffusers import AutoencoderKLFlux2
    from safetensors.torch import load_file

    checkpoint = copy_checkpoint(tmp_path / "small")
    config = json.loads((checkpoint / "vae" / "config.json").read_text())
    config["decoder_block_out_channels"] = [16, 32, 48]
    stored = load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2.from_config(config)
    vae.load_state_dict({name: t for name, t in stored.items() if not name.startswith("decoder.")}, strict=False)
    vae.to(torch.bfloat16).save_pretrained(checkpoint / "vae")
    plain = ("precision.transformer={default: bf16}", "targets=[{kind: onnxruntime}]")
    bundle = compile_into(tmp_path / "out", *QUICK, f"model.source={checkpoint}", *plain)
    figures = report(bundle)["onnxruntime"]
    assert max(figures["step_error"], figures["decode_error"]) <= 1e-3
    assert figures["image_psnr_db_worst"] >= 50
    written = read_header(bundle / "vae" / "diffusion_pytorch_model.safetensors")
    assert written["decoder.conv_out.weight"].shape == (3, 16, 3, 3)


def test_a_distilled_checkpoint_runs_one_branch_and_other_sizes_match_too(tmp_path: Path) -> None:
    """klein's distilled models ignore guidance; a size whose rows and columns differ is compared with diffusers."""
    import fluxrt

    checkpoint = copy_checkpoint(tmp_path / "distilled")
    index = checkpoint / "model_index.json"
    index.write_text(index.read_text().replace('"is_distilled": false', '"is_distilled": true'))
    progress = RecordingProgress()
    bundle = compile_into(
        tmp_path / "out",
        *QUICK,
        f"model.source={checkpoint}",
        "precision.transformer={default: bf16}",
        "targets=[{kind: onnxruntime}]",
        "sizes=[[32, 96], [64, 64]]",
        "sampling.guidance=4.0",
        progress=progress,
    )
    said = "sampling.guidance 4 changes nothing: this model is distilled and takes no guidance; leave it out"
    assert said in progress.said
    assert "| guidance, unless asked otherwise | 4 (this model takes no other) |" in (bundle / "README.md").read_text()
    figures = report(bundle)["onnxruntime"]
    assert max(figures["step_error"], figures["decode_error"], figures["prologue_error"]) <= 1e-3
    assert figures["image_psnr_db_worst"] >= 50
    pipeline = fluxrt.load(bundle)
    assert not pipeline.bundle.manifest.sampling.cfg_batch
    assert pipeline.encode_text("a", 4.0).shape[0] == 1
    for height, width in ((32, 96), (64, 64)):
        image = pipeline.generate(fluxrt.Request("a", size=(height, width), steps=1)).images[0]
        assert image.size == (width, height)


def test_torchs_operators_are_read_once_and_change_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    own, read = vars(ONNXRegistry)["from_torchlib"], ONNXRegistry.from_torchlib
    opsets: list[int] = []

    def counted(_: type, opset_version: int) -> Any:
        opsets.append(opset_version)
        return read(opset_version=opset_version)

    def traced_signal() -> bytes:
        return trace(
            Signal(1e-6),
            {
                "hidden": (torch.empty(2, 7, 16, device="meta"), {1: "tokens"}),
                "modulation_img": (torch.empty(1, 96, device="meta"), None),
                "previous_signal": (torch.empty(1, 7, 16, device="meta"), {1: "tokens"}),
            },
            ("signal", "change"),
        ).SerializeToString(deterministic=True)

    monkeypatch.setattr(export, "_REGISTRIES", {})
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    first, second = traced_signal(), traced_signal()
    assert opsets == [OPSET]
    monkeypatch.undo()
    assert vars(ONNXRegistry)["from_torchlib"] is own
    monkeypatch.setattr(export, "_operators_read_once", contextlib.nullcontext)
    assert first == second == traced_signal()
