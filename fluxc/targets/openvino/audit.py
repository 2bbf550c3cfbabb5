"""Checks that a graph is executed as the precision plan says, by reading back what OpenVINO's CPU plugin makes of it.

1. Every Linear is one product, in the precision that was asked for.
2. Its weight lies in memory as it is stored: E2M1 of nvfp4 and mxfp4, bf16 of the rest; with `compute: int8` (or
   `int8-bf16`), int8 in place of any quantized one. Only E4M3 is unfolded, to the type of the product, when the graph is
   loaded.
3. With int8, products of each width round their inputs too: a small one is computed and compared, since nothing that
   the plugin says shows it.
4. Every attention is one kernel: softmax and both products.
5. No part of a graph that is no Linear is computed in another precision than asked for.

A graph whose products take sines of the step's time is computed in fp32 in any case (Settled.for_graph).

Where this machine lacks the precision, graphs are audited in fp32; `computed_in` says so.

Kinds of findings: `missing` (no product computes the layer), `precision` (it is computed in another one), `weight` (it is held
in another type), `inputs` (they are not rounded to int8), `attention` (not one kernel).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fluxc.targets.findings import Finding
from fluxrt.backends.openvino_device import WORDS, Settled, int8_fault, settings
from fluxrt.backends.openvino_graph import Executed, Product, attentions_of, read_executed
from fluxrt.backends.openvino_weights import GROUP, keep_compressed, products_of
from fluxrt.backends.openvino_weights import replace as replace_weight

HELD = {
    "nvfp4": "f4e2m1",
    "nvfp4-w4a16": "f4e2m1",
    "mxfp4": "f4e2m1",
    "fp8": "f8e4m3",
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
}
"""How OpenVINO names what a weight is stored in: by format where it is quantized, by dtype of the file elsewhere."""

HALF = 0.5
"""A scale that, unlike 1, OpenVINO does not take out of a graph."""


@dataclass(frozen=True)
class Layer:
    """A Linear of a graph: what its weight is stored in (a key of HELD), in_features, and the names its product may have."""

    stored: str
    columns: int
    names: tuple[str, ...]

    @property
    def quantized(self) -> bool:
        """Whether the weight is quantized."""
        return self.stored.islower()


@dataclass(frozen=True)
class Expected:
    """What a graph must be: its Linears by name, and the attention nodes in order."""

    layers: Mapping[str, Layer]
    attentions: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What was found in a graph: products by the type their weight is held in, the precision they are computed in, fused
    attentions, and in `faults` everything that is not as it must be, naming the layer."""

    products: dict[str, int]
    computed_in: str
    attentions: int
    faults: tuple[Finding, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def expected_of(lowered: onnx.ModelProto, formats: Mapping[str, str], stored: Mapping[str, str]) -> Expected:
    """What a lowered graph must be executed as; `formats` are those planned by layer, `stored` the dtypes of all tensors."""
    layers = {}
    added = {source: node.output[0] for node in lowered.graph.node if node.op_type == "Add" for source in node.input}
    shapes = {tensor.name: list(tensor.dims) for tensor in lowered.graph.initializer}
    for node in lowered.graph.node:
        weight = f"{node.name}.weight"
        if node.op_type == "MatMul" and weight in stored:
            planned = formats.get(node.name, "bf16")
            kept = planned if planned != "bf16" else stored[weight]
            output = node.output[0]
            # A product that is a result of the graph is called like it, one with a bias like the sum.
            layers[node.name] = Layer(kept, shapes[weight][1], (node.name, output, added.get(output, output)))
    attentions = tuple(node.output[0] for node in lowered.graph.node if node.op_type == "Attention")
    return Expected(layers, attentions)


def audit_graph(core: Any, file: Path, expected: Expected, settled: Settled) -> Audit:
    """Compile the graph at `file` as fluxrt does on the CPU, read it back, and compare. RuntimeError where it does not load.

    Weights that would be unfolded or rounded are left out, so that memory does not follow the model: int8 values are zeros
    that are never written, and E4M3 is unfolded for one layer of each shape.
    """
    model = core.read_model(str(file))
    settled = settled.for_graph(model)
    read = attentions_of(model)
    keep_compressed(model)
    known, _ = settings(core, settled, "latency", None)
    become_int8 = int8_layers(expected) if settled.int8 else []
    unfolded = [name for name, layer in expected.layers.items() if layer.stored == "fp8" and name not in become_int8]
    apart = list(_unfolded(core, model, unfolded, known))
    hollow = [*_hollowed(model, become_int8, "i8"), *_hollowed(model, unfolded, "bf16")]
    executed = read_executed(core.compile_model(model, settled.device, known))
    del hollow
    found = compare(executed, expected, read, settled)
    unrounded = _unrounded(core, expected, settled) if settled.int8 else ()
    return replace(found, faults=(*found.faults, *apart, *unrounded))


def _hollowed(model: Any, layers: list[str], kept: str) -> list[Any]:
    """Let the weights of `layers` be zeros of type `kept`; the arrays must outlive the compiled graph."""
    from openvino import Tensor, Type, op
    from openvino import opset13 as ops

    arrays = []
    for _, product, (rows, columns) in products_of(model, layers):
        arrays.append(np.zeros((rows, columns), np.int8 if kept == "i8" else np.uint16))
        if kept == "i8":
            weight = ops.convert(op.Constant(Tensor(arrays[-1], shared_memory=True)), Type.f32)
            weight = ops.multiply(weight, ops.constant(np.full((rows, 1), HALF, np.float32)))
        else:
            weight = ops.convert(op.Constant(Tensor(arrays[-1], [rows, columns], Type.bf16)), Type.f32)
        replace_weight(product, weight)
    keep_compressed(model)
    return arrays


def _unfolded(core: Any, model: Any, layers: list[str], known: dict[str, Any]) -> Iterable[Finding]:
    """Layers of E4M3 weights whose product alone, one for each shape, does not take them as they are stored."""
    from openvino import Model, Type
    from openvino import opset13 as ops

    seen: set[tuple[int, int]] = set()
    for layer, product, shape in products_of(model, layers):
        if shape in seen:
            continue
        seen.add(shape)
        x = ops.parameter([-1, -1, shape[1]], Type.f32)
        alone = Model([ops.result(ops.matmul(x, product.input_value(1), False, False))], [x], layer)
        (found,) = read_executed(core.compile_model(alone, "CPU", known)).products
        if HELD["fp8"] not in (found.weight, found.unfolded):
            yield Finding("weight", (layer,), f"its weight is stored as fp8 and held as {_held(found)}")


def int8_layers(expected: Expected) -> list[str]:
    """The layers that become int8: those whose weight is quantized and wide enough for a group of inputs."""
    return [name for name, layer in expected.layers.items() if layer.quantized and layer.columns >= GROUP]


def compare(executed: Executed, expected: Expected, attentions: list[str], settled: Settled) -> Audit:
    """What is executed against what is expected; `attentions` are OpenVINO's names of them, in order."""
    wanted, become_int8 = WORDS[settled.precision], set(int8_layers(expected)) if settled.int8 else set()
    faults: list[Finding] = []
    products: Counter[str] = Counter()
    seen: set[int] = set()
    for name, layer in expected.layers.items():
        product = executed.product(layer.names)
        if product is None:
            faults.append(Finding("missing", (name,), "no product computes it"))
            continue
        seen.add(id(product))
        is_unfolded = layer.stored == "fp8" and name not in become_int8
        products[f"{HELD['fp8']} unfolded to {wanted}" if is_unfolded else _held(product)] += 1
        if product.computed_in != wanted:
            faults.append(Finding("precision", (name,), f"computed in {product.computed_in}, not in {wanted}"))
        kept = "i8" if name in become_int8 else "bf16" if is_unfolded else HELD[layer.stored]
        if product.weight != kept or product.unfolded:
            text = f"its weight is stored as {layer.stored} and held as {_held(product)}, not as {kept}"
            faults.append(Finding("weight", (name,), text))
    others = [product for product in executed.products if id(product) not in seen and product.computed_in != wanted]
    faults += [Finding("precision", p.names[:1], f"computed in {p.computed_in}, not in {wanted}") for p in others]
    fused, apart = _attentions(executed, expected, attentions)
    return Audit(dict(sorted(products.items())), wanted, fused, (*faults, *apart))


def _attentions(executed: Executed, expected: Expected, read: list[str]) -> tuple[int, list[Finding]]:
    """How many are fused, and those that are not."""
    if len(read) != len(expected.attentions):
        text = f"OpenVINO reads {len(read)} of {len(expected.attentions)} attention nodes as ScaledDotProductAttention"
        return 0, [Finding("attention", expected.attentions, text)]
    names = zip(expected.attentions, read, strict=True)
    apart = [name for name, known in names if not (executed.is_fused(known) or executed.is_fused(name))]
    found = [Finding("attention", (name,), "attention is not one kernel") for name in apart]
    return len(read) - len(apart), found


def _unrounded(core: Any, expected: Expected, settled: Settled) -> Iterable[Finding]:
    """Layers whose inputs int8 does not round, by a product of their width."""
    names = int8_layers(expected)
    for columns in sorted({expected.layers[name].columns for name in names}):
        fault = int8_fault(core, "CPU", columns, settled.precision)
        if fault:
            layers = tuple(name for name in names if expected.layers[name].columns == columns)
            yield Finding("inputs", layers, fault)


def _held(product: Product) -> str:
    """The type a product's weight is held in, in words."""
    if product.weight is None:
        return "computed"
    return product.weight if product.unfolded is None else f"{product.unfolded} unfolded to {product.weight}"
