"""Damage, from a random number generator: of bytes, of text, of JSON-like values, and of ONNX graphs."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

PATHS = (
    "../../outside/secret.json",
    "../../../outside/secret.onnx",
    "/etc/passwd",
    "..",
    "/",
    ".",
    "a\\b",
    "//x",
    "./vae",
)
STRINGS = ("", " ", "\0", "\ud800", "\ufeff", "é猫", "x" * 300, "%s{0}", "[/]?", "[bold]", "nan", "-1", *PATHS)
NUMBERS: tuple[Any, ...] = (-1, 0, 1, 2, 3, 7, 255, 65537, 2**31, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e-45, 1e308)
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": None}, float("nan"), float("inf"), [0] * 9, [None])
LINES = (
    "\ufeff",
    "# note",
    "  # indented",
    "\t",
    "a: &x {b: *x}",
    "<<: {name: x}",
    "!!python/object/apply:os.getcwd []",
    "? [a, b]\n: c",
    "{{ 7 * 7 }}",
    "---",
    "...",
    "\x85",
    "\u2028",
    "\0",
    "a" * 5000,
    "- " * 400,
    "[" * 3000,
)
TOKENS = (
    "~",
    "1:30",
    "0x10",
    "0o7",
    "1_000",
    ".inf",
    ".nan",
    "-1",
    "1e400",
    "yes",
    "null",
    "''",
    "[]",
    "{}",
    "2026-11-26",
)
DEEP = 200


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, overwritten, put in, taken out, or the end missing."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 512) + 1)
        size = rng.choice((1, 1, 2, 8, 64))
        how = rng.randrange(6)
        if how == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            out[at : at + size] = rng.randbytes(size)
        elif how == 2:
            out[at:at] = rng.randbytes(size)
        elif how == 3:
            del out[at : at + size]
        elif how == 4:
            del out[at:]
        else:
            out[at : at + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(out))).to_bytes(8, "little")
    return bytes(out)


def of_text(data: bytes, rng: random.Random) -> bytes:
    """Lines taken out, doubled, swapped or put in, words replaced; now and then bytes that are no UTF-8."""
    if rng.random() < 0.15:
        return of_bytes(data, rng)
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines) + 1)
        how = rng.randrange(6)
        if how == 0:
            lines[at : at + 1] = []
        elif how == 1:
            lines[at:at] = lines[at : at + 1]
        elif how == 2:
            lines[at:at] = [rng.choice(LINES)]
        elif how == 3 and at < len(lines):
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice((*TOKENS, *(s for s in STRINGS if s != "\ud800")))
            lines[at] = " ".join(words)
        elif how == 4 and at < len(lines):
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(LINES) + lines[at][cut:]
        else:
            lines[at:at] = [" " * rng.randrange(5) + rng.choice(TOKENS)]
    return "\n".join(lines or [""]).encode("utf-8", "surrogateescape")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside a JSON-like one."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def of_value(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A JSON-like value with one to three of its parts changed, and where."""
    value, said = copy.deepcopy(value), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = places(value)
        if not known:
            break
        # Short paths first now and then: a manifest has thousands of layers and few fields.
        depth = rng.choice((1, 2, 3, 4, 9))
        path = rng.choice([place for place in known if len(place) <= depth])
        said.append(f"{'.'.join(map(str, path))} {_change(value, path, rng)}")
    return value, "; ".join(said)


def _change(value: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    *parents, last = path
    holder = value
    for key in parents:
        holder = holder[key]
    old, how = holder[last], rng.randrange(7)
    if how == 0:
        del holder[last]
        return "removed"
    if how == 1 and isinstance(holder, dict):
        holder[rng.choice((*STRINGS, f"{last}x"))] = holder.pop(last)
        return "renamed"
    if how == 2 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(old))
        return "doubled"
    if how == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[last] = rng.choice((old + 1, old - 1, -old, old * 2, old / 2, str(old), 2**40, old * 1000))
    elif how == 4:
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], old
        return f"swapped with {other}"
    elif how == 5:
        deep: Any = old
        for _ in range(rng.choice((1, 2, DEEP))):
            deep = [deep]
        holder[last] = deep
        return "nested"
    else:
        holder[last] = rng.choice((*STRINGS, *NUMBERS, *VALUES))
    return f"= {str(holder[last])[:40]!r}"


