"""Lowers neutral graphs for ONNX Runtime: each `fluxc::Linear` becomes the form its layer's format needs.

1. bf16: Cast to fp32, Transpose, MatMul (the first two are folded when a session is made).
2. fp8: DequantizeLinear of the E4M3 weight, then as above.
3. nvfp4, weights 8-bit in memory: com.microsoft::MatMulNBits. Twice an E2M1 value is an integer of at most 12, so codes
   + 128 with half the block scale are exact; a table turns the packed bytes into them, folded when a session is made.
4. nvfp4, weights 4-bit in memory: com.microsoft::GatherBlockQuantized, which ONNX Runtime does not fold, unfolds them at
   every use; then Transpose and MatMul. Half the memory of 3, and slower.
5. With activations "nvfp4", inputs of nvfp4 layers pass `fluxc::NVFP4FakeQuantize`, and inputs of fp8 layers an E4M3
   QuantizeLinear/DequantizeLinear pair: what an FP4 GPU computes with. Members of a fusion group share one quantizer.
6. A layer with `pre_quant_scale` (AWQ, SVDQuant) has its input multiplied by it before any rounding, on its own; one with
   `svdquant_lora_a` and `_b` gets (x a^T) b^T added, x being that product, not rounded.
7. Every other weight is cast to the type it was traced in, if it is stored in another.

A graph that was traced in 16 bits is for the CUDA provider. There, 3 and 4 are
com.microsoft::MatMulBlockQuantizedFp4Weight, which takes codes and block scales as they lie in the file, and 5 does not exist.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError
from fluxc.formats.constants import BLOCK, E2M1_MAX, E2M1_VALUES, E4M3_MAX, E4M3_TINY
from fluxc.formats.registry import FORMATS
from fluxc.graph import LINEAR_DOMAIN, OPSET
from fluxc.graph.export import make_model
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.onnxruntime.forms import FORMS

STORED = {"F32": TensorProto.FLOAT, "BF16": TensorProto.BFLOAT16, "F16": TensorProto.FLOAT16}
TYPE_NAMES: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.BFLOAT16: "bf16", TensorProto.FLOAT16: "fp16"}


def lower(
    model: onnx.ModelProto,
    arguments: set[str],
    stored: dict[str, str],
    plan: dict[str, LayerPlan],
    activations: str = "none",
    weights_in_memory: str = "8-bit",
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Lower `model`, whose inputs other than `arguments` are weights; matrix products are computed in `dtype`.

    `stored` gives each tensor's dtype in the weights file, `plan` each planned Linear by layer name; a Linear without a plan
    is bf16. The result's weight inputs are tensors of the weights file.
    """
    graph = onnx.GraphProto(name="fluxc")
    graph.input.extend(value for value in model.graph.input if value.name in arguments)
    graph.output.extend(model.graph.output)
    graph.initializer.extend(model.graph.initializer)
    build = _Lowering(graph, stored, plan, activations, weights_in_memory, dtype)
    weights = {v.name: v.type.tensor_type.elem_type for v in model.graph.input if v.name not in arguments}
    for node in model.graph.node:
        if node.domain == LINEAR_DOMAIN and node.op_type == "Linear":
            build.linear(node.input[0], node.input[1], node.output[0])
            continue
        inputs = [build.full(name, weights[name]) if name in weights else name for name in node.input]
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = inputs
    lowered = make_model(graph)
    if build.uses_fake_quantize:
        lowered.functions.append(fake_quantize_function())
    return lowered


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
        LINEAR_DOMAIN, "NVFP4FakeQuantize", ["x", "input_scale"], ["y"], nodes, [helper.make_opsetid("", OPSET)]
    )


STORED_KINDS: dict[str, int] = {
    "F32": TensorProto.FLOAT,
    "BF16": TensorProto.BFLOAT16,
    "F16": TensorProto.FLOAT16,
    "F8_E4M3": TensorProto.FLOAT8E4M3FN,
    "U8": TensorProto.UINT8,
    "I8": TensorProto.INT8,
}


class _Builder:
    """What a reference form adds nodes through, see fluxc.formats.base.GraphBuilder."""

    def __init__(self, lowering: _Lowering, layer: str, kinds: dict[str, int]) -> None:
        self._lowering, self._layer, self._kinds = lowering, layer, kinds

    def tensor(self, name: str) -> str:
        return self._lowering.weight(name, self._kinds[name.removeprefix(f"{self._layer}.")])

    def constant(self, name: str, kind: int, shape: list[int], values: list[int] | list[float]) -> str:
        return self._lowering.constant(name, kind, shape, values)

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        return self._lowering.once((op, output), op, inputs, output, **attributes)


