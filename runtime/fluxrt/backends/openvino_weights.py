"""How the weights of a graph lie in memory with OpenVINO: changes to a graph that was read, before it is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxrt.errors import BackendError
from fluxrt.unfold import e2m1_pairs, e4m3_table, round_rows, row_scales

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy as np

DECOMPRESSION = "decompression_0"
"""The mark of a Convert that plugins fuse into the product behind it (ov::Decompression), as their own readers set it."""
GROUP = 128
"""Inputs of a product that share a scale, with int8."""
TABLES = {"f4e2m1": e2m1_pairs, "f8e4m3": e4m3_table}
"""The values of a byte, by OpenVINO's type."""
ROWS = 64
"""Rows of a weight that are rounded at a time, so that they stay in the processor's cache."""
BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "i64": 64, "i32": 32, "f4e2m1": 4, "boolean": 8}
"""Bits of a value by type; 8 where it is not listed."""


def keep_compressed(model: Any) -> None:
    """Mark the casts of 16-bit weights in `model`, in place, so that weights stay as they are stored.

    Without the mark they are unfolded to fp32 when the graph is compiled, and packed once more.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and _is_narrow(node.input_value(0)):
            node.get_rt_info()[DECOMPRESSION] = ""


def weight_bytes(model: Any) -> int:
    """Bytes of the constants in `model`."""
    found = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            values = 1
            for dimension in node.get_output_shape(0):
                values *= dimension
            found += values * BITS.get(_type(node.output(0)), 8) // 8
    return found


def int8_rows(model: Any, layers: Collection[str], core: Any) -> list[str]:
    """Replace the quantized weights of `layers` in `model`, in place, by int8 values with one scale a row; the layers' names.

    A row's largest magnitude becomes 127, the others are rounded to the nearest, halves to even. The same on every machine: the
    values are exact products in fp32 of what is stored. Layers of fewer than GROUP inputs stay as they are: their inputs would
    not be rounded. BackendError for a layer whose weight is not stored times its scales.
    """
    import numpy as np
    from openvino import Type
    from openvino import opset13 as ops

    found = []
    for layer, product, shape in products_of(model, layers):
        if shape[1] < GROUP:
            continue
        values, scales = _stored(product, layer, core)
        codes, steps = rounded_rows(values, scales, shape)
        weight = ops.multiply(ops.convert(ops.constant(codes), Type.f32), ops.constant(steps.astype(np.float32)))
        replace(product, weight)
        found.append(layer)
    return found


def products_of(model: Any, layers: Collection[str]) -> list[tuple[str, Any, tuple[int, int]]]:
    """Of those of `layers` that `model` has: name, node with the product, and shape [out, in]."""
    found = []
    for node in model.get_ordered_ops():
        layer = _layer_of(node)
        if layer is not None and layer in layers:
            columns, rows = node.input_value(1).get_partial_shape().to_shape()
            found.append((layer, node, (int(rows), int(columns))))
    return found


def replace(product: Any, weight: Any) -> None:
    """Let `weight`, fp32 [out, in], stand for what `product` multiplies by, which is [in, out]."""
    from openvino import opset13 as ops

    replaced = ops.matmul(product.input_value(0), weight, False, True)
    replaced.set_friendly_name(product.get_friendly_name())
    names = product.output(0).get_names()
    product.output(0).replace(replaced.output(0))
    replaced.output(0).set_names(names)


def _layer_of(node: Any) -> str | None:
    """The layer whose weight, a constant called LAYER.weight, `node` multiplies by."""
    if node.get_type_name() != "MatMul":
        return None
    source = node.input_value(1).get_node()
    while source.get_type_name() != "Constant":
        if source.get_input_size() == 0:
            return None
        source = source.input_value(0).get_node()
    layer, _, ending = source.get_friendly_name().rpartition(".")
    return str(layer) if ending == "weight" else None


def _stored(product: Any, layer: str, core: Any) -> tuple[Any, np.ndarray]:
    """A function that gives rows of what `product`'s weight is stored as, in fp32, and its scales: [out or 1, blocks or 1]."""
    source = product.input_value(1).get_node()
    path = []
    while source.get_type_name() != "Constant":
        path.append(source)
        source = source.input_value(0).get_node()
    scaled = next((node for node in path if node.get_type_name() == "Multiply"), None)
    name = _type(source.output(0))
    if scaled is None or name not in TABLES:
        steps = ", ".join(node.get_type_name() for node in reversed(path))
        raise BackendError(
            f"{layer}: its weight of type {name} goes through {steps}, of which compute: int8 makes nothing; set compute: "
            "exact in the recipe and rebuild"
        )
    scales = _computed(scaled.input_value(1), core)
    rows = source.get_output_shape(0)[0]
    stored = source.data.view("uint8").reshape(rows, -1)
    many = scales.reshape(rows, -1) if scales.size >= rows else scales.reshape(1, 1)
    return lambda first, last: values_of(name, stored[first:last]), many


def rounded_rows(values: Any, scales: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """int8 [out, in] and fp32 [out, 1] that stand for `values` times `scales`.

    `values(first, last)` gives rows of what is stored in fp32; `scales` are [out or 1, blocks of a row or 1], fp32.
    """
    import numpy as np

    rows, columns = shape
    codes, largest = np.empty(shape, np.int8), np.empty(rows, np.float32)
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        blocks = scales[first:last] if len(scales) > 1 else scales
        dense = values(first, last).reshape(last - first, blocks.shape[1], -1) * blocks[:, :, None]
        largest[first:last] = round_rows(dense.reshape(last - first, columns), codes[first:last])
    return codes, row_scales(largest)[:, None]


def values_of(name: str, stored: np.ndarray) -> np.ndarray:
    """The fp32 values of uint8 [rows, bytes], side by side, for OpenVINO's types f4e2m1 (two a byte) and f8e4m3."""
    import numpy as np

    found: np.ndarray = np.take(TABLES[name](), stored).view(np.float32)
    return found


def _computed(output: Any, core: Any) -> np.ndarray:
    """What constants come to at `output`, by the CPU in fp32."""
    from openvino import Model
    from openvino import opset13 as ops

    model = Model([ops.result(output)], [], "constant")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    found: np.ndarray = compiled.create_infer_request().infer()[0].copy()
    return found


def _is_narrow(output: Any) -> bool:
    """Whether `output` is a 16-bit constant."""
    return output.get_node().get_type_name() == "Constant" and _type(output) in ("bf16", "f16")


def _type(output: Any) -> str:
    """OpenVINO's name of an output's type, as in its own files."""
    return str(output.get_element_type().get_type_name())