def of_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A JSON file with parts changed, or with its bytes damaged, and what was done."""
    if rng.random() < 0.15:
        return of_bytes(data, rng), "bytes"
    value, said = of_value(json.loads(data), rng)
    return json.dumps(value).encode(), said


def of_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with another header, or damaged bytes, and what was done."""
    length = int.from_bytes(data[:8], "little")
    how = rng.random()
    if how < 0.2:
        return of_bytes(data[: 8 + length], rng) + data[8 + length :], "bytes of the header"
    if how < 0.25:
        return data[: rng.randrange(len(data))], "truncated"
    if how < 0.3:
        return data + rng.randbytes(rng.choice((1, 8, 4096))), "padded"
    if how < 0.35:
        header: Any = rng.choice(([], None, "x", 1, {}, {"__metadata__": 1}))
        said = repr(header)
    else:
        header, said = of_value(json.loads(data[8 : 8 + length]), rng)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :], said


def of_graph(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """An ONNX file with a part changed, or with its bytes damaged, and what was done."""
    import onnx

    if rng.random() < 0.35:
        return of_bytes(data, rng), "bytes"
    model = onnx.load_model_from_string(data)
    graph, how = model.graph, rng.randrange(9)
    if how == 0 and graph.node:
        node = rng.choice(graph.node)
        node.op_type = rng.choice(("Identity", "MatMul", "Nothing", "", "Reshape", "Gather", "Loop", "If", "Where"))
        said = f"{node.name}: op_type {node.op_type}"
    elif how == 1 and graph.node:
        at = rng.randrange(len(graph.node))
        del graph.node[at]
        said = f"node {at} removed"
    elif how == 2 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, -1, 1, 2**31, 2**62, 7))
        else:
            tensor.dims.append(rng.choice((0, 3, 2**40)))
        said = f"{tensor.name}: dims {list(tensor.dims)}"
    elif how == 3:
        outside = [t for t in graph.initializer if t.external_data]
        if not outside:
            return of_bytes(data, rng), "bytes"
        tensor = rng.choice(outside)
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice((*PATHS, "-1", "0", str(2**63), "x", "", "../../../outside/secret.safetensors", "1"))
        said = f"{tensor.name}: {entry.key} {entry.value!r}"
    elif how == 4:
        port = rng.choice([*graph.input, *graph.output])
        if rng.random() < 0.5:
            port.name = rng.choice(("", "x", "latents", "text"))
        else:
            port.type.tensor_type.elem_type = rng.choice((0, 1, 7, 9, 10, 16, 999))
        said = f"port {port.name}: {port.type.tensor_type.elem_type}"
    elif how == 5 and graph.node:
        node = rng.choice(graph.node)
        if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(("", "nothing", node.output[0]))
        said = f"{node.name}: inputs {list(node.input)}"
    elif how == 6 and graph.node:
        node = rng.choice(graph.node)
        attribute = node.attribute.add()
        attribute.name, attribute.type, attribute.i = rng.choice(("axis", "to", "perm", "alpha")), 2, 2**40
        said = f"{node.name}: attribute {attribute.name}"
    elif how == 7:
        model.opset_import[0].version = rng.choice((0, -1, 1, 99, 2**40))
        said = f"opset {model.opset_import[0].version}"
    else:
        model.ir_version = rng.choice((0, 1, 99, 2**40))
        said = f"ir_version {model.ir_version}"
    return model.SerializeToString(), said