class _Lowering:
    """Adds lowered nodes to a graph, each shared part once."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        stored: dict[str, str],
        plan: dict[str, LayerPlan],
        activations: str,
        weights_in_memory: str,
        dtype: int,
    ) -> None:
        self._graph = graph
        self._dtype = dtype
        self._stored = stored
        self._plan = plan
        self._activations = activations
        self._four_bit = weights_in_memory == "4-bit"
        self._made: dict[tuple[str, ...], str] = {}
        self.uses_fake_quantize = False

    def weight(self, name: str, kind: int = TensorProto.UNDEFINED) -> str:
        """A tensor of the weights file as a graph input; binding gives it its place, and its type where `kind` is not given."""
        if ("weight", name) not in self._made:
            if name not in self._stored:
                raise BuildError(f"the graph needs tensor {name!r}, which the weights file does not hold")
            value = self._graph.input.add(name=name)
            value.type.tensor_type.elem_type = kind
            self._made["weight", name] = name
        return name

    def full(self, name: str, to: int | None = None) -> str:
        """The tensor `name` as `to`, by default the type products are computed in."""
        to = self._dtype if to is None else to
        source = self.weight(name)
        if STORED.get(self._stored[name], to) == to:
            return source
        return self.once(("full", name, str(to)), "Cast", [source], f"{name}/{TYPE_NAMES[to]}", to=to)

    def linear(self, x: str, weight: str, output: str) -> None:
        """y = x @ weight.T with `weight` in its planned format."""
        layer = weight.removesuffix(".weight")
        if f"{layer}.pre_quant_scale" in self._stored:
            scale = self.full(f"{layer}.pre_quant_scale")
            x = self.once(("smoothed", x, layer), "Mul", [x, scale], f"{output}/smoothed")
        if f"{layer}.svdquant_lora_a" not in self._stored:
            self._product(x, weight, layer, output)
            return
        self._product(x, weight, layer, f"{output}/quantized")
        low = x
        for factor in ("svdquant_lora_a", "svdquant_lora_b"):
            name = f"{layer}.{factor}"
            turned = self.once(("transposed", name), "Transpose", [self.full(name)], f"{name}/transposed", perm=[1, 0])
            self._graph.node.append(helper.make_node("MatMul", [low, turned], [f"{output}/{factor}"]))
            low = f"{output}/{factor}"
        self._graph.node.append(helper.make_node("Add", [f"{output}/quantized", low], [output]))

    def _product(self, x: str, weight: str, layer: str, output: str) -> None:
        planned = self._plan.get(layer)
        if planned is None or planned.format == "bf16":
            dense = self.full(weight)
        elif planned.format not in FORMS:
            dense = self._reference(planned)
        elif planned.format == "fp8":
            scale = self.weight(f"{layer}.weight_scale")
            dense = self.once(("dq", layer), "DequantizeLinear", [self.weight(weight), scale], f"{weight}/fp32")
            if self._dtype != TensorProto.FLOAT:
                narrow = f"{weight}/{TYPE_NAMES[self._dtype]}"
                dense = self.once(("narrow", layer), "Cast", [dense], narrow, to=self._dtype)
            x = self._rounded_fp8(x, planned)
        elif self._dtype != TensorProto.FLOAT:
            self._fp4_product(x, weight, layer, output)
            return
        else:
            x = self._rounded_nvfp4(x, planned)
            if not self._four_bit:
                self._nvfp4_product(x, weight, planned, output)
                return
            dense = self._nvfp4(weight, layer, planned.layer.out_features)
        transposed = self.once(("transposed", weight), "Transpose", [dense], f"{weight}/transposed", perm=[1, 0])
        self._graph.node.append(helper.make_node("MatMul", [x, transposed], [output]))

    def _reference(self, planned: LayerPlan) -> str:
        """The dense weight of a format that has no form of its own here."""
        layer = planned.layer
        if self._dtype != TensorProto.FLOAT:
            raise BuildError(
                f"{layer.name}: ONNX Runtime on CUDA has no form for {planned.format}; it has {', '.join(FORMS)} and bf16"
            )
        format = FORMATS[planned.format]
        kinds = {part: STORED_KINDS[dtype] for part, (dtype, _) in format.parts(format.block, format.block).items()}
        return format.reference_form(
            _Builder(self, layer.name, kinds), layer.name, layer.out_features, layer.in_features
        )

    def _fp4_product(self, x: str, weight: str, layer: str, output: str) -> None:
        codes = self.weight(weight, TensorProto.UINT8)
        scales = self.weight(f"{layer}.weight_scale", TensorProto.UINT8)
        inputs = [x, codes, scales, self.weight(f"{layer}.weight_scale_2")]
        self._graph.node.append(
            helper.make_node(
                "MatMulBlockQuantizedFp4Weight", inputs, [output], domain="com.microsoft", block_size=BLOCK
            )
        )

    def _nvfp4_product(self, x: str, weight: str, planned: LayerPlan, output: str) -> None:
        layer, rows, columns = planned.layer.name, planned.layer.out_features, planned.layer.in_features
        half_scales = self.once(
            ("half_scales", layer),
            "Mul",
            [self._block_scales(layer), self.constant("half", TensorProto.FLOAT, [], [0.5])],
            f"{layer}/half_block_scales",
        )
        packed = self.weight(weight, TensorProto.UINT8)
        index = self.once(("index", layer), "Cast", [packed], f"{weight}/index", to=TensorProto.INT32)
        doubled = [int(2 * value) + 128 for value in E2M1_VALUES]
        pairs = [doubled[nibble] for byte in range(256) for nibble in (byte & 15, byte >> 4)]
        table = self.constant("nibble_pairs", TensorProto.UINT8, [256, 2], pairs)
        codes = self.once(("codes", layer), "Gather", [table, index], f"{weight}/pairs", axis=0)
        shape = self.constant(f"blocks/{rows}/{columns}", TensorProto.INT64, [3], [rows, columns // BLOCK, BLOCK])
        blocks = self.once(("blocks", layer), "Reshape", [codes, shape], f"{weight}/blocks")
        self._graph.node.append(
            helper.make_node(
                "MatMulNBits",
                [x, blocks, half_scales],
                [output],
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=8,
                block_size=BLOCK,
                accuracy_level=0,
            )
        )

    def _block_scales(self, layer: str) -> str:
        names = [self.weight(f"{layer}.weight_scale"), self.weight(f"{layer}.weight_scale_2")]
        return self.once(("scales", layer), "DequantizeLinear", names, f"{layer}/block_scales")

    def _nvfp4(self, weight: str, layer: str, rows: int) -> str:
        scales = self._block_scales(layer)
        every_row = self.once(
            ("rows", str(rows)),
            "Range",
            [self.constant(f"scalar/{value}", TensorProto.INT64, [], [value]) for value in (0, rows, 1)],
            f"rows/{rows}",
        )
        return self.once(
            ("dq", layer),
            "GatherBlockQuantized",
            [self.weight(weight, TensorProto.FLOAT4E2M1), every_row, scales],
            f"{weight}/fp32",
            domain="com.microsoft",
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def _rounded_nvfp4(self, x: str, planned: LayerPlan) -> str:
        if self._activations == "none":
            return x
        self.uses_fake_quantize = True
        layer, key = planned.layer.name, ("rounded", x, planned.layer.group or planned.layer.name)
        if key in self._made:
            return self._made[key]
        scale = self.weight(f"{layer}.input_scale")
        return self.once(key, "NVFP4FakeQuantize", [x, scale], f"{layer}/input", domain=LINEAR_DOMAIN)

    def _rounded_fp8(self, x: str, planned: LayerPlan) -> str:
        if self._activations == "none":
            return x
        layer, key = planned.layer.name, ("rounded", x, planned.layer.group or planned.layer.name)
        if key in self._made:
            return self._made[key]
        scale, zero = self.weight(f"{layer}.input_scale"), self._zero_e4m3()
        codes = self.once(("codes", *key), "QuantizeLinear", [x, scale, zero], f"{layer}/input_e4m3")
        return self.once(key, "DequantizeLinear", [codes, scale], f"{layer}/input")

    def _zero_e4m3(self) -> str:
        if ("zero",) not in self._made:
            zero = helper.make_tensor("zero_e4m3", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
            self._graph.initializer.append(zero)
            self._made["zero",] = zero.name
        return "zero_e4m3"

    def constant(self, name: str, kind: int, shape: list[int], values: list[int] | list[float]) -> str:
        if ("constant", name) not in self._made:
            self._graph.initializer.append(helper.make_tensor(name, kind, shape, values))
            self._made["constant", name] = name
        return name

    def once(self, key: tuple[str, ...], op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        if key not in self._made:
            self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
            self._made[key] = output
        return self._made[key]
