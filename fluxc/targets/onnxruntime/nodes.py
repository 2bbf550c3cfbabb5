"""The nodes of a graph that is being lowered for ONNX Runtime, as forms add them: each shared part once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError
from fluxc.models.base import Linear

STORED = {"F32": TensorProto.FLOAT, "BF16": TensorProto.BFLOAT16, "F16": TensorProto.FLOAT16}
TYPE_NAMES: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.BFLOAT16: "bf16", TensorProto.FLOAT16: "fp16"}


class Nodes:
    """Adds nodes to `graph`; a GraphBuilder (fluxc.formats.base), for reference forms.

    `stored` gives each tensor's dtype in the weights file. Products are computed in `dtype`, with rounded inputs or not.
    """

    def __init__(self, graph: onnx.GraphProto, stored: dict[str, str], dtype: int, rounds_inputs: bool) -> None:
        self._graph, self._stored, self._dtype, self._rounds_inputs = graph, stored, dtype, rounds_inputs
        self._made: set[str] = set()
        self._rounded: dict[tuple[str, str], str] = {}

    def holds(self, name: str) -> bool:
        """Whether the weights file has the tensor `name`."""
        return name in self._stored

    def tensor(self, name: str, kind: int = TensorProto.UNDEFINED) -> str:
        """A tensor of the weights file as a graph input; binding gives it its place, and its type where `kind` is not given."""
        if name not in self._made:
            if not self.holds(name):
                raise BuildError(f"the graph needs tensor {name!r}, which the weights file does not hold")
            value = self._graph.input.add(name=name)
            value.type.tensor_type.elem_type = kind
            self._made.add(name)
        return name

    def full(self, name: str, to: int | None = None) -> str:
        """The tensor `name` as `to`, by default the type products are computed in."""
        to = self._dtype if to is None else to
        source = self.tensor(name)
        if self.is_stored_as(name, to):
            return source
        return self.node("Cast", [source], f"{name}/{TYPE_NAMES[to]}", to=to)

    def is_stored_as(self, name: str, to: int) -> bool:
        """Whether the tensor `name` needs no cast to `to`."""
        return not self.holds(name) or STORED.get(self._stored[name], to) == to

    @property
    def is_full_precision(self) -> bool:
        """Whether products are computed in fp32."""
        return self._dtype == TensorProto.FLOAT

    def narrowed(self, value: str, name: str) -> str:
        """`value`, the fp32 form of tensor `name`, in the type products are computed in."""
        if self._dtype == TensorProto.FLOAT:
            return value
        return self.node("Cast", [value], f"{name}/{TYPE_NAMES[self._dtype]}", to=self._dtype)

    def turned(self, value: str, name: str) -> str:
        """`value`, some form of the matrix `name`, transposed."""
        return self.node("Transpose", [value], f"{name}/transposed", perm=[1, 0])

    def product(self, x: str, dense: str, layer: Linear, output: str) -> str:
        """`x` @ dense.T, `dense` being the weight of `layer` in full."""
        return self.node("MatMul", [x, self.turned(dense, f"{layer.name}.weight")], output)

    def rounded(self, x: str, layer: Linear, quantizer: Callable[[Nodes, str, str], str]) -> str:
        """`x` as `quantizer` makes it of (graph, layer, x) if inputs are rounded, once for a fusion group; else `x` itself."""
        if not self._rounds_inputs:
            return x
        key = (x, layer.group or layer.name)
        if key not in self._rounded:
            self._rounded[key] = quantizer(self, layer.name, x)
        return self._rounded[key]

    def constant(self, name: str, kind: int, shape: list[int], values: list[int] | list[float] | bytes) -> str:
        """A constant of an ONNX element type, from numbers or its raw bytes."""
        if name not in self._made:
            tensor = helper.make_tensor(name, kind, shape, values, raw=isinstance(values, bytes))
            self._graph.initializer.append(tensor)
            self._made.add(name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """One node and its output's name; the same output is computed once."""
        if output not in self._made:
            self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
            self._made.add(output)
        return output
