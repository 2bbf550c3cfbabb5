"""How ONNX Runtime computes a Linear of each format. Free of onnx, for checks before any stage.

1. bf16: Cast to fp32, Transpose, MatMul.
2. fp8: DequantizeLinear of the E4M3 weight, then com.microsoft::FusedMatMul, which takes it as it lies; a Transpose is not
   fused behind DequantizeLinear, and doubles the time. On CUDA: Cast, Transpose, MatMul.
3. nvfp4 and nvfp4-w4a16, 8-bit: com.microsoft::MatMulNBits. Twice an E2M1 value is an integer of at most 12, so codes + 128
   with half the block scale are exact; a table turns the packed bytes into them.
4. nvfp4, 4-bit: com.microsoft::GatherBlockQuantized of every row, then Transpose and MatMul. Slower than 3, with a smaller
   peak while a layer is computed.
5. nvfp4 on CUDA: com.microsoft::MatMulBlockQuantizedFp4Weight, which takes codes and block scales as they lie in the file.
6. mxfp4: as 3 or 4 with blocks of 32, the scales from a table of powers of two, which 3 takes half of; no provider of ONNX
   Runtime's has a type for E8M0 scales that it computes with.
7. Any other format, on the CPU: its reference form, then as 1.
8. Where inputs are rounded, those of nvfp4 layers pass `fluxc::NVFP4FakeQuantize`, and those of fp8 layers an E4M3
   QuantizeLinear/DequantizeLinear pair: what an FP4 GPU computes with. Members of a fusion group share one quantizer.
   nvfp4-w4a16, and 5 to 7, take inputs as they are.
9. In more memory: com.microsoft::FusedMatMul with values in fp32, which fluxrt unfolds when it loads the graph
   (fluxrt/unfold.py).
10. Where products are computed in int8: com.microsoft::MatMulIntegerToFloat of int8 rows, which fluxrt makes when it loads
   the graph, with inputs rounded to int8 a token at a time.

A session of fluxrt's folds nothing large (fluxrt/backends/onnxruntime.py): weights stay in memory as the file has them, and
each layer unfolds its own when it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fluxc.formats.base import Format
from fluxc.formats.bf16 import BF16
from fluxc.formats.constants import BLOCK, E2M1_VALUES, MX_BLOCK
from fluxc.formats.forms import (
    ONNX_E2M1,
    ONNX_E4M3,
    ONNX_FLOAT,
    ONNX_INT8,
    ONNX_INT32,
    ONNX_INT64,
    ONNX_UINT8,
    e8m0_scales,
)
from fluxc.graph import LINEAR_DOMAIN
from fluxc.models.base import Linear
from fluxc.targets.forms import Forms
from fluxrt.unfold import ZERO_POINT

if TYPE_CHECKING:
    from fluxc.targets.onnxruntime.nodes import Nodes

LinearForm = Callable[["Nodes", Linear, str, str], None]
"""Adds `output` = `x` @ weight.T to a graph: (graph, layer, x, output)."""

VENDOR = "com.microsoft"
FAKE_QUANTIZE = "NVFP4FakeQuantize"
"""A function of the graph itself (lower.py)."""


def stored(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """1: the weight as it is stored."""
    graph.product(x, graph.full(f"{layer.name}.weight"), layer, output)


def fp8(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """2, in the type products are computed in."""
    weight, scale = f"{layer.name}.weight", graph.tensor(f"{layer.name}.weight_scale")
    dense = graph.node("DequantizeLinear", [graph.tensor(weight), scale], f"{weight}/fp32")
    x = graph.rounded(x, layer, _e4m3_input)
    if graph.is_full_precision:
        graph.node("FusedMatMul", [x, dense], output, domain=VENDOR, transB=1)
    else:
        graph.product(x, graph.narrowed(dense, weight), layer, output)


def nvfp4_8_bit(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """3: codes as bytes."""
    half = graph.constant("half", ONNX_FLOAT, [], [0.5])
    half_scales = graph.node("Mul", [_block_scales(graph, layer.name), half], f"{layer.name}/half_block_scales")
    _product_of_bytes(graph, layer, x, half_scales, BLOCK, output)


def mxfp4_8_bit(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """6, by 3."""
    _product_of_bytes(graph, layer, x, e8m0_scales(graph, layer.name, 0.5), MX_BLOCK, output)


def _product_of_bytes(graph: Nodes, layer: Linear, x: str, half_scales: str, block: int, output: str) -> None:
    name, rows, columns = layer.name, layer.out_features, layer.in_features
    packed = graph.tensor(f"{name}.weight", ONNX_UINT8)
    index = graph.node("Cast", [packed], f"{name}.weight/index", to=ONNX_INT32)
    doubled = [int(2 * value) + 128 for value in E2M1_VALUES]
    pairs = [doubled[nibble] for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    table = graph.constant("nibble_pairs", ONNX_UINT8, [256, 2], pairs)
    codes = graph.node("Gather", [table, index], f"{name}.weight/pairs", axis=0)
    shape = graph.constant(f"blocks/{rows}/{columns}/{block}", ONNX_INT64, [3], [rows, columns // block, block])
    blocks = graph.node("Reshape", [codes, shape], f"{name}.weight/blocks")
    graph.node(
        "MatMulNBits",
        [x, blocks, half_scales],
        output,
        domain=VENDOR,
        K=columns,
        N=rows,
        bits=8,
        block_size=block,
        accuracy_level=0,
    )


def nvfp4_4_bit(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """4: codes as they are stored, every row of them gathered."""
    _product_of_codes(graph, layer, x, _block_scales(graph, layer.name), BLOCK, output)


def mxfp4_4_bit(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """6, by 4."""
    _product_of_codes(graph, layer, x, e8m0_scales(graph, layer.name), MX_BLOCK, output)


def _product_of_codes(graph: Nodes, layer: Linear, x: str, scales: str, block: int, output: str) -> None:
    rows = layer.out_features
    bounds = [graph.constant(f"scalar/{value}", ONNX_INT64, [], [value]) for value in (0, rows, 1)]
    every_row = graph.node("Range", bounds, f"rows/{rows}")
    weight = f"{layer.name}.weight"
    dense = graph.node(
        "GatherBlockQuantized",
        [graph.tensor(weight, ONNX_E2M1), every_row, scales],
        f"{weight}/fp32",
        domain=VENDOR,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    graph.product(x, dense, layer, output)


def nvfp4_cuda(graph: Nodes, layer: Linear, x: str, output: str) -> None:
    """5: codes and scales as bytes."""
    codes = graph.tensor(f"{layer.name}.weight", ONNX_UINT8)
    scales = graph.tensor(f"{layer.name}.weight_scale", ONNX_UINT8)
    inputs = [x, codes, scales, graph.tensor(f"{layer.name}.weight_scale_2")]
    graph.node("MatMulBlockQuantizedFp4Weight", inputs, output, domain=VENDOR, block_size=BLOCK)


def through_reference(format: Format) -> LinearForm:
    """7."""

    def form(graph: Nodes, layer: Linear, x: str, output: str) -> None:
        dense = format.reference_form(graph, layer.name, layer.out_features, layer.in_features)
        graph.product(x, dense, layer, output)

    return form


def unfolded(format: str) -> LinearForm:
    """9: values that the runtime unfolded."""

    def form(graph: Nodes, layer: Linear, x: str, output: str) -> None:
        (dense,) = graph.unfolded(layer, format, "float32", ONNX_FLOAT)
        x = graph.rounded(x, layer, QUANTIZERS[format]) if format in QUANTIZERS else x
        graph.node("FusedMatMul", [x, dense], output, domain=VENDOR, transB=1)

    return form


def int8(format: str, signed: bool) -> LinearForm:
    """10: int8 rows that the runtime made."""

    def form(graph: Nodes, layer: Linear, x: str, output: str) -> None:
        rows, row_scale = graph.unfolded(layer, format, "int8", ONNX_INT8 if signed else ONNX_UINT8)
        codes, scale = graph.per_token(x)
        one = graph.constant("one_scale", ONNX_FLOAT, [], [1.0])
        middle = graph.constant("zero_point", ONNX_UINT8, [], [ZERO_POINT])
        inputs = [codes, rows, one, row_scale, middle, *([] if signed else [middle])]
        product = graph.node("MatMulIntegerToFloat", inputs, f"{output}/product", domain=VENDOR)
        graph.node("Mul", [product, scale], output)

    return form


def _block_scales(graph: Nodes, layer: str) -> str:
    tensors = [graph.tensor(f"{layer}.weight_scale"), graph.tensor(f"{layer}.weight_scale_2")]
    return graph.node("DequantizeLinear", tensors, f"{layer}/block_scales")


def _nvfp4_input(graph: Nodes, layer: str, x: str) -> str:
    scale = graph.tensor(f"{layer}.input_scale")
    return graph.node(FAKE_QUANTIZE, [x, scale], f"{layer}/input", domain=LINEAR_DOMAIN)


def _e4m3_input(graph: Nodes, layer: str, x: str) -> str:
    scale, zero = graph.tensor(f"{layer}.input_scale"), graph.constant("zero_e4m3", ONNX_E4M3, [], b"\0")
    codes = graph.node("QuantizeLinear", [x, scale, zero], f"{layer}/input_e4m3")
    return graph.node("DequantizeLinear", [codes, scale], f"{layer}/input")


QUANTIZERS = {"nvfp4": _nvfp4_input, "fp8": _e4m3_input}
"""What rounds the inputs of a layer where they are rounded, by format."""


def _of_rounded(form: LinearForm) -> LinearForm:
    """`form` of inputs in NVFP4, where they are rounded."""

    def rounding(graph: Nodes, layer: Linear, x: str, output: str) -> None:
        form(graph, layer, graph.rounded(x, layer, _nvfp4_input), output)

    return rounding


def _on_cpu(nvfp4: LinearForm, mxfp4: LinearForm) -> Forms[LinearForm]:
    return Forms(
        "ONNX Runtime",
        {"nvfp4": _of_rounded(nvfp4), "nvfp4-w4a16": nvfp4, "mxfp4": mxfp4, "fp8": fp8, BF16: stored},
        through_reference,
    )


CPU = {"8-bit": _on_cpu(nvfp4_8_bit, mxfp4_8_bit), "4-bit": _on_cpu(nvfp4_4_bit, mxfp4_4_bit)}
"""By how weights of four bits lie in memory."""

CUDA: Forms[LinearForm] = Forms(
    "ONNX Runtime on CUDA", {"nvfp4": nvfp4_cuda, "nvfp4-w4a16": nvfp4_cuda, "fp8": fp8, BF16: stored}
)


def _unfolding(own: Callable[[str], LinearForm], bf16: LinearForm, takes_rows: bool = True) -> Forms[LinearForm]:
    """Forms in which the runtime unfolds every format whose values it knows."""
    return Forms(
        "ONNX Runtime",
        {BF16: bf16},
        lambda format: own(format.name) if format.values else through_reference(format),
        takes_rows,
    )


UNFOLDED = _unfolding(unfolded, unfolded(BF16))
"""Every weight in fp32."""


def in_int8(signed: bool, every_step: bool) -> Forms[LinearForm]:
    """Quantized layers in int8, with rows that are `signed` or not; the others as they are stored, or, where they are computed
    at `every_step`, in fp32 that is unfolded once."""
    bf16 = unfolded(BF16) if every_step else stored
    return _unfolding(lambda format: int8(format, signed), bf16, takes_rows=every_step)
