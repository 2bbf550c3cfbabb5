"""The visual_gen folder: held against what VisualGen was read to take, and loaded by a rendering of its loader.

TensorRT-LLM itself was not run.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from PIL import Image

import fluxrt
from conftest import NANO, NANO_DEV, compile_into, copy_checkpoint, quantized_by_modelopt, write_hollow
from fluxc.base.errors import RecipeError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.build.job import open_job
from fluxc.checkpoint.components import WEIGHTS_FILE, weights_tensors
from fluxc.cli.main import main
from fluxc.families.base import Prompts
from fluxc.families.klein import KLEIN
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.writer import View, planned_tensors, write_views
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import ComponentPrecision
from fluxc.targets.visual_gen.check import faults_of
from fluxc.targets.visual_gen.folder import Settings, check_built_in, write_folder
from fluxrt.bundle import Bundle, open_bundle, verify_files
from fluxrt.choose import Machine, obstacle
from fluxrt.cuda import Gpu
from fluxrt.request import Request
from fluxrt.visual_gen import VisualGenPipeline
from quick import QUICK
from test_flux2_tables import KLEIN_4B

RECIPE = NANO.parent.parent / "recipes" / "flux2-nano.yaml"
PLAIN = "sampling.guidance=1.0"
TARGETS = "targets=[{kind: onnxruntime}, {kind: visual_gen, gpus: [1, 2, 4]}]"
PROMPT = "a small white ring at the top on a red background"


def with_sixteen_pixels(root: Path, source: Path) -> Path:
    """A copy of `source` with a VAE of 16 pixels a token, as VisualGen has built in, of random weights."""
    from diffusers import AutoencoderKLFlux2
    from safetensors.torch import load_file

    copy_checkpoint(root, source)
    config = json.loads((root / "vae" / "config.json").read_text())
    config["block_out_channels"] = [16, 16, 32, 32]
    for name in ("down_block_types", "up_block_types"):
        config[name] = config[name][:1] * 4
    statistics = {n: t for n, t in load_file(root / "vae" / WEIGHTS_FILE["vae"]).items() if n.startswith("bn.")}
    shutil.rmtree(root / "vae")
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2.from_config(config)
    vae.load_state_dict(statistics, strict=False)
    vae.to(torch.bfloat16).save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def checkpoint(workshop: Path) -> Path:
    return with_sixteen_pixels(workshop / "sixteen-pixels", NANO)


@pytest.fixture(scope="module")
def dev(workshop: Path) -> Bundle:
    """flux2-nano-dev, its text encoder in FP8, which VisualGen is given in bf16."""
    checkpoint = with_sixteen_pixels(workshop / "dev-sixteen-pixels", NANO_DEV)
    cache = "step_cache={skip: 4, min_r2: -9, prompts: prompts/flux2-nano-calibration.txt, frontier: []}"
    changes = (f"model.source={checkpoint}", "sampling.steps=10", "calibration.steps=3", cache, TARGETS)
    recipe = RECIPE.with_name("flux2-nano-dev.yaml")
    return open_bundle(compile_into(workshop / "visual-gen-dev", *QUICK, *changes, recipe=recipe))


@pytest.fixture(scope="module")
def quick(checkpoint: Path) -> tuple[str, ...]:
    return (*QUICK, PLAIN, f"model.source={checkpoint}")


@pytest.fixture(scope="module")
def bundle(workshop: Path, quick: tuple[str, ...]) -> Bundle:
    """With a step cache whose polynomial for latents, which explains little here, is taken all the same."""
    cache = "step_cache={skip: 4, min_r2: -9, prompts: prompts/flux2-nano-calibration.txt, frontier: []}"
    steps = ("sampling.steps=10", "calibration.steps=3")
    return open_bundle(compile_into(workshop / "visual-gen", *quick, *steps, cache, TARGETS))


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the folder with files in place of links, to be damaged."""
    return Path(shutil.copytree(bundle.root / "visual_gen", tmp_path / "visual_gen"))


