"""Names in ONNX graphs: values under others, nodes rewired, graphs put into graphs."""

from __future__ import annotations

from collections.abc import Callable

import onnx


def renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """A copy of `value` under another name."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def rewired(node: onnx.NodeProto, rename: Callable[[str], str]) -> onnx.NodeProto:
    """A copy of `node` with its inputs and outputs under the names that `rename` gives; an input left out stays so."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [rename(name) if name else "" for name in node.input]
    copy.output[:] = [rename(name) if name else "" for name in node.output]
    return copy


def inline(graph: onnx.GraphProto, source: onnx.GraphProto, names: dict[str, str], scope: str) -> None:
    """Add the constants and nodes of `source` to `graph`.

    `names` says what its values are called there; every other value, and every node that has a name, gets `scope` before it.
    """

    def rename(name: str) -> str:
        return names.setdefault(name, scope + name)

    for initializer in source.initializer:
        constant = graph.initializer.add()
        constant.CopyFrom(initializer)
        constant.name = rename(initializer.name)
    for node in source.node:
        copy = rewired(node, rename)
        if node.name:
            copy.name = scope + node.name
        graph.node.append(copy)
