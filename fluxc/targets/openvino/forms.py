"""How OpenVINO computes a Linear of each format, in standard ONNX operators.

1. bf16: Cast to fp32, Transpose, MatMul. fluxrt marks the cast, so that the CPU keeps 16 bits.
2. fp8: DequantizeLinear of the E4M3 weight, then as 1. The CPU unfolds it when the graph is loaded.
3. nvfp4: DequantizeLinear of the E4M3 block scales, of the E2M1 weight with them in blocks of 16, then as 1. The weight stays
   as it is in the file.
4. mxfp4: the same in blocks of 32; the scales are powers of two from a table.
5. Any other format: its reference form, then as 1.

The product has the name of its layer, by which the audit finds it. Free of onnx, for checks before any stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fluxc.formats.base import Format
from fluxc.formats.bf16 import BF16
from fluxc.formats.constants import BLOCK, MX_BLOCK
from fluxc.formats.forms import ONNX_E2M1, e8m0_scales
from fluxc.models.base import Linear
from fluxc.targets.forms import Forms

if TYPE_CHECKING:
    from fluxc.targets.onnxruntime.nodes import Nodes

LinearForm = Callable[["Nodes", Linear, str, str], None]
"""Adds `output` = `x` @ weight.T to a graph: (graph, layer, x, output)."""


def stored(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """1."""
    _product(graph, x, graph.full(f"{layer.name}.weight"), layer, output)


def fp8(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """2."""
    weight = f"{layer.name}.weight"
    parts = [graph.tensor(weight), graph.tensor(f"{weight}_scale")]
    _product(graph, x, graph.node("DequantizeLinear", parts, f"{weight}/fp32"), layer, output)


def nvfp4(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """3."""
    weight = f"{layer.name}.weight"
    both = [graph.tensor(f"{weight}_scale"), graph.tensor(f"{weight}_scale_2")]
    scales = graph.node("DequantizeLinear", both, f"{layer.name}/block_scales")
    parts = [graph.tensor(weight, ONNX_E2M1), scales]
    dense = graph.node("DequantizeLinear", parts, f"{weight}/fp32", axis=1, block_size=BLOCK)
    _product(graph, x, dense, layer, output)


def mxfp4(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """4: in place of the format's reference form, which looks values up, so that the weight would be unfolded."""
    weight = f"{layer.name}.weight"
    scales = e8m0_scales(graph, layer.name)
    parts = [graph.tensor(weight, ONNX_E2M1), scales]
    dense = graph.node("DequantizeLinear", parts, f"{weight}/fp32", axis=1, block_size=MX_BLOCK)
    _product(graph, x, dense, layer, output)


def through_reference(format: Format) -> LinearForm:
    """5."""

    def form(graph: Nodes, layer: Linear, x: str, output: str) -> None:
        dense = format.reference_form(graph, layer.name, layer.out_features, layer.in_features)
        _product(graph, x, dense, layer, output)

    return form


def _product(graph: Nodes, x: str, dense: str, layer: Linear, output: str) -> None:
    turned = graph.turned(dense, f"{layer.name}.weight")
    graph.node("MatMul", [x, turned], output, name=layer.name)


FORMS: Forms[LinearForm] = Forms(
    "OpenVINO", {"nvfp4": nvfp4, "nvfp4-w4a16": nvfp4, "mxfp4": mxfp4, "fp8": fp8, BF16: stored}, through_reference
)
