"""MXFP4 from recipe to image: the bundle's tensors against torchao, its graph in ONNX's evaluator, its velocities against
diffusers with the same weights, and as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file

import fluxrt
from conftest import NANO, RECIPE, compile_into
from fluxc.base.errors import RecipeError
from fluxc.build.job import open_job
from fluxc.formats import mxfp4
from fluxc.recipe.load import load_recipe
from fluxc.targets.onnxruntime.forms import VENDOR
from fluxrt.bundle import open_bundle
from fluxrt.evidence import read_evidence, relative_error
from fluxrt.pipeline import Pipeline
from quick import QUICK

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXACT = "onnxruntime-exact"
TARGETS = "targets=[{kind: onnxruntime, compute: exact}]"
EVERY = (
    "targets=[{kind: onnxruntime}, {kind: onnxruntime, compute: exact}, {kind: onnxruntime, weights_in_memory: 4-bit}]"
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""OCP's table."""


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Path:
    """The recipe as it stands, with its gates, on two prompts and three steps."""
    quick = [change for change in QUICK if not change.startswith(("gates", "precision"))]
    return compile_into(workshop / "mxfp4", *quick, EVERY, recipe=RECIPE.with_name("flux2-nano-mxfp4.yaml"))


def test_every_block_is_torchaos_under_one_of_two_scales_and_no_rule_of_torchaos_is_better(bundle: Path) -> None:
    """`scales: mse`: OCP's rule is torchao's FLOOR, the scale above it CEIL's."""
    ours, source = load_file(bundle / "transformer" / WEIGHTS), load_file(NANO / "transformer" / WEIGHTS)
    layers = [layer.name for layer in open_bundle(bundle).manifest.precision if layer.format == "mxfp4"]
    assert len(layers) == 36
    chosen_above = 0
    for name in layers:
        weight = source[f"{name}.weight"]
        scales, codes = ours[f"{name}.weight_scale"], ours[f"{name}.weight"].reshape(len(weight), -1, 16)
        floor, ceil, rceil, even = (torchaos(weight, mode) for mode in ("FLOOR", "CEIL", "RCEIL", "EVEN"))
        is_floor = (scales == floor[0]) & (codes == floor[1]).all(-1)
        is_ceil = (scales == ceil[0]) & (codes == ceil[1]).all(-1)
        assert (is_floor | is_ceil).all()
        chosen_above += int((~is_floor).sum())
        least = error(weight, codes, scales)
        assert all((least <= error(weight, theirs[1], theirs[0]) * (1 + 1e-5)).all() for theirs in (floor, rceil, even))
        assert f"{name}.input_scale" not in ours
    assert chosen_above > 1000


def torchaos(weight: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales [rows, blocks], codes [rows, blocks, 16]) by torchao, both uint8."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    scales, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[mode])
    rows = len(weight)
    return scales.view(torch.uint8).reshape(rows, -1), codes.view(torch.uint8).reshape(rows, -1, 16)