def faults(folder: Path) -> list[str]:
    return faults_of(folder, text_tokens=32)


# The folder.


def test_it_passes_and_holds_nothing_twice(bundle: Bundle) -> None:
    folder = bundle.root / "visual_gen"
    assert faults(folder) == []
    verify_files(bundle)
    own = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    assert all(path.resolve().is_relative_to(bundle.root.resolve()) for path in links)
    assert {path.suffix for path in own} == {".json", ".yaml", ".safetensors", ".md"}
    halves = read_header(folder / "transformer" / "gate_up.safetensors")
    assert all("linear_in_" in name for name in halves)
    assert len(links) > 8
    entry = bundle.target("visual_gen")
    assert entry.configs == {str(n): f"visual_gen/{n}gpu.yaml" for n in (1, 2, 4)}
    assert "1.3 and 1.4" in entry.schema


def test_settings_say_ranks_sizes_and_the_latents_polynomial(bundle: Bundle) -> None:
    rule = bundle.manifest.step_cache.visual_gen
    for number in (1, 2, 4):
        text = (bundle.root / "visual_gen" / f"{number}gpu.yaml").read_text()
        args = yaml.safe_load(text)
        assert "VisualGenArgs of TensorRT-LLM 1.3 and 1.4" in text
        assert args["parallel_config"] == {"cfg_size": 1, "ulysses_size": number, "ring_size": 1, "tp_size": 1}
        assert args["compilation_config"]["resolutions"] == [[64, 64]]
        assert args["cache_config"]["coefficients"] == list(rule.coefficients)
        assert args["cache_config"]["teacache_thresh"] == rule.threshold
        assert "quant_config" not in args
        assert args["torch_compile_config"]["enable"] is True
        assert args["cuda_graph_config"]["enable"] is False


class ImageGenerationRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of TensorRT-LLM's request for images, of those that a FLUX.2 takes."""

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    seed: int
    response_format: Literal["url", "b64_json"]


def test_the_readme_has_the_request_to_send(bundle: Bundle) -> None:
    text = (bundle.root / "visual_gen" / "README.md").read_text()
    posted = msgspec.json.decode(text.partition("-d '")[2].partition("'")[0], type=ImageGenerationRequest)
    assert posted == ImageGenerationRequest("...", 64, 64, 10, 1.0, 32, 0, "b64_json")
    given = dict(re.findall(r"^params[.](\w+) = (.*)$", text, re.MULTILINE))
    params = msgspec.structs.asdict(posted)
    assert given == {name: repr(params[name]) for name in given}
    assert given.keys() == params.keys() - {"prompt", "response_format"}
    assert "trtllm-serve . --visual_gen_args 1gpu.yaml" in text
    assert 'fluxrt.load(".", target="visual_gen", gpus=1)' in text


def test_a_polynomial_that_explains_too_little_is_not_used(workshop: Path, quick: tuple[str, ...]) -> None:
    cache = "step_cache={skip: 4, min_r2: 0.6, prompts: prompts/flux2-nano-calibration.txt, frontier: []}"
    steps = ("sampling.steps=10", "calibration.steps=3")
    bundle = open_bundle(compile_into(workshop / "visual-gen-off", *quick, *steps, cache, TARGETS))
    assert bundle.manifest.step_cache.fit["latent"]["r2"] < 0.6
    text = (bundle.root / "visual_gen" / "2gpu.yaml").read_text()
    assert "# TeaCache is off." in text
    assert "cache_config" not in yaml.safe_load(text)


# The loader, rewritten from what was read of it.


