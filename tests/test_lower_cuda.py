"""Lowering for the CUDA provider, layer by layer: each format against modelopt's own reading of its own weights.

No GPU ran any of this. ONNX Runtime loads, types and checks the graphs as far as a machine without CUDA lets it.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from conftest import NANO, exported
from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef
from fluxc.fidelity.metrics import relative_error
from fluxc.graph import LINEAR_DOMAIN, OPSET
from fluxc.graph.bind import argument_names, bind
from fluxc.graph.compose import compose_body
from fluxc.graph.export import make_model
from fluxc.models.base import Linear
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.recipe.structs import ComponentPrecision
from fluxc.rehearsal.onnxruntime import MatMulBlockQuantizedFp4Weight
from fluxc.rehearsal.operators import DequantizeLinear, MatMul
from fluxc.targets.onnxruntime.cuda_kernels import TABLE_OPSET, check_kernels
from fluxc.targets.onnxruntime.lower import lower

ROWS, COLUMNS, RANK = 48, 64, 4
BF16, FP16 = TensorProto.BFLOAT16, TensorProto.FLOAT16
ARRAYS = {BF16: ml_dtypes.bfloat16, FP16: np.float16}
DTYPES = {BF16: "bfloat16", FP16: "float16"}
# Three roundings to the activations' type: of a weight, of an input or product, and of the result.
BOUNDS = {BF16: 3 * 2.0**-8, FP16: 3 * 2.0**-11}


def one_layer(stored: dict[str, str], format_name: str, dtype: int) -> onnx.ModelProto:
    """fluxc::Linear of layer `l`, lowered."""
    x = helper.make_tensor_value_info("x", dtype, [2, 3, COLUMNS])
    weight = helper.make_tensor_value_info("l.weight", dtype, [ROWS, COLUMNS])
    y = helper.make_tensor_value_info("y", dtype, [2, 3, ROWS])
    node = helper.make_node("Linear", ["x", "l.weight"], ["y"], domain=LINEAR_DOMAIN)
    neutral = make_model(helper.make_graph([node], "g", [x, weight], [y]))
    plan = {"l": LayerPlan("transformer", Linear("l", ROWS, COLUMNS), format_name, "test", 0)}
    return lower(neutral, {"x"}, stored, plan, dtype=dtype)


def evaluate(model: onnx.ModelProto, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """y; every tensor but the quantizers' input scale must be read by the graph."""
    assert {value.name for value in model.graph.input} == set(tensors)
    session = ReferenceEvaluator(model, new_ops=[MatMulBlockQuantizedFp4Weight, MatMul, DequantizeLinear])
    (y,) = session.run(None, tensors)
    return y


