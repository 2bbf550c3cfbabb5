"""The nodes of a graph that is being lowered for ONNX Runtime, as forms add them: each shared part once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import onnx
from msgspec import UNSET
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError
from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import FORMATS
from fluxc.formats.smoothing import PRE_QUANT_SCALE
from fluxc.models.base import Linear
from fluxrt.manifest import Unfold
from fluxrt.unfold import INT8, ZERO_POINT, input_names

STORED = {"F32": TensorProto.FLOAT, "BF16": TensorProto.BFLOAT16, "F16": TensorProto.FLOAT16}
LEAST_SCALE = 1e-30
"""Of a token of zeros, by which it is divided."""
_PLAIN: dict[str, Any] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TYPE_NAMES: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.BFLOAT16: "bf16", TensorProto.FLOAT16: "fp16"}


@dataclass(frozen=True)
class LinearPart(Linear):
    """Rows first:last of the Linear `name`; `out_features` counts all of its rows."""

    rows: tuple[int, int] = (0, 0)


class Nodes:
    """Adds nodes to `graph`; a GraphBuilder (fluxc.formats.base), for reference forms.

    `stored` gives each tensor's dtype in the weights file. Products are computed in `dtype`, with rounded inputs or not.
    """

    def __init__(self, graph: onnx.GraphProto, stored: dict[str, str], dtype: int, rounds_inputs: bool) -> None:
        self._graph, self._stored, self._dtype, self._rounds_inputs = graph, stored, dtype, rounds_inputs
        self._made: set[str] = set()
        self._rounded: dict[tuple[str, str], str] = {}
        self._smoothed: dict[tuple[str, str], str] = {}
        self.unfolds: list[Unfold] = []

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

    def unfolded(self, layer: Linear, format: str, form: Literal["int8", "float32"], kind: int) -> list[str]:
        """Inputs that the runtime makes of the weight of `layer`, stored in `format`, in this form; `kind` is the type of the
        first."""
        shape = (layer.out_features, layer.in_features)
        rows = layer.rows if isinstance(layer, LinearPart) else UNSET
        if format == BF16:
            entry = Unfold(layer.name, form, shape, _PLAIN[self._stored[f"{layer.name}.weight"]], rows=rows)
        else:
            known = FORMATS[format]
            assert known.values is not None
            scales = tuple(part for part in known.parts(*shape) if part.startswith("weight_scale"))
            block = known.block if known.block > 1 else 0
            entry = Unfold(layer.name, form, shape, known.values, scales, block, rows)
        names = input_names(entry)
        if names[0] not in self._made:
            self._made.update(names)
            self.unfolds.append(entry)
            shapes = _unfolded_shapes(entry)
            for name, of, dimensions in zip(names, (kind, TensorProto.FLOAT), shapes, strict=False):
                self._graph.input.append(helper.make_tensor_value_info(name, of, dimensions))
        return names

    def can_be_parted(self, layer: Linear, format: str) -> bool:
        """Whether rows of the weight of `layer`, stored in `format`, can be unfolded apart, and it has no further factors."""
        is_known = FORMATS[format].values is not None if format != BF16 else True
        return is_known and not self.holds(f"{layer.name}.svdquant_lora_a")

    def per_token(self, x: str) -> tuple[str, str]:
        """`x` [..., in] as uint8 with zero point 128, and what a value of each token stands for, fp32 [..., 1].

        Every token has a scale of its own, its largest magnitude / 127. Linears that share an input share them.
        """
        last = self.constant("last_axis", TensorProto.INT64, [1], [-1])
        top = self.node("ReduceMax", [x, last], f"{x}/top", keepdims=1)
        bottom = self.node("ReduceMin", [x, last], f"{x}/bottom", keepdims=1)
        largest = self.node("Max", [top, self.node("Neg", [bottom], f"{x}/depth")], f"{x}/largest")
        step = self.constant("int8_step", TensorProto.FLOAT, [], [1 / INT8])
        least = self.constant("least_scale", TensorProto.FLOAT, [], [LEAST_SCALE])
        scale = self.node("Max", [self.node("Mul", [largest, step], f"{x}/step"), least], f"{x}/scale")
        flat = self.node("Reshape", [scale, last], f"{x}/flat_scale")
        tokens = self.node("Shape", [flat], f"{x}/tokens")
        middle = self.constant("zero_point", TensorProto.UINT8, [], [ZERO_POINT])
        zeros = self.node("Expand", [middle, tokens], f"{x}/zero_points")
        # One scale a row of a matrix: ONNX Runtime divides, rounds and narrows in one pass.
        width = self.node("Shape", [x], f"{x}/shape")
        rows = self.node("Flatten", [x], f"{x}/rows", axis=-1)
        codes = self.node("QuantizeLinear", [rows, flat, zeros], f"{x}/codes", axis=0)
        return self.node("Reshape", [codes, width], f"{x}/uint8"), scale

    def smoothed(self, x: str, layer: Linear) -> str:
        """`x` times the `pre_quant_scale` of `layer`, if it has one, once for a fusion group."""
        name, key = f"{layer.name}.{PRE_QUANT_SCALE}", (x, layer.group or layer.name)
        if not self.holds(name):
            return x
        if key not in self._smoothed:
            self._smoothed[key] = self.node("Mul", [x, self.full(name)], f"{x}/{layer.name}/smoothed")
        return self._smoothed[key]

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


def _unfolded_shapes(entry: Unfold) -> list[tuple[int, ...]]:
    """The shapes of what the runtime makes for `entry`, as fluxrt.unfold says."""
    rows, columns = entry.part[1] - entry.part[0], entry.shape[1]
    if entry.form == "int8":
        return [(columns, rows), (rows,)]
    return [(rows, columns)]
