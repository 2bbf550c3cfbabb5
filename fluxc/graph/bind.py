"""Binds a lowered graph's weight inputs to the component's weights files: external initializers at their byte offset.

ONNX external data may point into any file, a safetensors file too: `location`, `offset`, `length`. Packed NVFP4 values
[out, in/2] uint8 also read as FLOAT4E2M1 [out, in], low nibble first, which is ONNX's own packing: an input declared with that
type gets it.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef

ONNX_TYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "F8_E4M3": TensorProto.FLOAT8E4M3FN,
    "U8": TensorProto.UINT8,
    "I8": TensorProto.INT8,
    "I64": TensorProto.INT64,
}


def argument_names(model: onnx.ModelProto) -> set[str]:
    """The inputs of a neutral graph that are no weights; tensors of a checkpoint have a dot in their name, arguments none."""
    return {value.name for value in model.graph.input if "." not in value.name}


def bind(model: onnx.ModelProto, arguments: set[str], weights: dict[str, TensorRef]) -> set[str]:
    """Turn every input of `model` outside `arguments` into an external initializer, in place.

    `weights` describes the tensors of the weights files, which lie beside the graph. Returns the tensors bound. Raises
    BuildError for an input that no file holds.
    """
    graph = model.graph
    declared = {v.name: v.type.tensor_type.elem_type for v in graph.input if v.name not in arguments}
    bound = list(declared)
    kept = [value for value in graph.input if value.name in arguments]
    missing = [name for name in bound if name not in weights]
    if missing:
        raise BuildError(f"the graph needs {', '.join(missing[:4])}, which the weights files do not hold")
    for name in bound:
        graph.initializer.append(_external(weights[name], declared[name]))
    inputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del graph.input[:]
    graph.input.extend(inputs)
    return set(bound)


def _external(ref: TensorRef, declared: int) -> TensorProto:
    tensor = TensorProto(name=ref.name, data_location=TensorProto.EXTERNAL)
    if declared == TensorProto.FLOAT4E2M1:
        tensor.data_type = TensorProto.FLOAT4E2M1
        tensor.dims.extend((ref.shape[0], ref.shape[1] * 2))
    elif declared == TensorProto.UINT8 and ref.dtype == "F8_E4M3":
        # Scales as the bytes they are, for an operator without a type for them.
        tensor.data_type = TensorProto.UINT8
        tensor.dims.extend(ref.shape)
    elif ref.dtype in ONNX_TYPES:
        tensor.data_type = ONNX_TYPES[ref.dtype]
        tensor.dims.extend(ref.shape)
    else:
        raise BuildError(f"tensor {ref.name!r} has dtype {ref.dtype}, which no graph can hold")
    for key, value in (("location", ref.file.name), ("offset", str(ref.offset)), ("length", str(ref.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
