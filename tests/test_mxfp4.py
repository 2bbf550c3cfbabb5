"""MXFP4 from recipe to image: the bundle's tensors against torchao, its graph in ONNX's evaluator, and as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file

import fluxrt
from conftest import NANO, compile_into
from fluxc.base.errors import RecipeError
from fluxc.build.job import open_job
from fluxc.recipe.load import load_recipe
from fluxrt.bundle import open_bundle
from quick import QUICK

WEIGHTS = "diffusion_pytorch_model.safetensors"
TARGETS = "targets=[{kind: onnxruntime}]"


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Path:
    return compile_into(workshop / "mxfp4", *QUICK, "precision.transformer.default=mxfp4", TARGETS)


def test_the_bundles_tensors_are_torchaos(bundle: Path) -> None:
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    ours, source = load_file(bundle / "transformer" / WEIGHTS), load_file(NANO / "transformer" / WEIGHTS)
    layers = [layer.name for layer in open_bundle(bundle).manifest.precision if layer.format == "mxfp4"]
    assert len(layers) == 36
    for name in layers:
        scales, codes = to_mx(source[f"{name}.weight"], torch.float4_e2m1fn_x2, 32)
        assert torch.equal(
            ours[f"{name}.weight_scale"], scales.view(torch.uint8).reshape(ours[f"{name}.weight_scale"].shape)
        )
        assert torch.equal(ours[f"{name}.weight"], codes.view(torch.uint8).reshape(ours[f"{name}.weight"].shape))
        assert f"{name}.input_scale" not in ours


def test_its_config_says_what_it_is(bundle: Path) -> None:
    config = json.loads((bundle / "transformer" / "config.json").read_text())["quantization_config"]
    assert (config["quant_algo"], config["config_groups"]["group_0"]["weights"]["group_size"]) == ("MXFP4", 32)


def test_the_graphs_weights_in_onnxs_evaluator_are_the_values(bundle: Path) -> None:
    """The nodes before a layer's MatMul, alone: code times power of two, by OCP's table of E2M1."""
    layer = "transformer_blocks.0.ff.linear_out"
    model = onnx.load(bundle / "transformer" / "body.onnx")
    dense = f"{layer}.weight/fp32"
    (found,) = ReferenceEvaluator(_upstream(model, dense)).run(None, {})
    stored = load_file(bundle / "transformer" / WEIGHTS)
    codes, scales = stored[f"{layer}.weight"].numpy(), stored[f"{layer}.weight_scale"].numpy().astype(np.int64)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    values = table[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(len(codes), -1, 32)
    expected = values * np.exp2(scales - 127.0).astype(np.float32)[..., None]
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


def _upstream(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """The nodes that give `output`, with the initializers they read."""
    needed, nodes = {output}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    graph = onnx.GraphProto(name="piece")
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(i for i in model.graph.initializer if i.name in needed)
    graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=11)


def test_it_generates_within_the_loss_of_four_bits(bundle: Path, quick_bundle: Path) -> None:
    figures = open_bundle(bundle).manifest.fidelity.targets["onnxruntime"]
    nvfp4 = open_bundle(quick_bundle).manifest.fidelity.targets["onnxruntime"]
    assert 0.95 < figures["step_cosine"] < nvfp4["step_cosine"]
    assert np.asarray(fluxrt.load(bundle).generate(fluxrt.Request("a small red ring", seed=3)).images[0]).std() > 10


def test_a_bundle_in_mxfp4_is_a_checkpoint(bundle: Path, tmp_path: Path) -> None:
    """Its layers go through unchanged, and the reference is what they dequantize to."""
    again = compile_into(tmp_path / "again", *QUICK, f"model.source={bundle}", "precision.transformer={}", TARGETS)
    ours, theirs = (load_file(path / "transformer" / WEIGHTS) for path in (bundle, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert open_bundle(again).manifest.fidelity.targets["onnxruntime"]["step_cosine"] > 0.99999


def test_mxfp4_beside_nvfp4(workshop: Path) -> None:
    rules = "precision.transformer.rules=[{match: '*.ff_context.linear_out', format: mxfp4}]"
    out = compile_into(workshop / "both", *QUICK, rules)
    manifest = open_bundle(out).manifest
    assert {"nvfp4", "mxfp4"} <= {layer.format for layer in manifest.precision}
    config = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert {"MXFP4", "NVFP4"} == {entry["quant_algo"] for entry in config["quantized_layers"].values()}
    assert all(figures["step_cosine"] > 0.9 for figures in manifest.fidelity.targets.values())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("{kind: tensorrt_rtx}", "do not compute in mxfp4"),
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
