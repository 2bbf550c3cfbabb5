"""Pieces of standard ONNX that reference forms of formats share."""

from __future__ import annotations

import math

from fluxc.formats.base import GraphBuilder
from fluxc.formats.constants import E2M1_VALUES

ONNX_FLOAT, ONNX_UINT8, ONNX_INT8, ONNX_INT32, ONNX_INT64, ONNX_E4M3, ONNX_E2M1 = 1, 2, 3, 6, 7, 17, 23
"""Element types of onnx.TensorProto, for modules that must not import onnx."""


def e2m1_blocks(graph: GraphBuilder, layer: str, rows: int, columns: int, block: int) -> str:
    """The packed E2M1 codes of `layer` as fp32 [rows, columns/block, block]."""
    pairs = [E2M1_VALUES[nibble] for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    table = graph.constant("e2m1_pairs", ONNX_FLOAT, [256, 2], pairs)
    index = graph.node("Cast", [graph.tensor(f"{layer}.weight")], f"{layer}.weight/index", to=ONNX_INT32)
    values = graph.node("Gather", [table, index], f"{layer}.weight/pairs", axis=0)
    shape = graph.constant(f"blocks/{rows}/{columns}/{block}", ONNX_INT64, [3], [rows, columns // block, block])
    return graph.node("Reshape", [values, shape], f"{layer}.weight/blocks")


def e8m0_scales(graph: GraphBuilder, layer: str, factor: float = 1.0) -> str:
    """The E8M0 block scales of `layer` times `factor`, a power of two, as fp32."""
    powers = [math.ldexp(factor, code - 127) for code in range(255)] + [math.nan]
    table = graph.constant(f"e8m0_values/{factor:g}", ONNX_FLOAT, [256], powers)
    exponents = graph.node("Cast", [graph.tensor(f"{layer}.weight_scale")], f"{layer}/exponents", to=ONNX_INT32)
    return graph.node("Gather", [table, exponents], f"{layer}/block_scales", axis=0)


def scaled_blocks(graph: GraphBuilder, layer: str, blocks: str, scales: str, shape: tuple[int, int]) -> str:
    """`blocks` times their `scales` [rows, columns/block], as fp32 [rows, columns]."""
    last = graph.constant("last_axis", ONNX_INT64, [1], [-1])
    spread = graph.node("Unsqueeze", [scales, last], f"{layer}/spread_scales")
    product = graph.node("Mul", [blocks, spread], f"{layer}.weight/scaled")
    whole = graph.constant(f"matrix/{shape[0]}/{shape[1]}", ONNX_INT64, [2], list(shape))
    return graph.node("Reshape", [product, whole], f"{layer}.weight/fp32")
