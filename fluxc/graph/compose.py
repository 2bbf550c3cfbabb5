"""Composes whole graphs from traced pieces: each kind of block is traced once and repeated with other weight names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from onnx import TensorProto, helper

from fluxc.graph.trace import make_model


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

    def inline(self, piece: onnx.ModelProto, arguments: dict[str, str], prefix: str = "") -> list[str]:
        """Add `piece` with its inputs wired to `arguments`; its other inputs are weights and get `prefix` before their name.

        Returns the names its outputs got, in order.
        """
        graph = piece.graph
        names = dict(arguments)
        for value in graph.input:
            if value.name not in arguments:
                weight = onnx.ValueInfoProto()
                weight.CopyFrom(value)
                weight.name = names[value.name] = prefix + value.name
                self.arguments([weight])

        def rename(name: str) -> str:
            return names.setdefault(name, f"{prefix}/{name}") if name else ""

        for initializer in graph.initializer:
            constant = self._graph.initializer.add()
            constant.CopyFrom(initializer)
            constant.name = rename(initializer.name)
        for node in graph.node:
            copy = self._graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [rename(name) for name in node.input]
            copy.output[:] = [rename(name) for name in node.output]
        return [rename(value.name) for value in graph.output]

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
    """hidden, text_hidden, modulation_*, rope -> residual [B, S, D]: all blocks, and what they added to `hidden`."""
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
    image = body.node("Slice", [joined, start, end, axis], "hidden_out")
    body.node("Sub", [image, "hidden"], "residual")
    residual = onnx.ValueInfoProto()
    residual.CopyFrom(prologue["hidden"])
    residual.name = "residual"
    return body.finish([residual])


def compose_text_encoder(pieces: dict[str, onnx.ModelProto], text_layers: tuple[int, ...]) -> onnx.ModelProto:
    """input_ids, attention_mask -> text [B, L, len(text_layers) * D]: hidden states after the given layers, side by side."""
    encoder = Composition()
    stem, layer = pieces["text_stem"], pieces["text_layer"]
    encoder.arguments(value for value in stem.graph.input if value.name in ("input_ids", "attention_mask"))
    wired = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    hidden, attends, cos, sin = encoder.inline(stem, wired)
    taken = []
    for number in range(text_layers[-1]):
        (hidden,) = encoder.inline(
            layer, {"hidden": hidden, "attends": attends, "cos": cos, "sin": sin}, f"model.layers.{number}."
        )
        if number + 1 in text_layers:
            taken.append(hidden)
    encoder.node("Concat", taken, "text", axis=-1)
    text = onnx.ValueInfoProto()
    text.CopyFrom(stem.graph.output[0])
    text.name = "text"
    text.type.tensor_type.shape.dim[2].dim_value *= len(text_layers)
    return encoder.finish([text])