def error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Squared error of every block."""
    values = torch.from_numpy(E2M1)[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(-2)
    restored = values * torch.exp2(scales.float() - 127)[..., None]
    return (restored - weight.float().reshape(restored.shape)).square().sum(-1)


def test_its_config_says_what_it_is(bundle: Path) -> None:
    config = json.loads((bundle / "transformer" / "config.json").read_text())["quantization_config"]
    assert (config["quant_algo"], config["config_groups"]["group_0"]["weights"]["group_size"]) == ("MXFP4", 32)


@pytest.mark.parametrize("target", [EXACT, "onnxruntime-4-bit"])
def test_what_the_graph_multiplies_is_the_stored_values_exactly(bundle: Path, target: str) -> None:
    """The nodes before a layer's product, in ONNX's evaluator: codes about 128 with half the scale, or codes and the scale."""
    layer = "transformer_blocks.0.ff.linear_out"
    model = onnx.load(bundle / open_bundle(bundle).target(target).graphs["body"].file)
    product = next(
        node
        for node in model.graph.node
        if node.domain == VENDOR and f"{layer}.weight" in node.input[0] + node.input[1]
    )
    inputs = {EXACT: product.input[1:3], "onnxruntime-4-bit": (product.input[0], product.input[2])}[target]
    codes, scales = ReferenceEvaluator(_upstream(model, inputs)).run(None, {})
    stored = load_file(bundle / "transformer" / WEIGHTS)
    expected = values_of(stored[f"{layer}.weight"].numpy(), stored[f"{layer}.weight_scale"].numpy())
    if target == EXACT:
        assert codes.shape == expected.shape
        found = (codes.astype(np.float32) - 128) * scales.reshape(expected.shape[:2])[..., None]
    else:
        found = codes.astype(np.float32).reshape(expected.shape) * scales[..., None]
    np.testing.assert_array_equal(found, expected)


def values_of(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """fp32 [rows, blocks, 32] by OCP's tables."""
    values = E2M1[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(len(codes), -1, 32)
    return values * np.exp2(scales.astype(np.float64) - 127).astype(np.float32)[..., None]


def test_the_tensors_are_standard_onnx() -> None:
    """FLOAT4E2M1 under FLOAT8E8M0 scales in DequantizeLinear, every pair of codes under scales from least to largest."""
    codes = np.arange(256, dtype=np.uint8).repeat(2).reshape(32, 16)
    scales = np.linspace(0, 251, 32).astype(np.uint8).reshape(32, 1)
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT4E2M1, [32, 32], codes.tobytes(), raw=True)
    scale = onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT8E8M0, [32, 1], scales.tobytes(), raw=True)
    nodes = [
        onnx.helper.make_node("Cast", ["s"], ["scale"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("DequantizeLinear", ["w", "scale"], ["y"], axis=-1, block_size=32),
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [32, 32])
    graph = onnx.helper.make_graph(nodes, "g", [], [output], [weight, scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 25)], ir_version=12)
    onnx.checker.check_model(model)
    (theirs,) = ReferenceEvaluator(model).run(None, {})
    np.testing.assert_array_equal(mxfp4.dequantize(torch.from_numpy(codes), torch.from_numpy(scales)).numpy(), theirs)


def test_a_step_equals_diffusers_with_the_dequantized_weights(bundle: Path) -> None:
    """Unmodified code, the layers' weights as OCP's tables read them."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    stored = load_file(bundle / "transformer" / WEIGHTS)
    weights = load_file(NANO / "transformer" / WEIGHTS)
    for name in [layer.name for layer in open_bundle(bundle).manifest.precision if layer.format == "mxfp4"]:
        tensors = (stored[f"{name}.{part}"].numpy() for part in ("weight", "weight_scale"))
        weights[f"{name}.weight"] = torch.from_numpy(values_of(*tensors)).flatten(1)
    model = Flux2Transformer2DModel.from_config(json.loads((NANO / "transformer/config.json").read_text())).eval()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    opened = open_bundle(bundle)
    assert opened.manifest.evidence is not None
    recorded = read_evidence(opened, opened.manifest.evidence)[0]
    latents, text, sigma, grid = recorded.latents[:1].copy(), recorded.text[:1].copy(), recorded.sigmas[1], (8, 8)
    with torch.no_grad():
        expected = model(
            hidden_states=torch.from_numpy(latents),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.tensor([sigma]),
            guidance=None,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 32, *grid)),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(torch.from_numpy(text)),
            return_dict=False,
        )[0].numpy()
    for target in (EXACT, "onnxruntime-4-bit"):
        with Pipeline(opened, target=target) as pipeline:
            pipeline.begin(latents, grid, 1.0, text)
            pipeline.step(sigma, sigma + 1)
            assert relative_error(pipeline.backend.get("latents") - latents, expected) < 1e-5


def _upstream(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """The nodes that give `outputs`, with the initializers they read."""
    needed, nodes = set(outputs), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    graph = onnx.GraphProto(name="piece")
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(i for i in model.graph.initializer if i.name in needed)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=11)


def test_it_generates_within_the_loss_of_four_bits(bundle: Path, quick_bundle: Path) -> None:
    figures = open_bundle(bundle).manifest.fidelity.targets["onnxruntime"]
    assert 0 < figures["against_exact"]["velocity_error"] < 0.02
    nvfp4 = open_bundle(quick_bundle).manifest.fidelity.targets["onnxruntime"]
    assert 0.95 < figures["step_cosine"] < nvfp4["step_cosine"]
    assert np.asarray(fluxrt.load(bundle).generate(fluxrt.Request("a small red ring", seed=3)).images[0]).std() > 10


def test_a_bundle_in_mxfp4_is_a_checkpoint(bundle: Path, tmp_path: Path) -> None:
    """Its layers go through unchanged, and the reference is what they dequantize to."""
    again = compile_into(tmp_path / "again", *QUICK, f"model.source={bundle}", "precision.transformer={}", TARGETS)
    ours, theirs = (load_file(path / "transformer" / WEIGHTS) for path in (bundle, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert open_bundle(again).manifest.fidelity.targets[EXACT]["step_cosine"] > 0.99999


def test_mxfp4_beside_nvfp4_and_in_the_text_encoder(workshop: Path) -> None:
    rules = "precision.transformer.rules=[{match: '*.ff_context.linear_out', format: mxfp4}]"
    out = compile_into(workshop / "both", *QUICK, rules, "precision.text_encoder.default=mxfp4")
    manifest = open_bundle(out).manifest
    assert {layer.format for layer in manifest.precision if layer.component == "text_encoder"} == {"mxfp4"}
    assert {"nvfp4", "mxfp4"} <= {layer.format for layer in manifest.precision}
    config = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert {"MXFP4", "NVFP4"} == {entry["quant_algo"] for entry in config["quantized_layers"].values()}
    assert all(figures["step_cosine"] > 0.9 for figures in manifest.fidelity.targets.values())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            "{kind: tensorrt_rtx}",
            r"targets\[0\].*: no engine of tensorrt_rtx computes in mxfp4, .* fp8, nvfp4 and bf16",
        ),
        ("{kind: tensorrt}", r"targets\[0\].*: no engine of tensorrt computes in mxfp4"),
        ("{kind: visual_gen}", "VisualGen does not take mxfp4"),
        ("{kind: onnxruntime, device: cuda}", r"targets\[0\].device: ONNX Runtime on CUDA does not compute in mxfp4"),
    ],
)
def test_targets_without_mxfp4_refuse_it(targets: str, says: str) -> None:
    changes = (*QUICK, "precision.transformer.default=mxfp4", f"targets=[{targets}]")
    with pytest.raises(RecipeError, match=says):
        open_job(load_recipe(NANO.parents[1] / "recipes/flux2-nano.yaml", changes), Path("unused"))


def test_modelopts_engine_refuses_mxfp4_before_any_work() -> None:
    changes = (*QUICK, "precision.transformer.default=mxfp4", "calibration.engine=modelopt")
    with pytest.raises(RecipeError, match=r"calibration\.engine: modelopt quantizes to nvfp4 and fp8 here, .* mxfp4"):
        open_job(load_recipe(NANO.parents[1] / "recipes/flux2-nano.yaml", changes), Path("unused"))


def test_a_misspelt_format_is_named_with_what_it_could_be() -> None:
    with pytest.raises(
        RecipeError, match=r"precision\.transformer\.default: there is no format 'mxpf4'; did you mean 'mxfp4'"
    ):
        load_recipe(NANO.parents[1] / "recipes/flux2-nano.yaml", ("precision.transformer.default=mxpf4",))
