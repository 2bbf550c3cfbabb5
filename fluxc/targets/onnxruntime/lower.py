"""Lowers neutral graphs for ONNX Runtime: each `fluxc::Linear` becomes the form its layer's format needs (forms.py).

1. A layer with `pre_quant_scale` (AWQ, SVDQuant) has its input multiplied by it before any rounding, once for a fusion group,
   whose members share it; one with `svdquant_lora_a` and `_b` gets (x a^T) b^T added, x being that product, not rounded.
2. Rows that are gathered from a weight, a token embedding's, are gathered as they are stored and cast then.
3. Every other weight is cast to the type it was traced in, if it is stored in another.

A graph that was traced in 16 bits is for the CUDA provider, whose forms differ; inputs are not rounded there.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx
from onnx import TensorProto, helper

from fluxc.formats.bf16 import BF16
from fluxc.formats.constants import BLOCK, E2M1_MAX, E4M3_MAX, E4M3_TINY
from fluxc.graph import LINEAR_DOMAIN, OPSET
from fluxc.graph.export import make_model
from fluxc.models.base import Linear
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.forms import Forms
from fluxc.targets.onnxruntime.forms import CPU, CUDA, FAKE_QUANTIZE, LinearForm
from fluxc.targets.onnxruntime.fuse import parts_of
from fluxc.targets.onnxruntime.nodes import LinearPart, Nodes
from fluxrt.manifest import Unfold


def lower(
    model: onnx.ModelProto,
    arguments: set[str],
    stored: dict[str, str],
    plan: dict[str, LayerPlan],
    activations: str = "none",
    weights_in_memory: str = "8-bit",
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """`lower_with` the forms that take weights as they are stored; those of NVFP4 lie in memory as `weights_in_memory` says."""
    forms = CPU[weights_in_memory] if dtype == TensorProto.FLOAT else CUDA
    return lower_with(forms, model, arguments, stored, plan, activations, dtype).model


class Lowered(NamedTuple):
    """A lowered graph, and what the runtime makes of weights for it."""

    model: onnx.ModelProto
    unfolds: tuple[Unfold, ...]


def lower_with(
    forms: Forms[LinearForm],
    model: onnx.ModelProto,
    arguments: set[str],
    stored: dict[str, str],
    plan: dict[str, LayerPlan],
    activations: str = "none",
    dtype: int = TensorProto.FLOAT,
) -> Lowered:
    """Lower `model`, whose inputs other than `arguments` are weights; matrix products are computed in `dtype`.

    The parts that a Linear's output is cut into are computed apart where the forms take rows.

    `stored` gives each tensor's dtype in the weights file, `plan` each planned Linear by layer name; a Linear without a plan
    is bf16. The result's weight inputs are tensors of the weights file, and those of `unfolds`.
    """
    graph = onnx.GraphProto(name="fluxc")
    graph.input.extend(value for value in model.graph.input if value.name in arguments)
    graph.output.extend(model.graph.output)
    graph.initializer.extend(model.graph.initializer)
    nodes = Nodes(graph, stored, dtype, activations != "none")
    weights = {value.name: value.type.tensor_type for value in model.graph.input if value.name not in arguments}
    parts = parts_of(model) if forms.takes_rows else {}
    cutting: set[str] = set()
    for node in model.graph.node:
        if node.domain == LINEAR_DOMAIN and node.op_type == "Linear":
            x, weight = node.input
            name = weight.removesuffix(".weight")
            planned = plan.get(name)
            layer = planned.layer if planned else Linear(name, *(d.dim_value for d in weights[weight].shape.dim))
            format, cut = planned.format if planned else BF16, parts.get(node.output[0])
            if cut and nodes.can_be_parted(layer, format):
                cutting |= cut.cutting
                for first, last, output in cut.parts:
                    part = LinearPart(layer.name, layer.out_features, layer.in_features, layer.group, (first, last))
                    _add_linear(nodes, forms.of(format, name), part, x, output)
            else:
                _add_linear(nodes, forms.of(format, name), layer, x, node.output[0])
            continue
        if cutting.intersection(node.output):
            continue
        if node.op_type == "Gather" and node.input[0] in weights:
            _add_gather(nodes, node, weights[node.input[0]].elem_type)
            continue
        inputs = [nodes.full(name, weights[name].elem_type) if name in weights else name for name in node.input]
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = inputs
    _put_weights_first(graph, arguments)
    lowered = make_model(graph)
    if any(node.op_type == FAKE_QUANTIZE for node in graph.node):
        lowered.functions.append(fake_quantize_function())
    return Lowered(lowered, tuple(nodes.unfolds))


def _put_weights_first(graph: onnx.GraphProto, arguments: set[str]) -> None:
    """Move what depends on weights alone to the front, in place.

    ONNX Runtime runs the inputs of a node in the order of its list, last ones first: weights that stand behind the layer before
    would all be unfolded before any layer is computed, and lie in memory together.
    """
    computed = set(arguments)
    first: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    for node in graph.node:
        depends = any(name in computed for name in node.input)
        computed.update(node.output if depends else ())
        (rest if depends else first).append(node)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*first, *rest)]
    del graph.node[:]
    graph.node.extend(ordered)


def _add_linear(graph: Nodes, form: LinearForm, layer: Linear, x: str, output: str) -> None:
    """`output` = `x` @ weight.T by `form`, with the scales and factors that `layer` has beside its weight."""
    factors = [f"svdquant_lora_{side}" for side in "ab"]
    x = graph.smoothed(x, layer)
    if not graph.holds(f"{layer.name}.{factors[0]}"):
        form(graph, layer, x, output)
        return
    form(graph, layer, x, f"{output}/quantized")
    low = x
    for factor in factors:
        name = f"{layer.name}.{factor}"
        low = graph.node("MatMul", [low, graph.turned(graph.full(name), name)], f"{output}/{factor}")
    graph.node("Add", [f"{output}/quantized", low], output)


def _add_gather(graph: Nodes, node: onnx.NodeProto, to: int) -> None:
    """`node`, which gathers from a weight traced as `to`; the whole table in that type would take twice its bytes or more."""
    table, indices = node.input
    result = node.output[0]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if graph.is_stored_as(table, to):
        graph.node("Gather", [graph.tensor(table), indices], result, **attributes)
        return
    rows = graph.node("Gather", [graph.tensor(table), indices], f"{result}/stored", **attributes)
    graph.node("Cast", [rows], result, to=to)


def fake_quantize_function() -> onnx.FunctionProto:
    """`fluxc::NVFP4FakeQuantize(x, input_scale)` in standard operators; the arithmetic of quantize.nvfp4.fake_quantize."""

    def constant(name: str, value: float | list[int]) -> onnx.NodeProto:
        if isinstance(value, list):
            tensor = helper.make_tensor(name, TensorProto.INT64, [len(value)], value)
        else:
            tensor = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        return helper.make_node("Constant", [], [name], value=tensor)

    node = helper.make_node
    nodes = [
        constant("block_shape", [-1, BLOCK]),
        constant("last", [-1]),
        constant("six", E2M1_MAX),
        constant("tiny", E4M3_TINY),
        constant("huge", E4M3_MAX),
        constant("half", 0.5),
        constant("one", 1.0),
        constant("two", 2.0),
        constant("four", 4.0),
        node("Shape", ["x"], ["shape"]),
        node("Reshape", ["x", "block_shape"], ["blocks"]),
        node("Abs", ["blocks"], ["magnitude"]),
        node("ReduceMax", ["magnitude", "last"], ["amax"], keepdims=1),
        node("Div", ["amax", "six"], ["amax_6"]),
        node("Div", ["amax_6", "input_scale"], ["exact"]),
        node("Clip", ["exact", "tiny", "huge"], ["clipped"]),
        node("Cast", ["clipped"], ["e4m3"], to=TensorProto.FLOAT8E4M3FN),
        node("Cast", ["e4m3"], ["block_scale"], to=TensorProto.FLOAT),
        node("Mul", ["block_scale", "input_scale"], ["scale"]),
        node("Div", ["magnitude", "scale"], ["scaled"]),
        node("Min", ["scaled", "six"], ["bounded"]),
        node("Less", ["bounded", "two"], ["under_two"]),
        node("Less", ["bounded", "four"], ["under_four"]),
        node("Where", ["under_four", "one", "two"], ["coarse"]),
        node("Where", ["under_two", "half", "coarse"], ["step"]),
        node("Div", ["bounded", "step"], ["steps"]),
        node("Round", ["steps"], ["whole"]),
        node("Mul", ["whole", "step"], ["rounded"]),
        node("Mul", ["rounded", "scale"], ["restored"]),
        node("Sign", ["blocks"], ["sign"]),
        node("Mul", ["sign", "restored"], ["signed"]),
        node("Reshape", ["signed", "shape"], ["y"]),
    ]
    return helper.make_function(
        LINEAR_DOMAIN, FAKE_QUANTIZE, ["x", "input_scale"], ["y"], nodes, [helper.make_opsetid("", OPSET)]
    )