def loaded(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], Counter[str]]:
    """Modules by VisualGen's names with their fused tensors, and how often each stored tensor was taken."""
    weight_map = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    stored = {n: ref for file in sorted(set(weight_map.values())) for n, ref in read_header(folder / file).items()}
    assert stored.keys() == weight_map.keys()
    taken: Counter[str] = Counter()

    def take(name: str) -> dict[str, np.ndarray]:
        parts = {}
        for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            if f"{name}.{part}" in stored:
                taken[f"{name}.{part}"] += 1
                parts[part] = array(stored[f"{name}.{part}"])
        assert "weight" in parts, name
        return parts

    def fused(*names: str) -> dict[str, np.ndarray]:
        members = [take(name) for name in names]
        for part in ("weight_scale_2", "input_scale"):
            assert len({float(member[part]) for member in members if part in member}) <= 1, part
        rows = {p: np.concatenate([m[p] for m in members]) for p in members[0] if members[0][p].ndim}
        return members[0] | rows

    config = json.loads((folder / "config.json").read_text())
    modules = {}
    for number in range(config["num_layers"]):
        at = f"transformer_blocks.{number}"
        modules[f"{at}.attn.qkv_proj"] = fused(*(f"{at}.attn.to_{x}" for x in "qkv"))
        modules[f"{at}.attn.add_qkv_proj"] = fused(*(f"{at}.attn.add_{x}_proj" for x in "qkv"))
        for name in ("attn.to_out.0", "attn.to_add_out"):
            modules[f"{at}.{name}"] = take(f"{at}.{name}")
        for stream in ("ff", "ff_context"):
            modules[f"{at}.{stream}.gate_up_proj"] = fused(*(f"{at}.{stream}.linear_in_{x}" for x in ("gate", "up")))
            modules[f"{at}.{stream}.down_proj"] = take(f"{at}.{stream}.linear_out")
    for number in range(config["num_single_layers"]):
        at = f"single_transformer_blocks.{number}.attn"
        modules[f"{at}.to_qkv_mlp_proj.proj"] = take(f"{at}.to_qkv_mlp_proj")
        modules[f"{at}.to_out.proj"] = take(f"{at}.to_out")
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    outside = [layer.name for layer in Flux2Transformer.read(config).linears if not layer.name.startswith(blocks)]
    modules |= {name: take(name) for name in outside}
    taken.update(name for name in stored if "norm" in name and name not in taken)
    return modules, taken


def array(ref: TensorRef) -> np.ndarray:
    types = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    return ref.bytes_view().view(types[ref.dtype]).reshape(ref.shape)


def dense(parts: dict[str, np.ndarray]) -> np.ndarray:
    """A module's weight: E2M1 values by ml_dtypes, low nibble first."""
    weight = parts["weight"]
    if "weight_scale" not in parts:
        return weight.astype(np.float32)
    codes = np.stack([weight & 15, weight >> 4], axis=-1).reshape(len(weight), -1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = parts["weight_scale"].astype(np.float32) * parts["weight_scale_2"]
    return values * np.repeat(scales, 16, axis=1)


def by_modelopt(tensors: dict[str, TensorRef], layer: str) -> np.ndarray:
    """The weight as modelopt reads it from the bundle's own, unsplit transformer."""
    weight = torch.from_numpy(array(tensors[f"{layer}.weight"]).copy().view(np.uint8))
    if f"{layer}.weight_scale" not in tensors:
        return array(tensors[f"{layer}.weight"]).astype(np.float32)
    scale = torch.from_numpy(array(tensors[f"{layer}.weight_scale"]).copy().view(np.uint8)).view(torch.float8_e4m3fn)
    double = torch.from_numpy(array(tensors[f"{layer}.weight_scale_2"]).copy())
    quantized = NVFP4QTensor((weight.shape[0], weight.shape[1] * 2), torch.float32, weight)
    return quantized.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16}).numpy()


