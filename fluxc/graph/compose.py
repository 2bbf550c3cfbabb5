"""Composes whole graphs from traced pieces: each kind of block is traced once and repeated with other weight names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError
from fluxc.graph.export import make_model
from fluxc.graph.values import inline, renamed

EMBEDDING = "embed_tokens.weight"
ENCODED = "encoded"
"""What the embeddings of one image's prompts are called; those that a step reads, of all images, are its `text`."""


class Composition:
    """A graph that grows by inlining neutral graphs and adding nodes; every weight stays a named input."""

    def __init__(self) -> None:
        self._graph = onnx.GraphProto(name="fluxc")
        self._seen: set[str] = set()

    def arguments(self, values: Iterable[onnx.ValueInfoProto]) -> None:
        """Declare graph inputs."""
        for value in values:
            if value.name not in self._seen:
                self._graph.input.append(value)
                self._seen.add(value.name)

    def inline(
        self, piece: onnx.ModelProto, arguments: dict[str, str], prefix: str = "", outputs: list[str] | None = None
    ) -> list[str]:
        """Add `piece` with its inputs wired to `arguments`; its other inputs are weights and get `prefix` before their name.

        Returns the names its outputs got, in order: `outputs`, or names of their own.
        """
        graph = piece.graph
        names = dict(arguments)
        if outputs is not None:
            names |= {value.name: name for value, name in zip(graph.output, outputs, strict=True)}
        for value in graph.input:
            if value.name not in arguments:
                names[value.name] = prefix + value.name
                self.arguments([renamed(value, prefix + value.name)])
        inline(self._graph, graph, names, f"{prefix}/")
        return [names[value.name] for value in graph.output]

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add one standard ONNX node and return its output's name."""
        self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: list[int]) -> str:
        """Add an int64 vector and return its name."""
        self._graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def finish(self, outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The composed model with these outputs."""
        self._graph.output.extend(outputs)
        return make_model(self._graph)


def compose_body(
    pieces: dict[str, onnx.ModelProto], double_blocks: int, single_blocks: int, text_length: int
) -> onnx.ModelProto:
    """hidden, text_hidden, modulation_*, rope -> residual fp32 [B, S, D]: all blocks, and what they added to `hidden`."""
    body = Composition()
    prologue = {value.name: value for value in pieces["prologue"].graph.output}
    names = ["hidden", "text_hidden", "modulation_img", "modulation_txt", "modulation_single", "rope_cos", "rope_sin"]
    body.arguments(prologue[name] for name in names)
    hidden, text_hidden = "hidden", "text_hidden"
    shared = {name: name for name in ("modulation_img", "modulation_txt", "rope_cos", "rope_sin")}
    for number in range(double_blocks):
        hidden, text_hidden = body.inline(
            pieces["double_block"],
            {"hidden": hidden, "text_hidden": text_hidden, **shared},
            f"transformer_blocks.{number}.",
        )
    joined = body.node("Concat", [text_hidden, hidden], "joined", axis=1)
    shared = {name: name for name in ("modulation_single", "rope_cos", "rope_sin")}
    for number in range(single_blocks):
        (joined,) = body.inline(
            pieces["single_block"], {"joined": joined, **shared}, f"single_transformer_blocks.{number}."
        )
    start = body.constant("text_end", [text_length])
    end, axis = body.constant("all_end", [2**62]), body.constant("token_axis", [1])
    image, before = body.node("Slice", [joined, start, end, axis], "hidden_out"), "hidden"
    residual = renamed(prologue["hidden"], "residual")
    if residual.type.tensor_type.elem_type != TensorProto.FLOAT:
        image = body.node("Cast", [image], "hidden_out/fp32", to=TensorProto.FLOAT)
        before = body.node("Cast", ["hidden"], "hidden/fp32", to=TensorProto.FLOAT)
        residual.type.tensor_type.elem_type = TensorProto.FLOAT
    body.node("Sub", [image, before], "residual")
    return body.finish([residual])


def compose_text_encoder(
    pieces: dict[str, onnx.ModelProto], text_layers: tuple[int, ...], left_padded: int | None = None
) -> onnx.ModelProto:
    """input_ids, attention_mask -> encoded [B, L, len(text_layers) * D]: hidden states after the given layers, side by side.

    With `left_padded`, the length L, the pieces take any number of tokens. Only those from the last row of padding on are
    computed: the rows before it are equal to it, and nothing reads them.
    """
    encoder = Composition()
    stem, layer = pieces["text_stem"], pieces["text_layer"]
    words = [value for value in stem.graph.input if value.name in ("input_ids", "attention_mask")]
    if left_padded is not None:
        words = [_with_length(value, left_padded) for value in words]
    encoder.arguments(words)
    wired = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if left_padded is not None:
        wired = _without_padding(encoder, left_padded)
    hidden, *shared = encoder.inline(stem, wired)
    # `seen` is there where prompts are padded on the left.
    constant = dict(zip(("attends", "cos", "sin", "seen"), shared, strict=False))
    taken = []
    for number in range(text_layers[-1]):
        (hidden,) = encoder.inline(layer, {"hidden": hidden, **constant}, layer_prefix(stem, number))
        if number + 1 in text_layers:
            taken.append(hidden)
    text = renamed(stem.graph.output[0], ENCODED)
    text.type.tensor_type.shape.dim[2].dim_value *= len(text_layers)
    if left_padded is None:
        encoder.node("Concat", taken, ENCODED, axis=-1)
        return encoder.finish([text])
    encoder.node("Concat", taken, "text_rows", axis=-1)
    _padded_again(encoder, text.type.tensor_type.shape.dim[2].dim_value)
    return encoder.finish([_with_length(text, left_padded)])


def _without_padding(encoder: Composition, length: int) -> dict[str, str]:
    """Cut ids and mask from the last row of padding of the longest prompt on; what they are called then.

    `padding` [1] is the number of rows that are cut off.
    """
    axis, one = encoder.constant("row_axis", [1]), encoder.constant("one_row", [1])
    counted = encoder.node("ReduceSum", ["attention_mask", axis], "prompt_tokens", keepdims=0)
    longest = encoder.node("ReduceMax", [counted], "longest", keepdims=0)
    kept = encoder.node("Add", [longest, one], "kept")
    all_rows = encoder.constant("all_rows", [length])
    padding = encoder.node("Sub", [all_rows, encoder.node("Min", [kept, all_rows], "kept_rows")], "padding")
    return {
        name: encoder.node("Slice", [name, padding, all_rows, axis], f"{name}_kept")
        for name in ("input_ids", "attention_mask")
    }


def _padded_again(encoder: Composition, features: int) -> None:
    """text_rows -> encoded: the first row, one of padding where rows were cut off, stands for each of them."""
    zero, one, axis = encoder.constant("no_row", [0]), encoder.constant("first_row", [1]), "row_axis"
    first = encoder.node("Slice", ["text_rows", zero, one, axis], "padding_row")
    branches = encoder.node("Shape", ["text_rows"], "text_branches", start=0, end=1)
    width = encoder.constant("text_features", [features])
    shape = encoder.node("Concat", [branches, "padding", width], "padding_shape", axis=0)
    rows = encoder.node("Expand", [first, shape], "padding_rows")
    encoder.node("Concat", [rows, "text_rows"], ENCODED, axis=1)


def _with_length(value: onnx.ValueInfoProto, length: int) -> onnx.ValueInfoProto:
    """`value` [B, tokens, ...] with so many tokens."""
    fixed = renamed(value, value.name)
    tokens = fixed.type.tensor_type.shape.dim[1]
    tokens.Clear()
    tokens.dim_value = length
    return fixed


def layer_prefix(stem: onnx.ModelProto, number: int) -> str:
    """What the names of a text encoder's layer begin with: what its embedding's does, and its number."""
    (table,) = (value.name for value in stem.graph.input if value.name.endswith(EMBEDDING))
    return f"{table.removesuffix(EMBEDDING)}layers.{number}."


def compose_steps(pieces: dict[str, onnx.ModelProto], text_length: int) -> dict[str, onnx.ModelProto]:
    """The step cut where an engine is: one graph for each kind of block, all over `joined` [B, text_length + S, D].

    `prologue` also gives `joined`; `double_block` and `single_block` take `joined` to `joined_out`; `residual` subtracts
    what went in from the image tokens, in fp32, so that adding it again gives back what the blocks computed; `epilogue` is as
    traced.
    """
    traced = {value.name: value for value in pieces["prologue"].graph.output}
    joined = renamed(traced["hidden"], "joined")
    tokens = joined.type.tensor_type.shape.dim[1]
    tokens.dim_param = f"{tokens.dim_param} + {text_length}"

    prologue = Composition()
    arguments = {v.name for v in pieces["prologue"].graph.input if "." not in v.name}
    prologue.arguments(v for v in pieces["prologue"].graph.input if v.name in arguments)
    names = prologue.inline(pieces["prologue"], {name: name for name in arguments}, outputs=list(traced))
    prologue.node("Concat", ["text_hidden", "hidden"], "joined", axis=1)
    kept = [traced[name] for name in names if name != "text_hidden"]
    steps = {"prologue": prologue.finish([*kept, joined]), "epilogue": pieces["epilogue"]}

    if "double_block" in pieces:
        double = Composition()
        given = ("modulation_img", "modulation_txt", "rope_cos", "rope_sin")
        double.arguments([joined, *(traced[name] for name in given)])
        parts = _parted(double, "joined", text_length)
        wired = dict(zip(("text_hidden", "hidden"), parts, strict=True))
        hidden, text_hidden = double.inline(pieces["double_block"], wired | {name: name for name in given})
        double.node("Concat", [text_hidden, hidden], "joined_out", axis=1)
        steps["double_block"] = double.finish([renamed(joined, "joined_out")])
    if "single_block" in pieces:
        steps["single_block"] = pieces["single_block"]

    residual = Composition()
    residual.arguments([joined, traced["hidden"]])
    _, image = _parted(residual, "joined", text_length)
    after = residual.node("Cast", [image], "after", to=TensorProto.FLOAT)
    before = residual.node("Cast", ["hidden"], "before", to=TensorProto.FLOAT)
    residual.node("Sub", [after, before], "residual")
    difference = renamed(traced["hidden"], "residual")
    difference.type.tensor_type.elem_type = TensorProto.FLOAT
    steps["residual"] = residual.finish([difference])
    return steps


def compose_text_layer(pieces: dict[str, onnx.ModelProto]) -> onnx.ModelProto:
    """hidden, attends, and `seen` if there is one -> hidden_out: a layer with the rotary tables inside.

    They are constants of a text length.
    """
    tables = {tensor.name: tensor for tensor in pieces["text_stem"].graph.initializer}
    layer = onnx.ModelProto()
    layer.CopyFrom(pieces["text_layer"])
    for name in ("cos", "sin"):
        if f"rotary_{name}" not in tables:
            raise BuildError(
                "the rotary tables of the text encoder are not constants; this transformers is not supported"
            )
        table = layer.graph.initializer.add()
        table.CopyFrom(tables[f"rotary_{name}"])
        table.name = name
        layer.graph.input.remove(next(value for value in layer.graph.input if value.name == name))
    return layer


def one_output_each(model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """`model` as graphs of one output each, by output; a later one takes what earlier ones gave as an argument.

    Outputs that are constants are left out.
    """
    nodes = list(model.graph.node)
    values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    made = {name: at for at, node in enumerate(nodes) for name in node.output}
    outputs = sorted((value.name for value in model.graph.output if value.name in made), key=lambda name: made[name])
    pieces: dict[str, onnx.ModelProto] = {}
    for output in outputs:
        needed, kept = {output}, []
        for node in reversed(nodes):
            if needed.intersection(node.output) and not pieces.keys() & set(node.output):
                needed.update(node.input)
                kept.append(node)
        piece = onnx.GraphProto(name="fluxc")
        given = [value for value in model.graph.input if value.name in needed]
        piece.input.extend([*given, *(values[name] for name in pieces if name in needed)])
        piece.output.append(values[output])
        piece.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
        piece.node.extend(reversed(kept))
        pieces[output] = make_model(piece)
    return pieces


def compose_text_join(pieces: dict[str, onnx.ModelProto], taken: int) -> onnx.ModelProto:
    """taken_0, taken_1, ... [B, L, D] -> encoded [B, L, taken * D]."""
    join = Composition()
    hidden = pieces["text_stem"].graph.output[0]
    values = [renamed(hidden, f"taken_{number}") for number in range(taken)]
    join.arguments(values)
    join.node("Concat", [value.name for value in values], ENCODED, axis=-1)
    text = renamed(hidden, ENCODED)
    text.type.tensor_type.shape.dim[2].dim_value *= taken
    return join.finish([text])


def _parted(composition: Composition, joined: str, text_length: int) -> list[str]:
    """Text tokens and image tokens of `joined`."""
    start, end = composition.constant("text_start", [0]), composition.constant("text_end", [text_length])
    last, axis = composition.constant("all_end", [2**62]), composition.constant("token_axis", [1])
    return [
        composition.node("Slice", [joined, *bounds, axis], name)
        for name, bounds in (("text_part", (start, end)), ("image_part", (end, last)))
    ]
