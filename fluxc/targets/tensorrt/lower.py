"""Lowers neutral bf16 graphs for TensorRT: each `fluxc::Linear` becomes the form its layer's format needs (forms.py).

1. Weights bound: members of a fusion group that read one input are one GEMM, their weights end to end in one input.
2. Weights baked: one GEMM a layer; TensorRT merges a group.
3. `pre_quant_scale` multiplies a layer's input before any rounding; `svdquant_lora_a` and `_b` add (x a^T) b^T. The members
   of a fusion group are still one GEMM where all have such factors of one rank, and all a `pre_quant_scale` or none: it is
   the same one for all, their a are one GEMM too, end to end, and each has its own b.
4. TensorRT has no fp64: rotary angles, which diffusers computes in it, are computed in fp32, position 512 to 3e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fluxc.base.safetensors import TensorRef
from fluxc.formats.bf16 import BF16
from fluxc.formats.low_rank import A, B
from fluxc.formats.smoothing import PRE_QUANT_SCALE
from fluxc.graph import LINEAR_DOMAIN, OPSET
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.tensorrt.forms import BAKED, BOUND, Gemm
from fluxc.targets.tensorrt.nodes import TRT_DOMAIN, Nodes
from fluxrt.manifest import WeightPort, dimension_size


@dataclass
class Lowered:
    """A graph TensorRT compiles, and which tensors each of its weight inputs takes; with baked weights there are none.

    `gemms` names every GEMM of a Linear (a node of that name) with the format it must run in.
    """

    model: onnx.ModelProto
    weights: list[WeightPort] = field(default_factory=list)
    gemms: dict[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> set[str]:
        """Every tensor of the weights file that the graph computes with."""
        return {name for port in self.weights for name in port.tensors}


def lower_tensorrt(
    model: onnx.ModelProto,
    arguments: set[str],
    stored: Mapping[str, TensorRef],
    plan: Mapping[str, LayerPlan],
    baked: bool = False,
) -> Lowered:
    """Lower `model`, whose inputs other than `arguments` are weights, names without any prefix.

    `stored` describes the tensors of the weights file, `plan` each planned Linear, both under the model's own names; a Linear
    without a plan is bf16. With `baked`, the weights stay inputs under their tensors' names, for `bind` to give them their
    place. Raises BuildError for a tensor that is missing.
    """
    build = _Lowering(model, arguments, stored, plan, baked)
    for node in model.graph.node:
        if node.domain == LINEAR_DOMAIN and node.op_type == "Linear":
            build.linear(node)
        else:
            build.other(node)
    return build.finish()


class _Lowering:
    def __init__(
        self,
        model: onnx.ModelProto,
        arguments: set[str],
        stored: Mapping[str, TensorRef],
        plan: Mapping[str, LayerPlan],
        baked: bool,
    ) -> None:
        self._stored, self._plan, self._baked = stored, plan, baked
        self._declared = {v.name: v for v in model.graph.input if v.name not in arguments}
        self._graph = onnx.GraphProto(name="fluxc")
        self._graph.input.extend(v for v in model.graph.input if v.name in arguments)
        self._graph.output.extend(model.graph.output)
        self._graph.initializer.extend(_without_double(i) for i in model.graph.initializer)
        self._linears = [n for n in model.graph.node if n.domain == LINEAR_DOMAIN and n.op_type == "Linear"]
        self._nodes = Nodes(self._graph, stored)
        self._done: set[str] = set()

    def finish(self) -> Lowered:
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(TRT_DOMAIN, 1)]
        model = helper.make_model(self._graph, opset_imports=opsets, ir_version=11, producer_name="fluxc")
        return Lowered(model, [] if self._baked else list(self._nodes.ports.values()), self._nodes.gemms)

    def other(self, node: onnx.NodeProto) -> None:
        """A node that is no Linear: its weights in the dtype it was traced in, fp32 where it was fp64."""
        copy = self._graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [self._as_traced(name) if name in self._declared else name for name in node.input]
        copy.name = node.output[0]
        for attribute in copy.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.DOUBLE:
                attribute.i = TensorProto.FLOAT

    def linear(self, node: onnx.NodeProto) -> None:
        """y = x @ weight.T in the layer's format, with the members of its fusion group."""
        graph, layer = self._nodes, node.input[1].removesuffix(".weight")
        if layer in self._done:
            return
        gemm, planned = self._gemm(node, layer), self._plan.get(layer)
        name, forms = gemm.name, BAKED if self._baked else BOUND
        self._done.update(gemm.layers)
        outputs = [n.output[0] for n in self._linears if n.input[1].removesuffix(".weight") in gemm.layers]
        x = graph.node("Reshape", [node.input[0], graph.ints([-1, self._columns(layer)])], f"{name}/rows")
        if graph.holds(f"{layer}.{PRE_QUANT_SCALE}"):
            x = graph.node("Mul", [x, graph.cast(graph.weight(gemm.first(PRE_QUANT_SCALE)))], f"{name}/smoothed")
        y = forms.of(planned.format if planned else BF16, layer)(graph, gemm, x)
        if graph.holds(f"{layer}.{A}"):
            y = graph.node("Add", [y, self._low_rank(gemm, x)], f"{name}/corrected")
        rows = [self._stored[weight].shape[0] for weight in gemm.every("weight")]
        leading = graph.node("Shape", [node.input[0]], f"{name}/leading", end=-1)
        shape = graph.node("Concat", [leading, graph.ints([sum(rows)])], f"{name}/shape", axis=0)
        if len(outputs) == 1:
            graph.node("Reshape", [y, shape], outputs[0])
        else:
            together = graph.node("Reshape", [y, shape], f"{name}/together")
            graph.named_node("Split", [together, graph.ints(rows)], outputs, f"{name}/split", axis=-1)

    def _low_rank(self, gemm: Gemm, x: str) -> str:
        """(x a^T) b^T of every member, side by side."""
        graph = self._nodes
        low = graph.gemm(x, graph.cast(graph.weight(gemm.every(A))), f"{gemm.name}.{A}", BF16)
        each = [low]
        if len(gemm.layers) > 1:
            ranks = [self._stored[factor].shape[0] for factor in gemm.every(A)]
            parts = [f"{layer}.{A}/part" for layer in gemm.layers]
            each = graph.named_node("Split", [low, graph.ints(ranks)], parts, f"{gemm.name}/ranks", axis=-1)
        products = [
            graph.gemm(part, graph.cast(graph.weight([factor])), factor, BF16)
            for part, factor in zip(each, gemm.every(B), strict=True)
        ]
        return products[0] if len(products) == 1 else graph.node("Concat", products, f"{gemm.name}/low_rank", axis=-1)

    def _gemm(self, node: onnx.NodeProto, layer: str) -> Gemm:
        """What is computed as one with `layer`: its fusion group, where all of it reads the same input."""
        alone, planned = Gemm(layer, (layer,)), self._plan.get(layer)
        if self._baked or planned is None or planned.layer.group is None:
            return alone
        together = []
        for other in self._linears:
            name = other.input[1].removesuffix(".weight")
            entry = self._plan.get(name)
            if entry and entry.layer.group == planned.layer.group and other.input[0] == node.input[0]:
                together.append(name)
        beside = {(self._rank(name), self._nodes.holds(f"{name}.{PRE_QUANT_SCALE}")) for name in together}
        is_one = len(together) > 1 and len(beside) == 1
        return Gemm(planned.layer.group, tuple(together)) if is_one else alone

    def _rank(self, layer: str) -> int:
        """Of the factors beside its weight; 0 without."""
        return self._stored[f"{layer}.{A}"].shape[0] if self._nodes.holds(f"{layer}.{A}") else 0

    def _as_traced(self, name: str) -> str:
        """The weight `name` in the dtype the graph was traced in."""
        traced = self._declared[name].type.tensor_type.elem_type
        return self._nodes.cast(self._nodes.weight([name]), traced)

    def _columns(self, layer: str) -> int:
        dims = self._declared[f"{layer}.weight"].type.tensor_type.shape.dim
        return int(dims[1].dim_value)


def _without_double(initializer: TensorProto) -> TensorProto:
    if initializer.data_type != TensorProto.DOUBLE:
        return initializer
    return numpy_helper.from_array(numpy_helper.to_array(initializer).astype(np.float32), initializer.name)


def fix_shapes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Replace every dimension that counts something by its number, in place."""
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = dimension_size(dimension.dim_param, sizes)