def test_the_loader_takes_every_tensor_once_and_gets_the_same_weights(bundle: Bundle) -> None:
    modules, taken = loaded(bundle.root / "visual_gen" / "transformer")
    tensors = weights_tensors(bundle.root / "transformer", "transformer")
    split = {name for name in tensors if ".linear_in." in name}
    assert set(taken.values()) == {1}
    assert len(taken) == len(tensors) + len(split)
    members = {
        "qkv_proj": ["to_q", "to_k", "to_v"],
        "add_qkv_proj": ["add_q_proj", "add_k_proj", "add_v_proj"],
        "gate_up_proj": ["linear_in"],
        "down_proj": ["linear_out"],
    }
    for module, parts in modules.items():
        stem, _, last = module.removesuffix(".proj").rpartition(".")
        layers = [f"{stem}.{member}" for member in members[last]] if last in members else [module.removesuffix(".proj")]
        expected = np.concatenate([by_modelopt(tensors, layer) for layer in layers])
        np.testing.assert_array_equal(dense(parts), expected)


def test_a_stock_modelopt_export_fails_for_the_known_reasons(bundle: Bundle, tmp_path: Path) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    outside = ("x_embedder", "context_embedder", "time_guidance_embed", "modulation", "norm_out", "proj_out")
    pipeline = quantized_by_modelopt(*({"quantizer_name": f"*{name}*", "enable": False} for name in outside))
    stock = copy_checkpoint(tmp_path / "stock")
    shutil.rmtree(stock / "transformer")
    export_hf_checkpoint(pipeline.transformer, export_dir=stock / "transformer")
    for file in (bundle.root / "visual_gen").glob("*.yaml"):
        shutil.copy(file, stock)
    found = "; ".join(faults(stock))
    assert "is not split into gate and up" in found
    assert "linear_in_gate" in found


def test_a_checkpoint_of_klein_4bs_shape_passes(bundle: Bundle, tmp_path: Path) -> None:
    """Shapes and names of 3.9 billion parameters; the values are zeros."""
    settings = ComponentPrecision(default="nvfp4", preset="modelopt-flux2")
    plan = precision_plan("transformer", Flux2Transformer.read(KLEIN_4B).linears, settings)
    hollow = tmp_path / "hollow.safetensors"
    write_hollow(hollow, Flux2Transformer.read(KLEIN_4B).tensors)
    planned = planned_tensors(read_header(hollow), plan)
    (tmp_path / "transformer").mkdir()
    zeros = tmp_path / "zeros"
    with zeros.open("wb") as file:
        file.truncate(max(ref.nbytes for ref in planned.values()))
    views = [
        View(name, ref.shape, TensorRef(name, ref.dtype, ref.shape, zeros, 0, ref.nbytes), 0, ref.nbytes)
        for name, ref in planned.items()
    ]
    for number, is_split in enumerate((False, True)):
        some = [view for view in views if (".linear_in." in view.name) == is_split]
        write_views(tmp_path / "transformer" / f"{number}.safetensors", some)
    tensors = {
        n: r for number in (0, 1) for n, r in read_header(tmp_path / "transformer" / f"{number}.safetensors").items()
    }
    made = tmp_path / "made"
    written = write_folder(made, Settings(((1024, 1024),), (1, 2, 4, 8), 512, 4, 1.0), KLEIN_4B, plan, tensors, [])
    for name, file in written.links.items():
        (made / name).hardlink_to(tmp_path / file)
    for part in ("model_index.json", "text_encoder", "vae", "tokenizer", "scheduler"):
        source = bundle.root / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, made / "visual_gen" / part)
    assert sorted(written.configs) == [1, 2, 4, 8]
    assert faults_of(made / "visual_gen") == []


# dev.