def random(*shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(len(shape) + shape[0]).standard_normal(shape).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("with_awq", [False, True], ids=["", "awq"])
@pytest.mark.parametrize("with_svdquant", [False, True], ids=["", "svdquant"])
def test_an_nvfp4_layer_multiplies_what_modelopt_reads(dtype: int, with_awq: bool, with_svdquant: bool) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    quantized, block_scales, scale = NVFP4QTensor.quantize(torch.from_numpy(random(ROWS, COLUMNS, scale=0.1)), 16)
    weight = quantized.dequantize(dtype=torch.float32, scale=block_scales, double_scale=scale, block_sizes={-1: 16})
    codes = quantized._quantized_data.numpy()
    tensors = {
        "x": random(2, 3, COLUMNS).astype(ARRAYS[dtype]),
        "l.weight": codes,
        "l.weight_scale": block_scales.view(torch.uint8).numpy(),
        "l.weight_scale_2": scale.numpy(),
    }
    stored = {"l.weight": "U8", "l.weight_scale": "F8_E4M3", "l.weight_scale_2": "F32", "l.input_scale": "F32"}
    x = tensors["x"].astype(np.float32)
    if with_awq:
        tensors["l.pre_quant_scale"] = np.abs(random(COLUMNS)) + np.float32(0.5)
        stored["l.pre_quant_scale"] = "F32"
        x = x * tensors["l.pre_quant_scale"]
    expected = x @ weight.numpy().T
    if with_svdquant:
        for name, shape in (("l.svdquant_lora_a", (RANK, COLUMNS)), ("l.svdquant_lora_b", (ROWS, RANK))):
            tensors[name] = random(*shape, scale=0.2).astype(ml_dtypes.bfloat16)
            stored[name] = "BF16"
        a, b = (tensors[f"l.svdquant_lora_{side}"].astype(np.float32) for side in "ab")
        expected = expected + x @ a.T @ b.T
    y = evaluate(one_layer(stored, "nvfp4", dtype), tensors)
    assert y.dtype == ARRAYS[dtype]
    assert relative_error(y.astype(np.float32), expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("format_name", ["fp8", "bf16"])
def test_fp8_and_bf16_layers_multiply_in_the_activations_type(dtype: int, format_name: str) -> None:
    full = random(ROWS, COLUMNS, scale=0.1)
    tensors = {"x": random(2, 3, COLUMNS).astype(ARRAYS[dtype])}
    if format_name == "fp8":
        scale = np.float32(np.abs(full).max() / 448)
        tensors |= {"l.weight": (full / scale).astype(ml_dtypes.float8_e4m3fn), "l.weight_scale": np.array(scale)}
        stored = {"l.weight": "F8_E4M3", "l.weight_scale": "F32"}
        weight = tensors["l.weight"].astype(np.float32) * scale
    else:
        tensors["l.weight"] = full.astype(ml_dtypes.bfloat16)
        stored = {"l.weight": "BF16"}
        weight = tensors["l.weight"].astype(np.float32)
    y = evaluate(one_layer(stored, format_name, dtype), tensors)
    assert y.dtype == ARRAYS[dtype]
    assert relative_error(y.astype(np.float32), tensors["x"].astype(np.float32) @ weight.T) < BOUNDS[dtype]


@pytest.fixture(scope="module", params=[BF16, FP16], ids=["bfloat16", "float16"])
def lowered(request: pytest.FixtureRequest) -> dict[str, onnx.ModelProto]:
    """flux2-nano's transformer from its config, every Linear of the blocks NVFP4, weights as typed inputs."""
    config = json.loads((NANO / "transformer" / "config.json").read_text())
    pieces = exported("transformer", config, 32, cfg_batch=True, dtype=DTYPES[request.param])
    body = compose_body(pieces, config["num_layers"], config["num_single_layers"], 32)
    keep = ("x_embedder", "context_embedder", "time_guidance_embed*", "*modulation*", "norm_out*", "proj_out")
    layers = precision_plan("transformer", Flux2Transformer.read(config).linears, ComponentPrecision("nvfp4", keep))
    plan = {entry.layer.name: entry for entry in layers}
    refs = {name: reference(name, "BF16", shape) for name, shape in Flux2Transformer.read(config).tensors.items()}
    for name in (name for name, entry in plan.items() if entry.format == "nvfp4"):
        rows, columns = refs[f"{name}.weight"].shape
        refs[f"{name}.weight"] = reference(f"{name}.weight", "U8", (rows, columns // 2))
        refs[f"{name}.weight_scale"] = reference(f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16))
        refs[f"{name}.weight_scale_2"] = reference(f"{name}.weight_scale_2", "F32", ())
    graphs, bound = {}, []
    stored = {name: ref.dtype for name, ref in refs.items()}
    for name, neutral in (("prologue", pieces["prologue"]), ("body", body), ("epilogue", pieces["epilogue"])):
        graphs[name] = lower(neutral, argument_names(neutral), stored, plan, dtype=request.param)
        bound += bind(graphs[name], argument_names(neutral), refs)
        weights_as_inputs(graphs[name])
    assert sorted(bound) == sorted(refs)
    return graphs


def reference(name: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(name, dtype, shape, Path("weights.safetensors"), 0, 0)


def weights_as_inputs(model: onnx.ModelProto) -> None:
    """Turn external initializers into graph inputs of their type, so that no weights file is needed."""
    constants = []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            constants.append(tensor)
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def test_every_vendor_node_is_one_onnxruntime_has(lowered: dict[str, onnx.ModelProto]) -> None:
    """Against the schema that ONNX Runtime itself registers: inputs, their types, attributes."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    schemas = {schema.name: schema for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}
    counted = 0
    for model in lowered.values():
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        for node in model.graph.node:
            if node.domain != "com.microsoft":
                continue
            counted += 1
            schema = schemas[node.op_type]
            allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
            required = [port for port in schema.inputs if port.option.name == "Single"]
            assert len(required) <= len(node.input) <= len(schema.inputs)
            assert {attribute.name for attribute in node.attribute} <= set(schema.attributes)
            for name, port in zip(node.input, schema.inputs, strict=False):
                if name in types:
                    kind = TensorProto.DataType.Name(types[name]).lower()
                    assert f"tensor({kind})" in allowed[port.typeStr], (name, kind)
    assert counted == sum(node.domain == "com.microsoft" for node in lowered["body"].graph.node) > 0


def test_onnxruntime_accepts_every_type_and_shape_and_only_lacks_the_kernels(
    lowered: dict[str, onnx.ModelProto],
) -> None:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for name, model in lowered.items():
        check_kernels(name, model)
    with pytest.raises(NoKernel, match="Could not find an implementation for"):
        onnxruntime.InferenceSession(lowered["body"].SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_the_table_of_kernels_is_of_the_opset_graphs_have() -> None:
    assert TABLE_OPSET == OPSET


def graph_of(*nodes: onnx.NodeProto, output: int) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8]),
        helper.make_tensor_value_info("half", BF16, [1, 4, 8, 8]),
        helper.make_tensor_value_info("channels", TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("chosen", TensorProto.BOOL, [1, 4, 8, 8]),
    ]
    y = helper.make_tensor_value_info("y", output, None)
    return make_model(helper.make_graph(nodes, "g", values, [y]))


def test_an_operator_with_kernels_of_older_versions_only_is_refused() -> None:
    """In fp32 too: ONNX Runtime 1.31.1's kernel of InstanceNormalization ends at version 21."""
    node = helper.make_node("InstanceNormalization", ["x", "channels", "channels"], ["y"])
    with pytest.raises(BuildError, match=r"no CUDA kernel for InstanceNormalization in float .* 'y'"):
        check_kernels("vae_decoder", graph_of(node, output=TensorProto.FLOAT))


def test_what_follows_a_choice_is_looked_at_in_the_type_chosen() -> None:
    """Where's first input is a condition; its type is not that of what it gives."""
    choice = helper.make_node("Where", ["chosen", "half", "half"], ["a"])
    after = helper.make_node("Reciprocal", ["a"], ["y"])
    with pytest.raises(BuildError, match=r"no CUDA kernel for Reciprocal in bfloat16 .* 'y'"):
        check_kernels("prologue", graph_of(choice, after, output=BF16))
