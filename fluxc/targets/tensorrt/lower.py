"""Lowers neutral bf16 graphs for TensorRT: each `fluxc::Linear` becomes the form that compiles to the GEMM its format names.

Weights bound (the plan holds code, its weights are inputs):
1. nvfp4: the input over its `input_scale` passes TRT_FP4DynamicQuantize under scale 1, the weight is dequantized with its
   block scales alone, and the product is multiplied by input_scale * weight_scale_2. So both tensor scales are inputs, and one
   plan serves every block. `Gemm(transB=1)` on rows reshaped to 2-D: with a Transpose and a batched MatMul, TensorRT turns the
   weight round at every run.
2. fp8: likewise, with an E4M3 QuantizeLinear/DequantizeLinear pair under scale 1.
3. bf16: `Gemm(transB=1)`.
4. Members of a fusion group that read one input are one GEMM, their weights end to end in one input.

Weights baked (the plan holds them): the canonical form with every scale a constant, one GEMM a layer; TensorRT merges a group.

In both:
5. `pre_quant_scale` multiplies a layer's input before any rounding; `svdquant_lora_a` and `_b` add (x a^T) b^T.
6. TensorRT has no fp64: rotary angles, which diffusers computes in it, are computed in fp32, position 512 to 3e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef
from fluxc.formats.constants import BLOCK
from fluxc.graph import LINEAR_DOMAIN, OPSET
from fluxc.graph.bind import ONNX_TYPES
from fluxc.quantize.plan import LayerPlan
from fluxrt.bundle import WeightPort, dimension_size

TRT_DOMAIN = "trt"
E4M3_SCALE_TYPE = int(TensorProto.FLOAT8E4M3FN)
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
        self._model, self._stored, self._plan, self._baked = model, stored, plan, baked
        self._declared = {v.name: v for v in model.graph.input if v.name not in arguments}
        self._graph = onnx.GraphProto(name="fluxc")
        self._graph.input.extend(v for v in model.graph.input if v.name in arguments)
        self._graph.output.extend(model.graph.output)
        self._graph.initializer.extend(_without_double(i) for i in model.graph.initializer)
        self._linears = [n for n in model.graph.node if n.domain == LINEAR_DOMAIN and n.op_type == "Linear"]
        self._made: dict[tuple[str, ...], str] = {}
        self._done: set[str] = set()
        self._ports: list[WeightPort] = []
        self._gemms: dict[str, str] = {}

    def finish(self) -> Lowered:
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(TRT_DOMAIN, 1)]
        model = helper.make_model(self._graph, opset_imports=opsets, ir_version=11, producer_name="fluxc")
        return Lowered(model, self._ports, self._gemms)

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
        layer = node.input[1].removesuffix(".weight")
        if layer in self._done:
            return
        members = self._members(node, layer)
        self._done.update(members)
        outputs = [n.output[0] for n in self._linears if n.input[1].removesuffix(".weight") in members]
        name = layer if len(members) == 1 else self._plan[layer].layer.group or layer
        features = self._columns(layer)
        x = self._node("Reshape", [node.input[0], self._ints([-1, features])], f"{name}/rows")
        if f"{layer}.pre_quant_scale" in self._stored:
            x = self._node("Mul", [x, self._cast(self._weight([f"{layer}.pre_quant_scale"]))], f"{name}/smoothed")
        y = self._product(x, name, members)
        if f"{layer}.svdquant_lora_a" in self._stored:
            low = x
            for factor in ("svdquant_lora_a", "svdquant_lora_b"):
                low = self._gemm(low, self._cast(self._weight([f"{layer}.{factor}"])), f"{layer}.{factor}", "bf16")
            y = self._node("Add", [y, low], f"{name}/corrected")
        rows = [self._stored[f"{member}.weight"].shape[0] for member in members]
        leading = self._node("Shape", [node.input[0]], f"{name}/leading", end=-1)
        shape = self._node("Concat", [leading, self._ints([sum(rows)])], f"{name}/shape", axis=0)
        if len(members) == 1:
            self._node("Reshape", [y, shape], outputs[0])
        else:
            together = self._node("Reshape", [y, shape], f"{name}/together")
            split = helper.make_node("Split", [together, self._ints(rows)], outputs, name=f"{name}/split", axis=-1)
            self._graph.node.append(split)

    def _members(self, node: onnx.NodeProto, layer: str) -> list[str]:
        """The layers computed as one with `layer`: its fusion group, where all of it reads the same input."""
        planned = self._plan.get(layer)
        if self._baked or planned is None or planned.layer.group is None:
            return [layer]
        apart = ("pre_quant_scale", "svdquant_lora_a")
        if any(f"{layer}.{part}" in self._stored for part in apart):
            return [layer]
        together = []
        for other in self._linears:
            name = other.input[1].removesuffix(".weight")
            entry = self._plan.get(name)
            if entry and entry.layer.group == planned.layer.group and other.input[0] == node.input[0]:
                together.append(name)
        return together

    def _product(self, x: str, name: str, members: list[str]) -> str:
        planned = self._plan.get(members[0])
        format = planned.format if planned else "bf16"
        weights = [f"{member}.weight" for member in members]
        if format == "bf16":
            return self._gemm(x, self._cast(self._weight(weights)), name, format)
        scalar = "weight_scale_2" if format == "nvfp4" else "weight_scale"
        # One of the group speaks for all: the writer gave them equal scales, and run_target checks that.
        input_scale, tensor_scale = (self._weight([f"{members[0]}.{part}"]) for part in ("input_scale", scalar))
        if self._baked:
            return self._canonical(x, name, members[0], format, input_scale, tensor_scale)
        one = self._one()
        scaled = self._node("Div", [self._cast(x, TensorProto.FLOAT), input_scale], f"{name}/scaled")
        if format == "nvfp4":
            block_scales = self._weight([f"{member}.weight_scale" for member in members])
            rounded = self._quantized_input(scaled, one, name)
            codes = self._weight(weights, TensorProto.FLOAT4E2M1)
            dense = self._dequantized(codes, block_scales, one, f"{name}/weight")
        else:
            rounded = self._rounded_fp8(scaled, one, name)
            dense = self._node("DequantizeLinear", [self._weight(weights), one], f"{name}/weight")
        product = self._gemm(self._cast(rounded), self._cast(dense), name, format)
        both = self._node("Mul", [input_scale, tensor_scale], f"{name}/scales")
        full = self._node("Mul", [self._cast(product, TensorProto.FLOAT), both], f"{name}/unscaled")
        return self._cast(full)

    def _canonical(self, x: str, name: str, layer: str, format: str, input_scale: str, tensor_scale: str) -> str:
        """Every scale where TensorRT expects it, all constants once the weights are bound."""
        if format == "nvfp4":
            rounded = self._quantized_input(x, input_scale, name)
            codes = self._weight([f"{layer}.weight"], TensorProto.FLOAT4E2M1)
            dense = self._dequantized(codes, self._weight([f"{layer}.weight_scale"]), tensor_scale, f"{name}/weight")
        else:
            rounded = self._rounded_fp8(self._cast(x, TensorProto.FLOAT), input_scale, name)
            dense = self._node("DequantizeLinear", [self._weight([f"{layer}.weight"]), tensor_scale], f"{name}/weight")
        turned = self._node("Transpose", [self._cast(dense)], f"{name}/turned", perm=[1, 0])
        self._gemms[name] = format
        return self._node("MatMul", [self._cast(rounded), turned], f"{name}/product", node_name=name)

    def _quantized_input(self, x: str, scale: str, name: str) -> str:
        codes, scales = f"{name}/codes", f"{name}/block_scales"
        self._graph.node.append(
            helper.make_node(
                "TRT_FP4DynamicQuantize",
                [x, scale],
                [codes, scales],
                name=f"{name}/quantize",
                domain=TRT_DOMAIN,
                axis=-1,
                block_size=BLOCK,
                scale_type=E4M3_SCALE_TYPE,
            )
        )
        return self._dequantized(codes, scales, scale, f"{name}/input")

    def _dequantized(self, codes: str, block_scales: str, scale: str, name: str) -> str:
        scales = self._node("DequantizeLinear", [block_scales, scale], f"{name}/scales")
        return self._node("DequantizeLinear", [codes, scales], name, axis=-1, block_size=BLOCK)

    def _rounded_fp8(self, x: str, scale: str, name: str) -> str:
        if ("zero",) not in self._made:
            zero = helper.make_tensor("zero_e4m3", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
            self._graph.initializer.append(zero)
            self._made["zero",] = zero.name
        codes = self._node("QuantizeLinear", [x, scale, "zero_e4m3"], f"{name}/codes")
        return self._node("DequantizeLinear", [codes, scale], f"{name}/input")

    def _gemm(self, x: str, weight: str, name: str, format: str) -> str:
        self._gemms[name] = format
        return self._node("Gemm", [x, weight], f"{name}/product", node_name=name, transB=1)

    def _weight(self, tensors: list[str], kind: int | None = None) -> str:
        """An input that takes `tensors`, laid end to end along their first dimension."""
        refs = []
        for tensor in tensors:
            if tensor not in self._stored:
                raise BuildError(f"the graph needs tensor {tensor!r}, which the weights file does not hold")
            refs.append(self._stored[tensor])
        name = tensors[0] if len(tensors) == 1 else f"{tensors[0]}+{len(tensors) - 1}"
        if ("weight", name) in self._made:
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
        self._made["weight", name] = name
        if not self._baked:
            self._ports.append(WeightPort(name, PORT_DTYPES[element], tuple(shape), tuple(tensors)))
        return name

    def _as_traced(self, name: str) -> str:
        """The weight `name` in the dtype the graph was traced in."""
        traced = self._declared[name].type.tensor_type.elem_type
        return self._cast(self._weight([name]), traced)

    def _columns(self, layer: str) -> int:
        dims = self._declared[f"{layer}.weight"].type.tensor_type.shape.dim
        return int(dims[1].dim_value)

    def _cast(self, value: str, to: int = TensorProto.BFLOAT16) -> str:
        """`value` as `to`; a weight that is stored so stays as it is."""
        ref = self._stored.get(value.split("+")[0])
        if ref is not None and ("weight", value) in self._made and ONNX_TYPES[ref.dtype] == to:
            return value
        key = ("cast", value, str(to))
        if key not in self._made:
            self._made[key] = self._node("Cast", [value], f"{value}/{PORT_DTYPES[to]}", to=to)
        return self._made[key]

    def _one(self) -> str:
        if ("one",) not in self._made:
            self._graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]))
            self._made["one",] = "one"
        return "one"

    def _ints(self, values: list[int]) -> str:
        name = "/".join(["ints", *map(str, values)])
        if ("ints", name) not in self._made:
            self._graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
            self._made["ints", name] = name
        return name

    def _node(self, op: str, inputs: list[str], output: str, node_name: str | None = None, **attributes: Any) -> str:
        self._graph.node.append(helper.make_node(op, inputs, [output], name=node_name or output, **attributes))
        return output


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