def test_dev_passes_with_its_guidance_and_its_text_encoder_in_bf16(dev: Bundle) -> None:
    folder = dev.root / "visual_gen"
    assert faults_of(folder, text_tokens=64) == []
    verify_files(dev)
    modules, _ = loaded(folder / "transformer")
    assert {part["weight"].dtype for name, part in modules.items() if name.endswith("qkv_proj")} == {np.dtype("uint8")}
    stored = read_header(folder / "text_encoder" / "model.safetensors")
    assert {ref.dtype for ref in stored.values()} == {"BF16"}
    assert sum("layers.30." in name for name in stored) == 9
    text = (folder / "README.md").read_text()
    posted = msgspec.json.decode(text.partition("-d '")[2].partition("'")[0], type=ImageGenerationRequest)
    assert (posted.guidance_scale, posted.max_sequence_length) == (2.5, 64)
    rule = dev.manifest.step_cache.visual_gen
    assert yaml.safe_load((folder / "2gpu.yaml").read_text())["cache_config"]["coefficients"] == list(rule.coefficients)


def test_devs_text_encoder_loads_as_visual_gen_loads_it(dev: Bundle) -> None:
    """By Mistral3ForConditionalGeneration, whose vision tower is made anew and never run."""
    from transformers import Mistral3ForConditionalGeneration

    theirs, ours = (
        Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        for folder in (NANO_DEV / "text_encoder", dev.root / "visual_gen" / "text_encoder")
    )
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states for model in (theirs, ours)]
    assert all(torch.equal(states[0][layer], states[1][layer]) for layer in (10, 20, 30))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "is a BertModel, and VisualGen would"),
        (
            "model_index.json",
            {"text_encoder": None},
            "text_encoder is None, expected the names of a library and a class",
        ),
        ("model_index.json", {"text_encoder": ["transformers"]}, "expected the names of a library and a class"),
        ("text_encoder/config.json", {"quantization_config": {}}, "which VisualGen does not take"),
    ],
)
def test_a_text_encoder_that_visual_gen_misreads_is_named(
    dev: Bundle, tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(dev.root / "visual_gen", tmp_path / "visual_gen"))
    edit_json(folder / file, lambda data: data.update(change))
    assert said in "; ".join(faults_of(folder, text_tokens=64))


def test_missing_layers_and_a_missing_processor_are_named(dev: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dev.root / "visual_gen", tmp_path / "visual_gen"))
    edit_json(folder / "text_encoder/config.json", lambda data: data["text_config"].update(num_hidden_layers=32))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / "tokenizer" / name).unlink()
    said = "; ".join(faults_of(folder, text_tokens=64))
    assert "would be random, the first language_model.model.layers.31." in said
    assert "AutoProcessor finds no processor" in said
    edit_json(folder / "text_encoder/config.json", lambda data: data["text_config"].update(num_hidden_layers=30))
    assert "30 layers; VisualGen takes the output of layer 30" in "; ".join(faults_of(folder, text_tokens=64))


# What the validator finds.


def edit_json(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.unlink()
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.update(quant_algo="MIXED_PRECISION"), "quant_algo"),
        (lambda q: q["ignore"].append("nothing.like.it"), "'nothing.like.it' matches nothing"),
        (lambda q: q["ignore"].remove("x_embedder"), "x_embedder.weight is BF16"),
        (lambda q: q["ignore"].append("*.gate_up_proj"), "are not both in it"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(dynamic=True), "is not static NVFP4"),
        (lambda q: q.update(surprise=1), "surprise"),
    ],
)
def test_a_wrong_quantization_config_is_named(folder: Path, change: Any, said: str) -> None:
    edit_json(folder / "transformer" / "config.json", lambda config: change(config["quantization_config"]))
    assert said in "; ".join(faults(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_config": {"quant_algo": "NVFP4"}}, "overrides the checkpoint"),
        ({"parallel": {"dit_ulysses_size": 2}}, "unknown field"),
        ({"parallel_config": {"ulysses_size": 2, "tp_size": 2}}, "drops scales"),
        ({"parallel_config": {"ulysses_size": 4}}, "not the 2 GPUs of its name"),
        ({"parallel_config": {"ulysses_size": 2, "ring_size": 2}}, "must be 1"),
        ({"compilation_config": {"resolutions": [[48, 48]]}}, "cannot share the 9 image tokens of 48x48"),
        ({"compilation_config": {"resolutions": [[60, 64]]}}, "not a multiple of 16 pixels"),
        ({"cuda_graph_config": {"enable": True}}, "are both enabled"),
        ({"cuda_graph_config": {"enable": True}, "torch_compile_config": {}}, "are both enabled"),
        ({"compilation_config": {}}, "resolutions is missing"),
        ({"cache_config": {"cache_backend": "teacache", "coefficients": None}}, "there are none for klein"),
        ({"cache_config": {"cache_backend": "teacache", "teacache_thresh": 0.0, "coefficients": [1.0]}}, "more than 0"),
    ],
)
def test_wrong_settings_are_named(folder: Path, change: dict[str, Any], said: str) -> None:
    file = folder / "2gpu.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    assert said in "; ".join(faults(folder))


