"""Lowers neutral graphs for OpenVINO: each `fluxc::Linear` becomes the form its layer's format needs (forms.py).

Factors beside a weight and gathered rows are as for ONNX Runtime. Every other weight is cast to fp32, if it is stored in
another type.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from fluxc.formats.bf16 import BF16
from fluxc.graph import LINEAR_DOMAIN
from fluxc.graph.export import make_model
from fluxc.models.base import Linear
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.onnxruntime.lower import add_gather, add_linear
from fluxc.targets.onnxruntime.nodes import Nodes
from fluxc.targets.openvino.forms import FORMS


def lower(
    model: onnx.ModelProto, arguments: set[str], stored: dict[str, str], plan: dict[str, LayerPlan]
) -> onnx.ModelProto:
    """Lower `model`, whose inputs other than `arguments` are weights, in fp32.

    `stored` gives each tensor's dtype in the weights file, `plan` each planned Linear by layer name; a Linear without a plan
    is bf16. The result's weight inputs are tensors of the weights file.
    """
    graph = onnx.GraphProto(name="fluxc")
    graph.input.extend(value for value in model.graph.input if value.name in arguments)
    graph.output.extend(model.graph.output)
    graph.initializer.extend(model.graph.initializer)
    nodes = Nodes(graph, stored, TensorProto.FLOAT, False)
    weights = {value.name: value.type.tensor_type for value in model.graph.input if value.name not in arguments}
    for node in model.graph.node:
        if node.domain == LINEAR_DOMAIN and node.op_type == "Linear":
            x, weight = node.input
            name = weight.removesuffix(".weight")
            planned = plan.get(name)
            layer = planned.layer if planned else Linear(name, *(d.dim_value for d in weights[weight].shape.dim))
            add_linear(nodes, FORMS.of(planned.format if planned else BF16, name), layer, x, node.output[0])
        elif node.op_type == "Gather" and node.input[0] in weights:
            add_gather(nodes, node, weights[node.input[0]].elem_type)
        else:
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [
                nodes.full(name, weights[name].elem_type) if name in weights else name for name in node.input
            ]
    return make_model(graph)
