"""Reads back what OpenVINO executes: how each layer is multiplied, how its weight lies in memory, and what attention became."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

PRODUCTS = ("FullyConnected", "MatMul", "Gemm")
ATTENTION = "ScaledDotProductAttention"
PLAIN = {"f32": "fp32", "f16": "fp16"}


@dataclass(frozen=True)
class Product:
    """A matrix product that is executed: the nodes of the graph that went into it, the type it is computed in, and that of its
    weight in memory ("fp32", "bf16", "i8", "f4e2m1"); None where both factors are computed. With `unfolded`, the weight is
    stored in that type and held in the type of the product."""

    names: tuple[str, ...]
    computed_in: str
    weight: str | None
    unfolded: str | None = None


@dataclass(frozen=True)
class Executed:
    """The products of a compiled graph, and the nodes that went into each fused attention."""

    products: tuple[Product, ...]
    attentions: tuple[tuple[str, ...], ...]

    def product(self, names: Iterable[str]) -> Product | None:
        """The product that the first of these nodes went into, or else the second, and so on."""
        return next((product for name in names for product in self.products if name in product.names), None)

    def is_fused(self, attention: str) -> bool:
        """Whether the attention node of this name is one kernel, softmax and both products."""
        return any(attention in names for names in self.attentions)


def read_executed(compiled: Any) -> Executed:
    """What the plugin made of a graph: `compiled` is an openvino.CompiledModel."""
    products, attentions = [], []
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind = _said(node, "layerType")
        names = tuple(
            name for name in (node.get_friendly_name(), *_said(node, "originalLayersNames").split(",")) if name
        )
        if kind in PRODUCTS and node.get_input_size() > 1:
            weight, unfolded = _weight(node.input_value(1).get_node())
            # A kernel's name ends with the type it computes in: brgemm_avx512_bf16.
            computed = _said(node, "primitiveType").rpartition("_")[2] or _said(node, "runtimePrecision")
            products.append(Product(names, _plain(computed), weight, unfolded))
        elif kind == ATTENTION or (kind == "Subgraph" and any(name.startswith("Softmax") for name in names)):
            attentions.append(names)
    return Executed(tuple(products), tuple(attentions))


def attentions_of(model: Any) -> list[str]:
    """The attention nodes of an openvino.Model before it is compiled, in order."""
    return [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == ATTENTION]


def multiplies_angles(model: Any) -> bool:
    """Whether products of an openvino.Model take sines or cosines of what it is given, such as the embedding of a step's time:
    its angles reach 1000, which 8 or 11 bits round to nothing like them."""
    behind: set[str] = set()
    for node in model.get_ordered_ops():
        sources = {node.input_value(at).get_node().get_friendly_name() for at in range(node.get_input_size())}
        kind, name = node.get_type_name(), node.get_friendly_name()
        if kind == "MatMul" and sources & behind:
            return True
        if kind in ("Sin", "Cos") or sources & behind:
            behind.add(name)
    return False


def _weight(node: Any) -> tuple[str | None, str | None]:
    """The type in which a factor lies in memory, and what it is unfolded from; two times None where it is computed."""
    held = _plain(_said(node, "runtimePrecision"))
    if _said(node, "layerType") == "Const":
        return held, None
    sources = [node.input_value(at).get_node() for at in range(node.get_input_size())]
    if _said(node, "layerType") == "Input" or not sources:
        return None, None
    stored = [_plain(_said(source, "runtimePrecision")) for source in sources if _said(source, "layerType") == "Const"]
    if len(stored) == len(sources):
        return _plain(_said(node, "outputPrecisions")) or held, stored[0]
    weight, unfolded = _weight(sources[0])
    others = [_weight(source)[0] for source in sources[1:]]
    if weight is None or None in others:
        return None, None
    return _plain(_said(node, "outputPrecisions")) or weight, unfolded or weight


def _said(node: Any, key: str) -> str:
    """What the plugin says about a node; empty where it says nothing."""
    found = node.get_rt_info()
    return str(found[key].astype(str)) if key in found else ""


def _plain(name: str) -> str:
    """The type as fluxc names it."""
    return PLAIN.get(name, name)