def test_a_missing_input_scale_and_a_stray_file_are_named(folder: Path) -> None:
    transformer = folder / "transformer"
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    file = transformer / "gate_up.safetensors"
    tensors = read_header(file)
    gone = next(name for name in tensors if name.endswith("input_scale"))
    views = [View(n, ref.shape, ref, 0, ref.nbytes) for n, ref in tensors.items() if n != gone]
    write_views(transformer / "fewer.safetensors", views)
    (transformer / "fewer.safetensors").replace(file)
    edit_json(index, lambda data: data["weight_map"].pop(gone))
    assert "uninitialised memory" in "; ".join(faults(folder))
    edit_json(folder / "model_index.json", lambda data: data.update(_class_name="FluxPipeline"))
    assert "does not select the FLUX.2 pipeline" in "; ".join(faults(folder))


def test_a_vae_of_other_pixels_a_token_is_named(folder: Path) -> None:
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        edit_json(folder / "vae" / "config.json", lambda data, name=name: data[name].pop())
    assert "a token has 8 pixels a side, VisualGen takes it for 16" in "; ".join(faults(folder))


def test_a_warm_up_that_cannot_be_shared_is_named(folder: Path) -> None:
    file = folder / "2gpu.yaml"
    args = yaml.safe_load(file.read_text())
    args["parallel_config"]["ulysses_size"] = 3
    file.write_text(yaml.safe_dump(args))
    assert "cannot share the 512 text tokens of the warm-up" in "; ".join(faults(folder))
    args["compilation_config"]["skip_warmup"] = True
    file.write_text(yaml.safe_dump(args))
    assert "of the warm-up" not in "; ".join(faults(folder))


def test_an_fp8_text_encoder_is_not_taken(folder: Path, bundle: Bundle) -> None:
    edit_json(folder / "text_encoder" / "config.json", lambda data: data.update(quantization_config={}))
    assert "has a quantization_config" in "; ".join(faults(folder))


