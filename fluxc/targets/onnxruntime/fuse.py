"""Operators of ONNX Runtime on a CPU that do in one pass what a traced graph does in several; found by profile.

1. Rotary embedding of neighbouring pairs, traced as slices, a concatenation, products and a sum: RotaryEmbedding.
2. LayerNormalization without weights, then a factor and a shift from the modulation: its own scale and bias.
3. Attention between transpositions of heads: MultiHeadAttention, which needs none, and holds no matrix of all scores.
4. A Linear whose output is cut apart (queries, keys, values, the two halves of an MLP): where forms can compute a part of a
   weight's rows, the parts are Linears of their own (`parts_of`), and nothing is copied.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fluxc.graph import LINEAR_DOMAIN


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with 1 to 3, wherever they occur; the same values but for rounding."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = _Graph(copy.graph)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "Add":
            found = _rotary(graph, node) or _modulated(graph, node)
        else:
            found = _attention(graph, node) if node.op_type == "Transpose" else None
        if found:
            replaced[node.output[0]] = found
    if not replaced:
        return model
    nodes = [new for node in model.graph.node for new in replaced.get(node.output[0], [node])]
    del copy.graph.node[:]
    copy.graph.node.extend(_needed(nodes, {value.name for value in copy.graph.output}))
    return copy


class Part(NamedTuple):
    """Rows first:last of a weight, whose product is the value `output`."""

    first: int
    last: int
    output: str


class Cut(NamedTuple):
    """The parts of a Linear, and the outputs of the nodes that cut it."""

    parts: list[Part]
    cutting: set[str]


def parts_of(model: onnx.ModelProto) -> dict[str, Cut]:
    """Every Linear that is only cut apart along its features, by its output."""
    graph = _Graph(model.graph)
    outputs = {value.name for value in model.graph.output}
    found: dict[str, Cut] = {}
    weights = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    for node in model.graph.node:
        if node.domain != LINEAR_DOMAIN or node.op_type != "Linear":
            continue
        rows = weights[node.input[1]][0].dim_value
        parts, cuts = _cut(graph, node.output[0], 0, rows, outputs)
        if cuts and sum(part.last - part.first for part in parts) == rows:
            found[node.output[0]] = Cut(parts, cuts)
    return found


def _cut(graph: _Graph, value: str, first: int, last: int, outputs: set[str]) -> tuple[list[Part], set[str]]:
    whole = [Part(first, last, value)]
    users = graph.users.get(value, [])
    bounds = [_bounds(graph, user, value, last - first) for user in users]
    if value in outputs or not users or any(bound is None for bound in bounds):
        return whole, set()
    parts: list[Part] = []
    cuts: set[str] = set()
    for user, cut in zip(users, bounds, strict=True):
        assert cut is not None
        cuts.update(user.output)
        for output, begin, end in cut:
            below, further = _cut(graph, output, first + begin, first + end, outputs)
            parts += below
            cuts |= further
    # Overlapping parts would be computed twice.
    ordered = sorted(parts)
    if any(before.last > after.first for before, after in itertools.pairwise(ordered)):
        return whole, set()
    return parts, cuts


def _bounds(graph: _Graph, node: onnx.NodeProto, value: str, width: int) -> list[tuple[str, int, int]] | None:
    """What a Split or a Slice along the last axis gives: (output, first, last); None for any other node."""
    if node.input[0] != value:
        return None
    if node.op_type == "Split":
        axis = graph.attribute(node, "axis", 0)
        sizes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
        lengths = [int(n) for n in sizes] if sizes is not None else [width // len(node.output)] * len(node.output)
        if axis not in (-1, 2) or sum(lengths) != width or (len(node.input) > 1 and sizes is None):
            return None
        ends = np.cumsum(lengths)
        return [(name, int(end - n), int(end)) for name, n, end in zip(node.output, lengths, ends, strict=True)]
    if node.op_type == "Slice" and len(node.input) >= 4:
        given = [graph.constants.get(name) for name in node.input[1:]]
        if any(values is None or values.size != 1 for values in given):
            return None
        start, end, axis, *step = (int(values.reshape(-1)[0]) for values in given if values is not None)
        if axis not in (-1, 2) or step not in ([], [1]) or start < 0 or end < 0:
            return None
        return [(node.output[0], start, min(end, width))]
    return None


class _Graph:
    """Who makes and who uses each value of `graph`, and its constants."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.made = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)
        self.constants: dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self._own: Counter[str] = Counter()

    def maker(self, value: str, op: str) -> onnx.NodeProto | None:
        """The node that makes `value`, if it is an `op`."""
        node = self.made.get(value)
        return node if node is not None and node.op_type == op else None

    def through(self, value: str, *ops: str) -> str:
        """What `value` was before any nodes of `ops`."""
        while (node := self.made.get(value)) is not None and node.op_type in ops:
            value = node.input[0]
        return value

    def attribute(self, node: onnx.NodeProto, name: str, default: Any) -> Any:
        """An attribute's value."""
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def heads(self, value: str) -> int | None:
        """H of a value [B, T, H, D] that is known by the shape it was given; None for others."""
        node = self.made.get(value)
        while node is not None and node.op_type in ("Concat", "Add", "Mul", "RMSNormalization"):
            if node.op_type == "Concat" and self.attribute(node, "axis", 0) != 1:
                return None
            value = node.input[0]
            node = self.made.get(value)
        if node is None or node.op_type != "Reshape":
            return None
        shape = self.made.get(node.input[1])
        if shape is not None and shape.op_type == "Concat" and len(shape.input) == 4:
            number = self.constants.get(shape.input[2])
            return None if number is None else int(number.reshape(-1)[0])
        given = self.constants.get(node.input[1])
        return int(given[2]) if given is not None and given.size == 4 and given[2] > 0 else None

    def constant(self, name: str, values: Iterable[int]) -> str:
        """An int64 vector of the graph."""
        if name not in self.constants:
            array = np.array(list(values), np.int64)
            self.graph.initializer.append(numpy_helper.from_array(array, name))
            self.constants[name] = array
        return name

    def once(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """`node`, the first time one with its output is asked for."""
        self._own[node.output[0]] += 1
        return [node] if self._own[node.output[0]] == 1 else []


def _rotary(graph: _Graph, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """x * cos + turned(x) * sin, x [B, T, H, D], as nodes that end in the output of `node`; None if it is something else."""
    products = [graph.maker(name, "Mul") for name in node.input]
    if len(products) != 2 or None in products:
        return None
    (x, cos), (turned, sin) = ((product.input[0], product.input[1]) for product in products if product is not None)
    tables = [graph.through(name, "Unsqueeze") for name in (cos, sin)]
    pairs = graph.maker(turned, "Reshape")
    if tables != ["rope_cos", "rope_sin"] or pairs is None:
        return None
    joined = graph.maker(pairs.input[0], "Concat")
    if joined is None or len(joined.input) != 2:
        return None
    odd, even = (graph.through(name, "Unsqueeze") for name in joined.input)
    minus = graph.maker(odd, "Neg")
    picked = [graph.maker(graph.through(name, "Squeeze"), "Slice") for name in (minus.input[0] if minus else "", even)]
    starts = [None if cut is None else graph.constants.get(cut.input[1]) for cut in picked]
    if [None if start is None else start.tolist() for start in starts] != [[1], [0]]:
        return None
    sources = [cut.input[0] for cut in picked if cut is not None]
    split = graph.maker(sources[0], "Reshape")
    shape = graph.maker(split.input[1], "Concat") if split is not None else None
    if split is None or sources[0] != sources[1] or split.input[0] != x or shape is None or len(shape.input) != 5:
        return None
    heads = graph.constants.get(shape.input[2])
    if heads is None:
        return None
    return _rotary_nodes(graph, x, int(heads.reshape(-1)[0]), node.output[0])


def _rotary_nodes(graph: _Graph, x: str, heads: int, output: str) -> list[onnx.NodeProto]:
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.extend(graph.once(helper.make_node(op, inputs, [name], **attributes)))
        return name

    zero, one = graph.constant("fused/zero", [0]), graph.constant("fused/one", [1])
    two, end = graph.constant("fused/two", [2]), graph.constant("fused/end", [2**62])
    merged, apart = graph.constant("fused/merged", [0, 0, -1]), graph.constant(f"fused/{heads}", [0, 0, heads, -1])
    batch = add("Shape", [x], "fused/batch", start=0, end=1)
    halves = []
    for table in ("rope_cos", "rope_sin"):
        # Both of a pair are turned by one angle.
        half = add("Slice", [table, zero, end, one, two], f"fused/{table}/half")
        single = add("Unsqueeze", [half, zero], f"fused/{table}/single")
        size = add("Shape", [half], f"fused/{table}/size")
        shape = add("Concat", [batch, size], f"fused/{table}/shape", axis=0)
        halves.append(add("Expand", [single, shape], f"fused/{table}"))
    flat = add("Reshape", [x, merged], f"{output}/flat")
    turned = add("RotaryEmbedding", [flat, *halves], f"{output}/turned", num_heads=heads, interleaved=1)
    add("Reshape", [turned, apart], output)
    return nodes


HEADS_LAST = [0, 2, 1, 3]
"""[B, T, H, D] to [B, H, T, D], and back."""


def _attention(graph: _Graph, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """Attention on transposed queries, keys and values [B, T, H, D], and its result transposed back by `node`; None if it is
    something else."""
    attention = graph.maker(node.input[0], "Attention")
    if attention is None or len(attention.input) != 3 or len(attention.output) != 1 or not _is_turned(graph, node):
        return None
    turned = [graph.maker(name, "Transpose") for name in attention.input]
    sources = [maker.input[0] for maker in turned if maker is not None and _is_turned(graph, maker)]
    heads = {number for source in sources if (number := graph.heads(source)) is not None}
    is_plain = not graph.attribute(attention, "is_causal", 0) and not graph.attribute(attention, "softcap", 0.0)
    if len(sources) != 3 or len(heads) != 1 or len(graph.users[node.input[0]]) != 1 or not is_plain:
        return None
    (number,) = heads
    scale = graph.attribute(attention, "scale", None)
    output, merged = node.output[0], graph.constant("fused/merged", [0, 0, -1])
    flat = [f"{output}/{part}" for part in ("queries", "keys", "values")]
    nodes = [helper.make_node("Reshape", [source, merged], [name]) for source, name in zip(sources, flat, strict=True)]
    how = {"num_heads": number} | ({} if scale is None else {"scale": scale})
    nodes.append(helper.make_node("MultiHeadAttention", flat, [f"{output}/flat"], domain="com.microsoft", **how))
    apart = graph.constant(f"fused/{number}", [0, 0, number, -1])
    return [*nodes, helper.make_node("Reshape", [f"{output}/flat", apart], [output])]


def _is_turned(graph: _Graph, node: onnx.NodeProto) -> bool:
    return list(graph.attribute(node, "perm", [])) == HEADS_LAST


def _modulated(graph: _Graph, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """layer_norm(x) * (1 + scale) + shift, scale and shift [1, 1, D], as one LayerNormalization; None if it is something
    else."""
    for product_name, shift in (node.input, node.input[::-1]):
        product = graph.maker(product_name, "Mul")
        if product is None:
            continue
        for normed, factor in (product.input, product.input[::-1]):
            norm, plus_one = graph.maker(normed, "LayerNormalization"), graph.maker(factor, "Add")
            if norm is None or plus_one is None or not _is_plain(graph, norm) or not _has_one(graph, plus_one):
                continue
            if len(graph.users[normed]) != 1 or len(graph.users[product_name]) != 1:
                continue
            flat = graph.constant("fused/flat", [-1])
            scale, bias = f"{node.output[0]}/norm_scale", f"{node.output[0]}/norm_bias"
            made = helper.make_node("LayerNormalization", [norm.input[0], scale, bias], [node.output[0]])
            made.attribute.extend(norm.attribute)
            return [
                *graph.once(helper.make_node("Reshape", [factor, flat], [scale])),
                *graph.once(helper.make_node("Reshape", [shift, flat], [bias])),
                made,
            ]
    return None


def _is_plain(graph: _Graph, norm: onnx.NodeProto) -> bool:
    """Whether a LayerNormalization only normalizes."""
    scale = graph.constants.get(norm.input[1])
    return len(norm.input) == 2 and scale is not None and bool((scale == 1).all())


def _has_one(graph: _Graph, node: onnx.NodeProto) -> bool:
    constants = [graph.constants.get(name) for name in node.input]
    return any(
        value is not None and value.size == 1 and math.isclose(float(value.reshape(-1)[0]), 1) for value in constants
    )


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Those of `nodes` that lead to `outputs`, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
