"""Which operators ONNX Runtime's CUDA provider has a kernel for, in which floating-point types.

An operator without one runs on the CPU, with the copies there and back, and nothing says so. The table is where the CUDA
provider of onnxruntime-gpu 1.31.1 itself put each operator in each type, at TABLE_OPSET (its library over a stand-in for the
CUDA runtime; docs/OperatorKernels.md of another version differs). The opset matters: kernels belong to versions of an
operator, and InstanceNormalization has one up to version 21 only, so at opset 22 and later it runs on the CPU in any type.
Abs and ReduceSum are in the table because that library holds their kernels; where it puts them was not tried.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from fluxc.base.errors import BuildError

FLOAT, BF16, FP16, DOUBLE = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.DOUBLE
TABLE_OPSET = 23
FLOATS = {FLOAT, BF16, FP16, DOUBLE}
WITHOUT_BF16 = {FLOAT, FP16, DOUBLE}
KERNELS = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Neg", "Sigmoid", "Sqrt", "Pow", "Softmax", "LayerNormalization", "RMSNormalization",
         "MatMul", "Gemm", "Conv", "Concat", "Split", "Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand",
         "Gather", "Identity", "Where", "Cast", "Shape", "Sin", "Cos", "ReduceMean", "GroupNormalization"),
        FLOATS,
    ),
    **dict.fromkeys(
        ("Reciprocal", "Resize", "Clip", "Round", "Less", "Greater", "Equal", "Abs", "ReduceSum"),
        WITHOUT_BF16,
    ),
    "Attention": {FLOAT, BF16, FP16},
    "DequantizeLinear": {FLOAT, FP16},
    "MatMulBlockQuantizedFp4Weight": {BF16, FP16},
    "Range": {FLOAT, DOUBLE},
}  # fmt: skip
TYPED_BY = {"DequantizeLinear": 1, "Where": 1}
GIVES = {"Less": TensorProto.BOOL, "Greater": TensorProto.BOOL, "Equal": TensorProto.BOOL, "Shape": TensorProto.INT64}


def check_kernels(name: str, model: onnx.ModelProto) -> None:
    """Raise BuildError naming a node of `model` that would run on the CPU for want of a CUDA kernel in its type."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        given = [types[name] for name in node.input if name]
        to = next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
        computed = given[TYPED_BY.get(node.op_type, 0)]
        if computed in FLOATS and computed not in KERNELS.get(node.op_type, set()):
            raise BuildError(
                f"{name}: ONNX Runtime has no CUDA kernel for {node.op_type} in {TensorProto.DataType.Name(computed).lower()} "
                f"(the node that gives {node.output[0]!r}), so it would run on the CPU; trace it in another type"
            )
        types |= dict.fromkeys(node.output, to or GIVES.get(node.op_type, computed))