def test_beside_an_fp8_text_encoder_the_folder_has_its_own_in_bf16(workshop: Path, quick: tuple[str, ...]) -> None:
    encoder = "precision.text_encoder={default: fp8}"
    bundle = open_bundle(compile_into(workshop / "visual-gen-fp8", *quick, encoder, TARGETS))
    own = bundle.root / "visual_gen" / "text_encoder" / "model.safetensors"
    assert not own.is_symlink()
    assert {ref.dtype for ref in read_header(own).values()} == {"BF16"}
    assert faults(bundle.root / "visual_gen") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (['precision.transformer.rules=[{match: "*.ff_context.*", format: fp8}]'], "one quantized format and bf16"),
        (["targets=[{kind: visual_gen, gpus: 3}]"], "3 GPUs cannot share the 4 attention heads"),
        (["targets=[{kind: visual_gen, gpus: []}]"], "give at least one"),
        (["targets=[{kind: visual_gen, activations: nvfp4}]"], "has no such option"),
        (["targets=[{kind: onnxruntime, gpus: [1, 2]}]"], "takes one number"),
    ],
)
def test_recipes_it_cannot_serve_are_refused(
    tmp_path: Path, quick: tuple[str, ...], changes: list[str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        compile_into(tmp_path / "bundle", *quick, TARGETS, *changes)
    assert not (tmp_path / "bundle").exists()


CACHE = "step_cache={skip: 4, prompts: prompts/flux2-nano-calibration.txt}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["sampling.guidance=1.5"], "without guidance, .* sampling.guidance is 1.5; set sampling.guidance: 1.0"),
        (["calibration.guidance=1.5", "sampling.steps=10", CACHE], "fitted to steps with calibration.guidance 1.5"),
        ([f"model.source={NANO}"], "every image token for 16 pixels a side, this checkpoint's VAE decodes one to 8"),
    ],
)
def test_what_it_would_compute_otherwise_is_an_error_that_names_the_target(
    quick: tuple[str, ...], changes: list[str], said: str
) -> None:
    loaded = load_recipe(RECIPE, (*quick, TARGETS, *changes))
    with pytest.raises(RecipeError, match=rf"targets\[1\]: VisualGen .*{said}"):
        open_job(loaded, Path("unused"))


def test_guidance_that_the_model_does_not_use_is_no_obstacle(checkpoint: Path, tmp_path: Path) -> None:
    """A distilled checkpoint has one row a step whatever the guidance, here and in VisualGen; calibration may use it."""
    distilled = Path(shutil.copytree(checkpoint, tmp_path / "distilled"))
    edit_json(distilled / "model_index.json", lambda data: data.update(is_distilled=True))
    open_job(load_recipe(RECIPE, (*QUICK, f"model.source={distilled}", TARGETS)), Path("unused"))
    changes = (*QUICK, PLAIN, f"model.source={checkpoint}", "calibration.guidance=1.5", TARGETS)
    open_job(load_recipe(RECIPE, changes), Path("unused"))


@pytest.mark.parametrize("other", [{"text_layers": (3, 6, 9)}, {"prompts": Prompts()}, {"schedule": "another"}])
def test_another_familys_way_to_read_prompts_and_steps_is_refused(other: dict[str, Any]) -> None:
    recipe = load_recipe(RECIPE, (PLAIN,)).recipe
    with pytest.raises(RecipeError, match=r"targets\[0\]: VisualGen reads prompts .*, Flux2KleinPipeline does not"):
        check_built_in("targets[0]", recipe, dataclasses.replace(KLEIN, **other), True, 16)


# The runtime.


def test_without_tensorrt_llm_the_message_says_how_to_serve(bundle: Bundle) -> None:
    with pytest.raises(fluxrt.BackendError, match=r"trtllm-serve .*visual_gen --visual_gen_args .*2gpu\.yaml"):
        fluxrt.load(bundle.root, target="visual_gen", gpus=2)
    with pytest.raises(fluxrt.RequestError, match="settings for 1, 2, 4 GPUs, not 3"):
        fluxrt.load(bundle.root, target="visual_gen", gpus=3)
    target = bundle.target("visual_gen")
    assert "trtllm-serve" in str(obstacle(bundle, target, Machine(Gpu("B200", "10.0", "13.0"))))
    assert obstacle(bundle, target, Machine(None, "no GPU")) == "no GPU"


