"""How TensorRT computes the Linears of each format, so that each compiles to the GEMM its format names.

Weights bound (the plan holds code, its weights are inputs):
1. nvfp4: the input over its `input_scale` passes TRT_FP4DynamicQuantize under scale 1, the weight is dequantized with its
   block scales alone, and the product is multiplied by input_scale * weight_scale_2. So both tensor scales are inputs, and one
   plan serves every block. `Gemm(transB=1)` on rows reshaped to 2-D: with a Transpose and a batched MatMul, TensorRT turns the
   weight round at every run.
2. fp8: likewise, with an E4M3 QuantizeLinear/DequantizeLinear pair under scale 1.
3. bf16: `Gemm(transB=1)`.
4. nvfp4-w4a16: the weight dequantized with its block scales alone, 3, and the product times weight_scale_2. It is dequantized
   to fp16, which holds E2M1 times E4M3 exactly (six bits, 2^-10 to 2688), and cast to bf16, which does too: TensorRT-RTX 1.7.1
   makes one kernel of that. Of fp32 or bf16 it makes three at the sizes of real models, with the whole weight in fp32 between.

Weights baked (the plan holds them): 3, or the canonical form with every scale where TensorRT expects it, a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import TensorProto

from fluxc.formats.bf16 import BF16
from fluxc.formats.constants import BLOCK
from fluxc.targets.forms import Forms
from fluxc.targets.tensorrt.nodes import TRT_DOMAIN, Nodes

E4M3_SCALE_TYPE = int(TensorProto.FLOAT8E4M3FN)


@dataclass(frozen=True)
class Gemm:
    """What is computed as one: the name of its node, and its layers, whose weights lie end to end."""

    name: str
    layers: tuple[str, ...]

    def every(self, part: str) -> list[str]:
        """The tensors `part` of every layer."""
        return [f"{layer}.{part}" for layer in self.layers]

    def first(self, part: str) -> list[str]:
        """The tensor `part` of the first layer, which speaks for all: the writer gave them equal scales, and
        check_group_scales refuses others."""
        return self.every(part)[:1]


LinearForm = Callable[[Nodes, Gemm, str], str]
"""Adds x @ weight.T of 2-D bf16 rows to a graph and returns its name: (graph, gemm, x)."""


def plain(graph: Nodes, gemm: Gemm, x: str) -> str:
    """3: the weight as it is stored, in bf16."""
    return graph.gemm(x, graph.cast(graph.weight(gemm.every("weight"))), gemm.name, BF16)


def nvfp4_bound(graph: Nodes, gemm: Gemm, x: str) -> str:
    """1."""
    scales = graph.weight(gemm.first("input_scale")), graph.weight(gemm.first("weight_scale_2"))
    one, scaled = graph.one(), _over_input_scale(graph, gemm, x, scales[0])
    block_scales = graph.weight(gemm.every("weight_scale"))
    rounded = _nvfp4_input(graph, gemm, scaled, one)
    codes = graph.weight(gemm.every("weight"), TensorProto.FLOAT4E2M1)
    dense = _dequantized(graph, codes, block_scales, one, f"{gemm.name}/weight")
    product = graph.gemm(graph.cast(rounded), graph.cast(dense), gemm.name, "nvfp4")
    return _times_scales(graph, gemm, product, scales)


def fp8_bound(graph: Nodes, gemm: Gemm, x: str) -> str:
    """2."""
    scales = graph.weight(gemm.first("input_scale")), graph.weight(gemm.first("weight_scale"))
    one, scaled = graph.one(), _over_input_scale(graph, gemm, x, scales[0])
    rounded = _e4m3_input(graph, gemm, scaled, one)
    dense = graph.node("DequantizeLinear", [graph.weight(gemm.every("weight")), one], f"{gemm.name}/weight")
    product = graph.gemm(graph.cast(rounded), graph.cast(dense), gemm.name, "fp8")
    return _times_scales(graph, gemm, product, scales)


def nvfp4_w4a16_bound(graph: Nodes, gemm: Gemm, x: str) -> str:
    """4."""
    tensor_scale = graph.weight(gemm.first("weight_scale_2"))
    block_scales = graph.weight(gemm.every("weight_scale"))
    codes = graph.weight(gemm.every("weight"), TensorProto.FLOAT4E2M1)
    dense = _dequantized(graph, codes, block_scales, graph.one(TensorProto.FLOAT16), f"{gemm.name}/weight")
    product = graph.gemm(x, graph.cast(dense), gemm.name, "nvfp4-w4a16")
    full = graph.node("Mul", [graph.cast(product, TensorProto.FLOAT), tensor_scale], f"{gemm.name}/unscaled")
    return graph.cast(full)


def nvfp4_w4a16_baked(graph: Nodes, gemm: Gemm, x: str) -> str:
    """The canonical form of nvfp4, of the weight alone."""
    codes = graph.weight(gemm.every("weight"), TensorProto.FLOAT4E2M1)
    block_scales, tensor_scale = graph.weight(gemm.every("weight_scale")), graph.weight(gemm.first("weight_scale_2"))
    dense = _dequantized(graph, codes, block_scales, tensor_scale, f"{gemm.name}/weight")
    return _canonical(graph, gemm, x, dense, "nvfp4-w4a16")


def nvfp4_baked(graph: Nodes, gemm: Gemm, x: str) -> str:
    """The canonical form of nvfp4."""
    input_scale, tensor_scale = graph.weight(gemm.first("input_scale")), graph.weight(gemm.first("weight_scale_2"))
    rounded = _nvfp4_input(graph, gemm, x, input_scale)
    codes = graph.weight(gemm.every("weight"), TensorProto.FLOAT4E2M1)
    block_scales = graph.weight(gemm.every("weight_scale"))
    dense = _dequantized(graph, codes, block_scales, tensor_scale, f"{gemm.name}/weight")
    return _canonical(graph, gemm, rounded, dense, "nvfp4")


def fp8_baked(graph: Nodes, gemm: Gemm, x: str) -> str:
    """The canonical form of fp8."""
    input_scale, tensor_scale = graph.weight(gemm.first("input_scale")), graph.weight(gemm.first("weight_scale"))
    rounded = _e4m3_input(graph, gemm, graph.cast(x, TensorProto.FLOAT), input_scale)
    dense = graph.node("DequantizeLinear", [graph.weight(gemm.every("weight")), tensor_scale], f"{gemm.name}/weight")
    return _canonical(graph, gemm, rounded, dense, "fp8")


def _over_input_scale(graph: Nodes, gemm: Gemm, x: str, input_scale: str) -> str:
    return graph.node("Div", [graph.cast(x, TensorProto.FLOAT), input_scale], f"{gemm.name}/scaled")


def _times_scales(graph: Nodes, gemm: Gemm, product: str, scales: tuple[str, str]) -> str:
    both = graph.node("Mul", [*scales], f"{gemm.name}/scales")
    full = graph.node("Mul", [graph.cast(product, TensorProto.FLOAT), both], f"{gemm.name}/unscaled")
    return graph.cast(full)


def _canonical(graph: Nodes, gemm: Gemm, rounded: str, dense: str, format: str) -> str:
    turned = graph.node("Transpose", [graph.cast(dense)], f"{gemm.name}/turned", perm=[1, 0])
    return graph.matmul(graph.cast(rounded), turned, gemm.name, format)


def _nvfp4_input(graph: Nodes, gemm: Gemm, x: str, scale: str) -> str:
    codes, scales = graph.named_node(
        "TRT_FP4DynamicQuantize",
        [x, scale],
        [f"{gemm.name}/codes", f"{gemm.name}/block_scales"],
        f"{gemm.name}/quantize",
        domain=TRT_DOMAIN,
        axis=-1,
        block_size=BLOCK,
        scale_type=E4M3_SCALE_TYPE,
    )
    return _dequantized(graph, codes, scales, scale, f"{gemm.name}/input")


def _e4m3_input(graph: Nodes, gemm: Gemm, x: str, scale: str) -> str:
    codes = graph.node("QuantizeLinear", [x, scale, graph.zero_e4m3()], f"{gemm.name}/codes")
    return graph.node("DequantizeLinear", [codes, scale], f"{gemm.name}/input")


def _dequantized(graph: Nodes, codes: str, block_scales: str, scale: str, name: str) -> str:
    scales = graph.node("DequantizeLinear", [block_scales, scale], f"{name}/scales")
    return graph.node("DequantizeLinear", [codes, scales], name, axis=-1, block_size=BLOCK)


BOUND: Forms[LinearForm] = Forms(
    "TensorRT", {"nvfp4": nvfp4_bound, "nvfp4-w4a16": nvfp4_w4a16_bound, "fp8": fp8_bound, BF16: plain}
)
BAKED: Forms[LinearForm] = Forms(
    "TensorRT", {"nvfp4": nvfp4_baked, "nvfp4-w4a16": nvfp4_w4a16_baked, "fp8": fp8_baked, BF16: plain}
)
