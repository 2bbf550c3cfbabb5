"""Ulysses: the graph of one of N ranks, which holds an equal shard of image and of text tokens for the whole loop.

Everything but attention works on tokens one by one. Around each attention two all-to-alls change what is divided: heads
instead of tokens, and back. The order of tokens inside an attention is then text and image of rank 0, of rank 1 and so on;
attention does not depend on it, for rotary positions are applied before.

An all-to-all is a `DistCollective` over dimension 0, which counts ranks: part i of what a rank gives goes to rank i, and part
i of what it gets came from rank i.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError
from fluxc.graph import LINEAR_DOMAIN
from fluxc.graph.export import make_model
from fluxc.graph.values import renamed, rewired
from fluxc.models.flux2_transformer import Flux2Transformer

COLLECTIVE = "DistCollective"
COLLECTIVE_DOMAIN = "trt"
KEYS = "keys"
IMAGE_TOKENS = "image_tokens"
PRIMES = {"batch": 100_003, "tokens": 1_000_003, KEYS: 10_000_019}


@dataclass(frozen=True)
class Exchange:
    """An all-to-all between two pieces of a graph: the value every rank gives, and the one of the same type it gets."""

    sends: onnx.ValueInfoProto
    receives: onnx.ValueInfoProto


def shard(model: onnx.ModelProto, transformer: Flux2Transformer, ranks: int, padded: bool = False) -> onnx.ModelProto:
    """`model`, blocks or a whole body traced with one rank's shard of tokens, with its attentions over those of all ranks.

    With `padded` some of the ranks' tokens are padding: the input `keys`, int64, lists those
    that are attended to, in attention's order. Raises BuildError where the heads cannot be divided, or an attention has a mask.
    """
    heads, head_dim = transformer.num_attention_heads, transformer.attention_head_dim
    if heads % ranks:
        raise BuildError(f"{heads} heads cannot be divided among {ranks} ranks")
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.node[:]
    for node in model.graph.node:
        graph.node.extend(_sharded(node, ranks, padded) if node.op_type == "Attention" else [node])
    if len(graph.node) > len(model.graph.node):
        if padded:
            graph.input.append(helper.make_tensor_value_info(KEYS, TensorProto.INT64, [KEYS]))
        # A 0 keeps the dimension, -1 is what is left: no shape has to be computed.
        constants = {
            "axis_0": [0],
            "axis_1": [1],
            "by_rank": [0, ranks, heads // ranks, -1, head_dim],
            "all_tokens": [0, 0, 0, -1, head_dim],
            "by_shard": [0, 0, ranks, -1, head_dim],
            "all_heads": [0, heads, -1, head_dim],
        }
        for name, values in constants.items():
            graph.initializer.append(helper.make_tensor(f"ulysses/{name}", TensorProto.INT64, [len(values)], values))
    return make_model(graph)


def ranks_of(collective: onnx.NodeProto) -> int:
    """Among how many ranks a DistCollective exchanges."""
    return next(int(attribute.i) for attribute in collective.attribute if attribute.name == "nb_rank")


def hide_padding(signal: onnx.ModelProto) -> onnx.ModelProto:
    """The graph `signal` with an input `image_tokens` fp32 [1, S, 1], 1 for a token of the image and 0 for padding."""
    graph = onnx.GraphProto()
    graph.CopyFrom(signal.graph)
    del graph.node[:]
    for node in signal.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        if "signal" in node.output:
            copy.output[:] = [f"{name}/all" if name == "signal" else name for name in node.output]
            graph.node.append(helper.make_node("Mul", ["signal/all", IMAGE_TOKENS], ["signal"]))
    previous = next(value for value in graph.input if value.name == "previous_signal")
    tokens = previous.type.tensor_type.shape.dim[1].dim_param
    graph.input.append(helper.make_tensor_value_info(IMAGE_TOKENS, TensorProto.FLOAT, [1, tokens, 1]))
    return make_model(graph)


def split_at_exchanges(model: onnx.ModelProto) -> list[onnx.ModelProto | Exchange]:
    """`model`, neutral, cut at its collectives: graphs to run in order, and between them what is exchanged.

    What one graph computes and a later one needs is an output of the one and an input of the other, under a name without a
    dot.
    """
    collectives = [node for node in model.graph.node if node.op_type == COLLECTIVE]
    if not collectives:
        return [model]
    stages: list[list[onnx.NodeProto]] = [[]]
    made_in: dict[str, int] = {}
    for node in model.graph.node:
        stages.append([]) if node.op_type == COLLECTIVE else stages[-1].append(node)
        made_in |= dict.fromkeys(node.output, len(stages) - 1)
    exchanged = {name for node in collectives for name in (*node.input, *node.output)}
    names: dict[str, str] = {}
    for at, stage in enumerate(stages):
        for name in (name for node in stage for name in (*node.input, *node.output)):
            if name in exchanged or made_in.get(name, at) < at:
                names.setdefault(name, f"carried_{len(names)}")
    values = _described(model)
    got = {node.output[0] for node in collectives}
    parts: list[onnx.ModelProto | Exchange] = []
    for at, stage in enumerate(stages):
        gives = [name for name in names if made_in[name] == at and name not in got]
        parts.append(_piece(model, stage, gives, values, names))
        if at < len(collectives):
            ends = (collectives[at].input[0], collectives[at].output[0])
            parts.append(Exchange(*(renamed(values[name], names[name]) for name in ends)))
    return parts


def _piece(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    gives: list[str],
    values: dict[str, onnx.ValueInfoProto],
    names: dict[str, str],
) -> onnx.ModelProto:
    """The graph of some of `model`'s nodes: it takes what they read and do not make, and gives `gives` and its outputs."""
    made = {name for node in nodes for name in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
    graph = onnx.GraphProto(name="fluxc")
    graph.input.extend(value for value in model.graph.input if value.name in read)
    graph.input.extend(renamed(values[name], names[name]) for name in read if name in names)
    graph.output.extend(value for value in model.graph.output if value.name in made)
    graph.output.extend(renamed(values[name], names[name]) for name in gives)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    graph.node.extend(rewired(node, lambda name: names.get(name, name)) for node in nodes)
    return make_model(graph)


def _described(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Types and shapes of all values, by ONNX's own inference on a copy in standard operators.

    Every symbol is given a prime and found again in the result, for a sum of symbols that passes a Reshape has no name there.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:]
    for node in model.graph.node:
        if node.domain == LINEAR_DOMAIN and node.op_type == "Linear":
            turned = f"{node.output[0]}/turned"
            plain.graph.node.append(helper.make_node("Transpose", [node.input[1]], [turned], perm=[1, 0]))
            plain.graph.node.append(helper.make_node("MatMul", [node.input[0], turned], list(node.output)))
        elif node.op_type == COLLECTIVE:
            plain.graph.node.append(helper.make_node("Identity", list(node.input), list(node.output)))
        else:
            plain.graph.node.append(node)
    shapes = [value.type.tensor_type.shape for value in (*plain.graph.input, *plain.graph.output)]
    found = {dimension.dim_param: 0 for shape in shapes for dimension in shape.dim if dimension.dim_param}
    for name in found:
        symbol, _, more = name.partition(" + ")
        found[name] = PRIMES[symbol] + int(more or 0)
    for shape in shapes:
        for dimension in shape.dim:
            if dimension.dim_param:
                dimension.dim_value = found[dimension.dim_param]
    symbols = {size: name for name, size in found.items()}
    graph = onnx.shape_inference.infer_shapes(plain, strict_mode=True, data_prop=True).graph
    values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    for value in values.values():
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_value in symbols:
                dimension.dim_param = symbols[dimension.dim_value]
    return values


def _sharded(node: onnx.NodeProto, ranks: int, padded: bool) -> Iterable[onnx.NodeProto]:
    """The attention of queries, keys and values [B, H, S/N, d]: each rank computes H/N heads over S tokens."""
    if len(node.input) > 3:
        raise BuildError(f"the attention that gives {node.output[0]!r} has a mask; its heads cannot be divided")
    at = f"{node.output[0]}/ulysses"
    parts = ("query", "key", "value")
    for name, part in zip(parts, node.input, strict=True):
        yield helper.make_node("Reshape", [part, "ulysses/by_rank"], [f"{at}/{name}/own"])
        yield helper.make_node("Transpose", [f"{at}/{name}/own"], [f"{at}/{name}/by_rank"], perm=[1, 0, 2, 3, 4])
        yield helper.make_node("Unsqueeze", [f"{at}/{name}/by_rank", "ulysses/axis_1"], [f"{at}/{name}/given"])
    yield helper.make_node("Concat", [f"{at}/{name}/given" for name in parts], [f"{at}/given"], axis=1)
    yield _all_to_all(f"{at}/given", f"{at}/got", ranks)
    yield helper.make_node("Transpose", [f"{at}/got"], [f"{at}/by_shard"], perm=[1, 2, 3, 0, 4, 5])
    yield helper.make_node("Reshape", [f"{at}/by_shard", "ulysses/all_tokens"], [f"{at}/all"])
    yield helper.make_node("Split", [f"{at}/all"], [f"{at}/{name}/one" for name in parts], axis=0, num_outputs=3)
    for name in parts:
        kept = padded and name != "query"
        given = f"{at}/{name}/filled" if kept else f"{at}/{name}"
        yield helper.make_node("Squeeze", [f"{at}/{name}/one", "ulysses/axis_0"], [given])
        if kept:
            yield helper.make_node("Gather", [given, KEYS], [f"{at}/{name}"], axis=2)
    attention = onnx.NodeProto()
    attention.CopyFrom(node)
    attention.input[:] = [f"{at}/{name}" for name in parts]
    attention.output[:] = [f"{at}/attended"]
    yield attention
    yield helper.make_node("Reshape", [f"{at}/attended", "ulysses/by_shard"], [f"{at}/attended/by_shard"])
    turned = f"{at}/attended/given"
    yield helper.make_node("Transpose", [f"{at}/attended/by_shard"], [turned], perm=[2, 0, 1, 3, 4])
    yield _all_to_all(turned, f"{at}/attended/got", ranks)
    yield helper.make_node("Transpose", [f"{at}/attended/got"], [f"{at}/attended/own"], perm=[1, 0, 2, 3, 4])
    yield helper.make_node("Reshape", [f"{at}/attended/own", "ulysses/all_heads"], [node.output[0]])


def _all_to_all(given: str, got: str, ranks: int) -> onnx.NodeProto:
    return helper.make_node(
        COLLECTIVE,
        [given],
        [got],
        domain=COLLECTIVE_DOMAIN,
        name=got,
        collective_operation="all_to_all",
        reduce_op="none",
        root=-1,
        group_size=0,
        nb_rank=ranks,
    )