def test_prompt_seed_and_settings_are_handed_over(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a fake of VisualGen's Python interface, as its own example uses it."""
    asked: list[Any] = []

    class VisualGen:
        def __init__(self, model: str, args: Any) -> None:
            asked.append((model, args))

        @property
        def default_params(self) -> SimpleNamespace:
            return SimpleNamespace()

        def generate(self, inputs: str, params: Any) -> Any:
            asked.append((inputs, vars(params)))
            return SimpleNamespace(save=lambda path: Image.new("RGB", (64, 64), "red").save(path))

        def shutdown(self) -> None:
            asked.append("shutdown")

    class VisualGenArgs:
        @staticmethod
        def from_yaml(path: str) -> Any:
            args = yaml.safe_load(Path(path).read_text())
            compiled = {name: SimpleNamespace(**args[name]) for name in ("torch_compile_config", "cuda_graph_config")}
            return SimpleNamespace(**{"cache_config": None} | args | compiled)

    fake: Any = ModuleType("tensorrt_llm")
    fake.VisualGen, fake.VisualGenArgs = VisualGen, VisualGenArgs
    monkeypatch.setitem(sys.modules, "tensorrt_llm", fake)
    with fluxrt.load(bundle.root, target="visual_gen", gpus=2) as pipeline:
        assert asked[0][0] == str(bundle.root / "visual_gen")
        assert asked[0][1].parallel_config["ulysses_size"] == 2
        result = pipeline.generate(Request([PROMPT, "another"], seed=7, steps=5))
        assert result.target == "visual_gen"
        params = {"height": 64, "width": 64, "num_inference_steps": 5, "guidance_scale": 1.0, "max_sequence_length": 32}
        assert asked[1:3] == [(PROMPT, params | {"seed": 7}), ("another", params | {"seed": 8})]
        assert [image.size for image in result.images] == [(64, 64)] * 2
        for request in (
            {"step_cache": False},
            {"threshold": 0.1},
            {"latents": np.zeros((1, 64, 32))},
            {"size": (8, 8)},
            {"guidance": 2.0},
            {"batch": 2},
        ):
            with pytest.raises(fluxrt.RequestError):
                pipeline.generate(Request(PROMPT, **request))
        with pytest.raises(fluxrt.RequestError, match="tokens long"):
            pipeline.generate(Request([PROMPT, "red " * 40]))
        assert len(asked) == 3
    assert asked[-1] == "shutdown"
    ranged = msgspec.structs.replace(bundle.manifest.sampling, range=((16, 16), (64, 64)))
    between = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, sampling=ranged))
    with VisualGenPipeline(between, between.target("visual_gen"), 2) as pipeline:
        assert pipeline.generate(Request(PROMPT, size=(32, 48))).target == "visual_gen"
        with pytest.raises(fluxrt.RequestError, match=r"size 48x48 .* has 9 image tokens, which 2 GPUs cannot share"):
            pipeline.generate(Request(PROMPT, size=(48, 48)))
    sampling = msgspec.structs.replace(bundle.manifest.sampling, cfg_batch=False)
    distilled = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, sampling=sampling))
    with VisualGenPipeline(distilled, distilled.target("visual_gen")) as pipeline:
        (note,) = pipeline.generate(Request(PROMPT, guidance=7)).notes
    assert note == "guidance 7 changes nothing: this model is distilled and takes none"


def test_plan_says_that_batches_and_tiles_are_not_for_it(quick: tuple[str, ...]) -> None:
    changes = [*quick, TARGETS, "batches=[1, 2]", "sizes=[[64, 64], [256, 256]]", "vae={tile: [128, 128]}"]
    arguments = [word for change in changes for word in ("--set", change)]
    said = " ".join(CliRunner().invoke(main, ["plan", str(RECIPE), *arguments]).stdout.split())
    assert "a step at 64x64 is predicted to take in bf16 plans: 1 at once" in said
    assert "visual_gen: VisualGen is given one prompt a call; batches is not for it" in said
    assert "visual_gen: VisualGen's settings have no tiles" in said


def test_a_bundle_that_visual_gen_would_read_otherwise_is_not_loaded(bundle: Bundle) -> None:
    sampling = msgspec.structs.replace(bundle.manifest.sampling, pixels_per_token=8)
    other = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, sampling=sampling))
    with pytest.raises(fluxrt.BundleError, match="16 pixels a side, this bundle's have 8"):
        VisualGenPipeline(other, other.target("visual_gen"))
