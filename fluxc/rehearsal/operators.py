"""Runs a TensorRT target's programs without TensorRT: every call's graph goes through ONNX's reference evaluator.

TRT_FP4DynamicQuantize is written out here from its documentation, in numpy, and shares no code with fluxc's quantizer. GEMMs
and attention accumulate in fp32 and round once, as tensor cores do; everything else is rounded to bf16 by each operator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors import safe_open

from fluxrt.bundle import Bundle
from fluxrt.manifest import Plan, TensorRTTarget

BF16, E4M3, E2M1 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
DTYPES = {
    "float32": np.float32,
    "bfloat16": BF16,
    "int64": np.int64,
    "bool": np.bool_,
    "float8_e4m3fn": E4M3,
    "float4_e2m1": E2M1,
}


class TRT_FP4DynamicQuantize(OpRun):
    """Blocks of 16: scale = E4M3(amax / 6 / global scale), values = E2M1(x / (scale * global scale)), nearest, ties to even."""

    op_domain = "trt"

    def _run(self, x, scale, axis=None, block_size=None, scale_type=None):
        assert (axis, block_size, scale_type) == (-1, 16, TensorProto.FLOAT8E4M3FN)
        blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 16)
        amax = np.abs(blocks).max(axis=-1, keepdims=True)
        block_scale = np.clip(amax / 6 / float(scale), 2.0**-9, 448).astype(np.float32).astype(E4M3)
        codes = (blocks / (block_scale.astype(np.float64) * float(scale))).clip(-6, 6).astype(np.float32).astype(E2M1)
        return codes.reshape(x.shape), block_scale[..., 0]


class Gemm(OpRun):
    def _run(self, a, b, c=None, alpha=None, beta=None, transA=None, transB=None):
        assert c is None
        assert not transA
        weight = b.astype(np.float32)
        return ((a.astype(np.float32) @ (weight.T if transB else weight)).astype(a.dtype),)


class MatMul(OpRun):
    def _run(self, a, b):
        return ((a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype),)


class DequantizeLinear(OpRun):
    """codes * scale, a scale for each block of 16 or one for all, in the scale's type; exact in fp32."""

    def _run(self, x, scale, zero_point=None, axis=None, block_size=None, output_dtype=None):
        scales = scale.astype(np.float32)
        if block_size:
            scales = np.repeat(scales, block_size, axis=axis)
        return ((x.astype(np.float32) * scales).astype(scale.dtype),)


class Attention(OpRun):
    def _run(self, q, k, v, mask=None, **attributes):
        q, k, values = (t.astype(np.float32) for t in (q, k, v))
        scale = attributes.get("scale") or q.shape[-1] ** -0.5
        scores = q @ np.swapaxes(k, -1, -2) * np.float32(scale)
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return ((weights / weights.sum(axis=-1, keepdims=True) @ values).astype(v.dtype),)


class LayerNormalization(OpRun):
    def _run(self, x, scale, bias=None, axis=None, epsilon=None, stash_type=None):
        full = x.astype(np.float32)
        centred = full - full.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
        return ((normed * scale.astype(np.float32)).astype(x.dtype),)


class RMSNormalization(OpRun):
    def _run(self, x, scale, axis=None, epsilon=None, stash_type=None):
        full = x.astype(np.float32)
        normed = full / np.sqrt((full**2).mean(axis=-1, keepdims=True) + epsilon)
        return ((normed.astype(x.dtype) * scale).astype(x.dtype),)


OPERATORS: list[type[OpRun]] = [
    TRT_FP4DynamicQuantize,
    Gemm,
    MatMul,
    DequantizeLinear,
    Attention,
    LayerNormalization,
    RMSNormalization,
]


class Player:
    """A bundle's TensorRT target on the CPU. With `full`, every bf16 in the graphs is fp32: the same graph, unrounded."""

    def __init__(self, bundle: Bundle, target: TensorRTTarget, full: bool = False) -> None:
        self._bundle, self._engine, self._full = bundle, target.engine, full
        self._evaluators: dict[str, ReferenceEvaluator] = {}
        self._tensors: dict[tuple[str, str], np.ndarray] = {}
        self.buffers: dict[str, np.ndarray] = {}

    def run(self, stage: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a stage's program on `inputs` and what earlier stages left; gives every buffer, bf16 as fp32."""
        for name, array in inputs.items():
            self.buffers[name] = array
        program = self._engine.programs[stage]
        for call in program.calls:
            plan = self._engine.plans[call.plan]
            feeds = {
                port.name: self._cast(self.buffers[call.buffers.get(port.name, port.name)], port.dtype)
                for port in plan.inputs
            }
            for weight in plan.weights:
                parts = [self._tensor(program.weights, call.prefix + tensor, weight.dtype) for tensor in weight.tensors]
                whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
                assert whole.shape == weight.shape
                feeds[weight.name] = self._cast(whole, weight.dtype)
            outputs = self._evaluator(call.plan, plan).run(None, feeds)
            for output, value in zip(plan.outputs, outputs, strict=True):
                assert value.dtype == self._dtype(output.dtype), output
                self.buffers[call.buffers.get(output.name, output.name)] = value
        return {name: np.asarray(v, np.float32) if v.dtype == BF16 else v for name, v in self.buffers.items()}

    def _dtype(self, name: str) -> Any:
        return np.float32 if self._full and name == "bfloat16" else DTYPES[name]

    def _cast(self, value: np.ndarray, dtype: str) -> np.ndarray:
        return np.asarray(value).astype(self._dtype(dtype)) if dtype in ("bfloat16", "float32") else np.asarray(value)

    def _evaluator(self, name: str, plan: Plan) -> ReferenceEvaluator:
        if name not in self._evaluators:
            model = onnx.load(self._bundle.path(plan.source))
            self._evaluators[name] = ReferenceEvaluator(unrounded(model) if self._full else model, new_ops=OPERATORS)
        return self._evaluators[name]

    def _tensor(self, weights: str, name: str, dtype: str) -> np.ndarray:
        if (weights, name) not in self._tensors:
            self._tensors[weights, name] = read_tensor(self._bundle.path(weights), name, dtype)
        return self._tensors[weights, name]


def read_tensor(file: Path, name: str, dtype: str) -> np.ndarray:
    """A tensor of a weights file as an array, by safetensors' own reader; E2M1 values unpacked, low nibble first."""
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor(name)
    import torch

    if dtype == "float4_e2m1":
        packed = tensor.numpy()
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1).astype(np.uint8).view(E2M1)
    if dtype == "float8_e4m3fn":
        return tensor.view(torch.uint8).numpy().view(E4M3)
    if dtype == "bfloat16":
        return tensor.view(torch.uint16).numpy().view(BF16)
    return tensor.numpy()


def unrounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with fp32 wherever it has bf16."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for initializer in copy.graph.initializer:
        if initializer.data_type == TensorProto.BFLOAT16:
            full = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(full, initializer.name))
    for node in copy.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.CopyFrom(helper.make_attribute("to", TensorProto.FLOAT))
    return copy
