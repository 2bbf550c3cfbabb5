"""The nodes of a graph that is being lowered for TensorRT, as forms add them: each shared part once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef
from fluxc.graph.bind import ONNX_TYPES
from fluxrt.manifest import WeightPort

TRT_DOMAIN = "trt"
PORT_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT16: "float16",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
    TensorProto.FLOAT4E2M1: "float4_e2m1",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
}


def port_dtype(element: int) -> str:
    """A tensor element type as the manifest names it; BuildError for one no engine takes."""
    if element not in PORT_DTYPES:
        raise BuildError(f"a port of type {TensorProto.DataType.Name(element)} is not one an engine takes")
    return PORT_DTYPES[element]


class Nodes:
    """Adds nodes and weight inputs to `graph`.

    `stored` describes the tensors of the weights file. `ports` are the weight inputs so far, `gemms` the GEMMs of Linears by
    node name, with the format each must run in.
    """

    def __init__(self, graph: onnx.GraphProto, stored: Mapping[str, TensorRef]) -> None:
        self._graph, self._stored = graph, stored
        self._made: set[str] = set()
        self.ports: dict[str, WeightPort] = {}
        self.gemms: dict[str, str] = {}

    def holds(self, tensor: str) -> bool:
        """Whether the weights file has `tensor`."""
        return tensor in self._stored

    def weight(self, tensors: list[str], kind: int | None = None) -> str:
        """An input that takes `tensors`, laid end to end along their first dimension."""
        refs = []
        for tensor in tensors:
            if not self.holds(tensor):
                raise BuildError(f"the graph needs tensor {tensor!r}, which the weights file does not hold")
            refs.append(self._stored[tensor])
        name = tensors[0] if len(tensors) == 1 else f"{tensors[0]}+{len(tensors) - 1}"
        if name in self.ports:
            return name
        first = refs[0]
        if first.dtype not in ONNX_TYPES or any(r.dtype != first.dtype or r.shape[1:] != first.shape[1:] for r in refs):
            raise BuildError(
                f"{', '.join(tensors)}: tensors of dtypes {[r.dtype for r in refs]} and shapes {[r.shape for r in refs]} "
                "cannot be one input"
            )
        element = ONNX_TYPES[first.dtype] if kind is None else kind
        shape = [sum(r.shape[0] for r in refs), *first.shape[1:]] if first.shape else []
        if kind == TensorProto.FLOAT4E2M1:
            shape[-1] *= 2
        self._graph.input.append(helper.make_tensor_value_info(name, element, shape))
        self.ports[name] = WeightPort(name, PORT_DTYPES[element], tuple(shape), tuple(tensors))
        return name

    def cast(self, value: str, to: int = TensorProto.BFLOAT16) -> str:
        """`value` as `to`; a weight that is stored so stays as it is."""
        if value in self.ports and ONNX_TYPES[self._stored[self.ports[value].tensors[0]].dtype] == to:
            return value
        output = f"{value}/{PORT_DTYPES[to]}"
        if output in self._made:
            return output
        self._made.add(output)
        return self.node("Cast", [value], output, to=to)

    def gemm(self, x: str, weight: str, name: str, format: str) -> str:
        """`x` [rows, in] @ weight.T, the GEMM `name` of a Linear in `format`."""
        self.gemms[name] = format
        (product,) = self.named_node("Gemm", [x, weight], [f"{name}/product"], name, transB=1)
        return product

    def matmul(self, x: str, weight: str, name: str, format: str) -> str:
        """`x` [rows, in] @ `weight` [in, out], the GEMM `name` of a Linear in `format`."""
        self.gemms[name] = format
        (product,) = self.named_node("MatMul", [x, weight], [f"{name}/product"], name)
        return product

    def one(self, kind: int = TensorProto.FLOAT) -> str:
        """1 in fp32, or in another type."""
        name = "one" if kind == TensorProto.FLOAT else f"one/{PORT_DTYPES[kind]}"
        return self._constant(helper.make_tensor(name, kind, [], [1.0]))

    def zero_e4m3(self) -> str:
        """0 in E4M3, the zero point of a quantizer to it."""
        return self._constant(helper.make_tensor("zero_e4m3", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))

    def ints(self, values: list[int]) -> str:
        """An int64 vector."""
        name = "/".join(["ints", *map(str, values)])
        return self._constant(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """One node of one output, whose name it has, and that name."""
        self._graph.node.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def named_node(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> list[str]:
        """One node under a name of its own, and the names of its outputs."""
        self._graph.node.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs

    def _constant(self, tensor: TensorProto) -> str:
        if tensor.name not in self._made:
            self._graph.initializer.append(tensor)
            self._made.add(tensor.name)
        return tensor.name
