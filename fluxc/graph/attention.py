"""Attention whose heads are too wide for a fused kernel, as the VAE's is: over tiles of queries, and taken apart.

Such an attention holds its scores, queries times keys, in memory. A tile of queries attends to all keys, so that tiles change
no result. They lie side by side in the graph, since no CUDA graph can hold a Loop, and a tile is a part of a reshaped tensor:
for a range of tokens whose bounds a run computes, TensorRT sets aside as much as for all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fluxc.base.errors import BuildError


def attention_in_tiles(model: onnx.ModelProto, tiles: int) -> onnx.ModelProto:
    """`model` with each Attention (queries [B, H, T, D]) as `tiles` of T / `tiles` queries each; one tile is `model` as it is.

    `tiles` must divide T at every size. Raises BuildError for an attention with a mask, whose rows belong to queries.
    """
    if tiles == 1:
        return model
    tiled = onnx.ModelProto()
    tiled.CopyFrom(model)
    graph = tiled.graph
    del graph.node[:]
    for node in model.graph.node:
        if node.op_type != "Attention":
            graph.node.append(node)
            continue
        (query, *others), (output,) = node.input, node.output
        if len(others) > 2:
            raise BuildError(f"the attention that gives {output!r} has a mask; this torch is not supported")
        own = _Names(graph, f"{output}/tiles")
        width = own.node("Shape", [query], "width", start=-1)
        # A 0 keeps a dimension.
        shape = own.node("Concat", [own.constant("shape", [0, 0, tiles, -1]), width], "split_shape", axis=0)
        rows = own.node("Reshape", [query, shape], "queries")
        parts = [own.name(f"part_{number}") for number in range(tiles)]
        graph.node.append(helper.make_node("Split", [rows], parts, axis=2, num_outputs=tiles))
        axis, attended = own.constant("axis", [2]), []
        for number, part in enumerate(parts):
            queries = own.node("Squeeze", [part, axis], f"queries_{number}")
            attention = graph.node.add()
            attention.CopyFrom(node)
            attention.input[:] = [queries, *others]
            attention.output[:] = [own.name(str(number))]
            attended.append(attention.output[0])
        graph.node.append(helper.make_node("Concat", attended, [output], axis=2))
    return tiled


def attention_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, bf16, with its attention as MatMul, Softmax and MatMul.

    For heads too wide for a fused kernel: TensorRT refuses such an Attention when the number of tokens is not fixed.
    """
    apart = onnx.ModelProto()
    apart.CopyFrom(model)
    del apart.graph.node[:]
    for node in model.graph.node:
        if node.op_type != "Attention":
            apart.graph.node.append(node)
            continue
        (query, key, value), (output,) = node.input[:3], node.output
        if len(node.input) > 3 or any(a.name == "scale" for a in node.attribute):
            raise BuildError(f"the attention that gives {output!r} has a mask or a scale; this torch is not supported")
        parts: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
            ("Shape", [query], "width", {"start": -1}),
            ("Cast", ["width"], "width/fp32", {"to": TensorProto.FLOAT}),
            ("Sqrt", ["width/fp32"], "root", {}),
            ("Cast", [query], "query/fp32", {"to": TensorProto.FLOAT}),
            ("Div", ["query/fp32", "root"], "query/scaled", {}),
            ("Cast", ["query/scaled"], "query", {"to": TensorProto.BFLOAT16}),
            ("Transpose", [key], "keys", {"perm": [0, 1, 3, 2]}),
            ("MatMul", ["query", "keys"], "scores", {}),
            ("Softmax", ["scores"], "shares", {"axis": -1}),
            ("MatMul", ["shares", value], "", {}),
        )
        for op, inputs, name, attributes in parts:
            own = [i if i in (query, key, value) else f"{output}/{i}" for i in inputs]
            apart.graph.node.append(helper.make_node(op, own, [f"{output}/{name}" if name else output], **attributes))
    return apart


class _Names:
    """Adds nodes and constants to `graph` under names of their own."""

    def __init__(self, graph: onnx.GraphProto, scope: str) -> None:
        self._graph, self._scope = graph, scope

    def name(self, name: str) -> str:
        return f"{self._scope}/{name}"

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._graph.node.append(helper.make_node(op, inputs, [self.name(output)], **attributes))
        return self.name(output)

    def constant(self, name: str, values: list[int]) -> str:
        self._graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), self.name(name)))
        return self.name(name)
