"""Traces the modules on the meta device into neutral ONNX graphs; no weight is read and none is stored.

torch.export, then torch.onnx.export, then onnxscript's optimizer on a graph whose weights were made inputs first, so that
it can neither fold nor rename them. Afterwards each Transpose + MatMul on a weight becomes one `fluxc::Linear`.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import helper, numpy_helper

from fluxc.base.errors import BuildError
from fluxc.base.loading import loading
from fluxc.families.base import Family
from fluxc.graph import LINEAR_DOMAIN, OPSET
from fluxc.graph.modules import (
    DoubleBlock,
    Epilogue,
    LeftPaddedTextStem,
    PartPrologue,
    Prologue,
    Signal,
    SingleBlock,
    TextLayer,
    TextStem,
    VaeDecoder,
)
from fluxc.graph.values import renamed, rewired
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE

Input = tuple[torch.Tensor, dict[int, str] | None]
FOLDED_VALUES = 1 << 24
"""The largest constant that is computed when a graph is made, in values: rotary tables and masks of thousands of tokens. The
optimizer's own limit, 8192, leaves the rotary tables of 512 tokens uncomputed, and TensorRT's layers take them as constants."""


def trace_transformer(
    config: dict[str, Any],
    text_length: int,
    cfg_batch: bool,
    dtype: torch.dtype = torch.float32,
    part: bool = False,
) -> dict[str, onnx.ModelProto]:
    """The neutral graphs prologue, signal, double_block, single_block and epilogue of a Flux2Transformer2DModel in `dtype`.

    With `part` they are those of a part of an image's tokens, `text_length` text tokens among them: the prologue takes the
    text's part as `text_shard`, and `first_token` and `first_text`. Graphs that two calls have in common are traced once.
    """
    shape = Flux2Transformer.read(config)
    small = {
        **config,
        "num_layers": min(1, shape.num_layers),
        "num_single_layers": min(1, shape.num_single_layers),
    }
    # Only the prologue reads the guidance that dev has embedded.
    whole, rest = (json.dumps(x, sort_keys=True) for x in (small, small | {"guidance_embeds": False}))
    pieces = [
        _Piece("prologue", whole, dtype, text_length=text_length, cfg_batch=cfg_batch, part=part),
        _Piece("signal", rest, dtype),
        _Piece("epilogue", rest, dtype, cfg_batch=cfg_batch),
    ]
    if shape.num_layers:
        pieces.append(_Piece("double_block", rest, dtype, text_length=text_length))
    if shape.num_single_layers:
        pieces.append(_Piece("single_block", rest, dtype, text_length=text_length))
    return {piece.name: onnx.ModelProto.FromString(_traced(piece)) for piece in pieces}


@dataclass(frozen=True)
class _Piece:
    """All that a graph of the transformer depends on: its name, the config as JSON with a block of each kind, and the rest."""

    name: str
    config: str
    dtype: torch.dtype
    text_length: int = 0
    cfg_batch: bool = False
    part: bool = False


@functools.lru_cache(maxsize=128)
def _traced(piece: _Piece) -> bytes:
    """The graph of `piece`, serialized: a megabyte at most, since no graph holds weights."""
    from diffusers import Flux2Transformer2DModel

    config, dtype, length = json.loads(piece.config), piece.dtype, piece.text_length
    shape = Flux2Transformer.read(config)
    with _making("transformer"):
        model = Flux2Transformer2DModel.from_config(config).eval().to(dtype)
    width, head_dim = shape.width, shape.attention_head_dim
    channels, features = shape.in_channels, shape.joint_attention_dim
    # Without a second row for guidance there are as many rows as images.
    images, batch, tokens = (3, 6, 70) if piece.cfg_batch else (3, 3, 70)

    hidden = _meta(batch, tokens, width, dtype=dtype)
    latents, scalar = _meta(images, tokens, channels), _meta()
    index = torch.empty((), dtype=torch.int64, device="meta")
    both, only_tokens, only_batch = {0: "batch", 1: "tokens"}, {1: "tokens"}, {0: "batch"}
    each_image = {0: "images" if piece.cfg_batch else "batch", 1: "tokens"}
    joined, rows = {0: "batch", 1: f"tokens + {length}"}, {0: f"tokens + {length}"}
    inputs: dict[str, Input]
    if piece.name == "prologue":
        inputs = {
            "latents": (latents, each_image),
            ("text_shard" if piece.part else "text"): (_meta(batch, length, features, dtype=dtype), only_batch),
            "sigma": (scalar, None),
            "columns": (index, None),
        }
        if piece.part:
            inputs |= {"first_token": (index, None), "first_text": (index, None)}
        if shape.guidance_embeds:
            inputs["guidance"] = (scalar, None)
        module: torch.nn.Module = (PartPrologue if piece.part else Prologue)(model, piece.cfg_batch)
        outputs: tuple[str, ...] = (
            "hidden",
            "text_hidden",
            "temb",
            "modulation_img",
            "modulation_txt",
            "modulation_single",
            "rope_cos",
            "rope_sin",
        )
    elif piece.name == "signal":
        first = ("modulation_img", 6) if shape.num_layers else ("modulation_single", 3)
        inputs = {
            "hidden": (hidden, both),
            first[0]: (_meta(1, first[1] * width, dtype=dtype), None),
            "previous_signal": (_meta(1, tokens, width), only_tokens),
        }
        module, outputs = Signal(model.config.eps), ("signal", "change")
    elif piece.name == "epilogue":
        inputs = {
            "latents": (latents, each_image),
            "hidden": (hidden, both),
            "residual": (_meta(batch, tokens, width), both),
            "temb": (_meta(1, width, dtype=dtype), None),
            "sigma": (scalar, None),
            "next_sigma": (scalar, None),
        }
        if piece.cfg_batch:
            inputs["guidance"] = (scalar, None)
        module, outputs = Epilogue(model, piece.cfg_batch), ("next_latents",)
    elif piece.name == "double_block":
        inputs = {
            "hidden": (hidden, both),
            "text_hidden": (_meta(batch, length, width, dtype=dtype), only_batch),
            "modulation_img": (_meta(1, 6 * width, dtype=dtype), None),
            "modulation_txt": (_meta(1, 6 * width, dtype=dtype), None),
            "rope_cos": (_meta(length + tokens, head_dim), rows),
            "rope_sin": (_meta(length + tokens, head_dim), rows),
        }
        module, outputs = DoubleBlock(model.transformer_blocks[0]), ("hidden_out", "text_hidden_out")
    else:
        inputs = {
            "joined": (_meta(batch, length + tokens, width, dtype=dtype), joined),
            "modulation_single": (_meta(1, 3 * width, dtype=dtype), None),
            "rope_cos": (_meta(length + tokens, head_dim), rows),
            "rope_sin": (_meta(length + tokens, head_dim), rows),
        }
        module, outputs = SingleBlock(model.single_transformer_blocks[0]), ("joined_out",)
    strip = "block." if piece.name.endswith("_block") else ""
    return trace(module, inputs, outputs, strip=strip).SerializeToString(deterministic=True)


def trace_text_encoder(
    config: dict[str, Any],
    text_length: int,
    family: Family,
    dtype: torch.dtype = torch.float32,
    any_length: bool = False,
) -> dict[str, onnx.ModelProto]:
    """The neutral graphs `text_stem` (embedding, mask, rotary tables) and `text_layer` (one decoder layer) in `dtype`.

    With `any_length` they take any number of tokens, and `text_length` is but an example.
    """
    import transformers

    kind = family.text_encoder
    model_class = getattr(transformers, kind.model_class)
    described = kind.of_text(kind.with_layers(config, 1))
    small = {key: value for key, value in described.items() if key not in ("dtype", "torch_dtype")}
    small |= {"attn_implementation": "sdpa"}
    with _making("text_encoder"):
        model = model_class(model_class.config_class.from_dict(small)).eval().to(dtype)
    # transformers computes the rotary frequencies when a model is made; on the meta device they have no values.
    rotary = type(model.rotary_emb)(model.config)
    constants = {f"{kind.prefix}rotary_emb.{name}": value for name, value in rotary.named_buffers()}
    tokens = torch.empty(2, text_length, dtype=torch.int64, device="meta")
    shape = kind.read(config)
    branches = {0: "branches"}
    rows = branches | ({1: "tokens"} if any_length else {})
    square = branches | ({2: "tokens", 3: "tokens"} if any_length else {})
    table = {1: "tokens"} if any_length else None
    stem_inputs: dict[str, Input] = {"input_ids": (tokens, rows), "attention_mask": (tokens, rows)}
    layer_inputs: dict[str, Input] = {
        "hidden": (_meta(2, text_length, shape.hidden_size, dtype=dtype), rows),
        "attends": (torch.empty(2, 1, text_length, text_length, dtype=torch.bool, device="meta"), square),
        "cos": (_meta(1, text_length, shape.head_width, dtype=dtype), table),
        "sin": (_meta(1, text_length, shape.head_width, dtype=dtype), table),
    }
    stem: TextStem = TextStem(model, kind.prefix)
    outputs: tuple[str, ...] = ("hidden", "attends", "rotary_cos", "rotary_sin")
    if family.prompts.padding == "left":
        stem, outputs = LeftPaddedTextStem(model, kind.prefix), (*outputs, "seen")
        layer_inputs["seen"] = (_meta(2, text_length, 1, dtype=dtype), rows)
    return {
        "text_stem": trace(stem, stem_inputs, outputs, constants=constants),
        "text_layer": trace(TextLayer(model.layers[0]), layer_inputs, ("hidden_out",), strip="layer."),
    }


def trace_vae_decoder(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    """The neutral graph `vae_decoder` in `dtype`."""
    from diffusers import AutoencoderKLFlux2

    with _making("vae"):
        vae = AutoencoderKLFlux2.from_config(config).eval().to(dtype)
    inputs = {"latent_grid": (_meta(1, 6, 10, Flux2VAE.read(config).latent_channels * 4), {1: "rows", 2: "columns"})}
    return trace(VaeDecoder(vae), inputs, ("image",))


def trace(
    module: torch.nn.Module,
    inputs: Mapping[str, Input],
    outputs: tuple[str, ...],
    strip: str = "",
    constants: dict[str, torch.Tensor] | None = None,
) -> onnx.ModelProto:
    """Trace `module` on meta tensors into a neutral graph.

    `inputs` gives each argument an example and the names of its dynamic dimensions; `strip` is taken off the front of
    weight names; `constants` holds the values of the buffers no checkpoint stores, by buffer name.
    The result's graph inputs are the arguments, then every weight under its tensor name.
    """
    from onnxscript import optimizer

    # torch.export takes one tensor given for two arguments as one argument used twice, without a word.
    examples = tuple(torch.empty_like(example) for example, _ in inputs.values())
    auto = torch.export.Dim.AUTO
    dynamic = tuple(dict.fromkeys(dims, auto) if dims else None for _, dims in inputs.values())
    with torch.no_grad(), _quiet(), _operators_read_once():
        exported = torch.export.export(module, examples, dynamic_shapes=dynamic, strict=False)
        program = torch.onnx.export(
            exported,
            args=(),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
        )
    assert program is not None
    ir_model = program.model
    for name, value in list(ir_model.graph.initializers.items()):
        if name in exported.state_dict:
            value.const_value = None
            ir_model.graph.inputs.append(value)
            ir_model.graph.initializers.pop(name)
        elif constants and name in constants:
            value.const_value = onnx_ir.tensor(constants[name].numpy(), name=name)
    with _quiet():
        optimizer.optimize(ir_model, input_size_limit=FOLDED_VALUES, output_size_limit=FOLDED_VALUES)
    model = onnx_ir.to_proto(ir_model)
    _check(model, tuple(inputs), outputs)
    _name_dimensions(model, inputs)
    return _neutral(model, tuple(inputs), outputs, strip)


def _name_dimensions(model: onnx.ModelProto, inputs: Mapping[str, Input]) -> None:
    """Give the exporter's symbols (s5, s89) the names the caller chose for those dimensions."""
    names: dict[str, str] = {}
    for value in model.graph.input:
        for at, name in (inputs[value.name][1] or {}).items() if value.name in inputs else ():
            names[value.type.tensor_type.shape.dim[at].dim_param] = name
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]
            elif dimension.dim_param:
                dimension.dim_param = re.sub(r"s\d+", lambda m: names.get(m[0], m[0]), dimension.dim_param)


def _check(model: onnx.ModelProto, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    names = [value.name for value in model.graph.input]
    if tuple(names[: len(inputs)]) != inputs or tuple(v.name for v in model.graph.output) != outputs:
        raise BuildError(f"the exporter renamed a graph's ports: {names[: len(inputs)]}; this torch is not supported")
    if any("Sequence" in node.op_type for node in model.graph.node):
        raise BuildError(
            "the exporter left sequence operators, which TensorRT refuses; this onnxscript is not supported"
        )


def _neutral(model: onnx.ModelProto, inputs: tuple[str, ...], outputs: tuple[str, ...], strip: str) -> onnx.ModelProto:
    """Fold Transpose + MatMul on weights into fluxc::Linear, number the values, drop what could differ between machines."""
    graph = model.graph
    weights = {value.name: value for value in graph.input if value.name not in inputs}
    transposed = {}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            transposed[node.output[0]] = node.input[0]
    nodes = []
    for node in graph.node:
        if node.op_type == "Transpose" and node.output[0] in transposed:
            continue
        if node.op_type == "MatMul" and node.input[1] in transposed:
            node = _linear(node.input[0], transposed[node.input[1]], node.output[0])
        elif node.op_type == "Gemm" and node.input[1] in weights and _is_plain_linear(node):
            node = _linear(node.input[0], node.input[1], node.output[0])
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    unread = [name for name in inputs if name not in used]
    if unread:
        raise BuildError(f"the exporter left inputs unread: {', '.join(unread)}; this torch is not supported")
    outside = used.intersection(transposed)
    if outside:
        raise BuildError(
            f"a transposed weight is used outside a Linear: {sorted(outside)}; this torch is not supported"
        )

    names: dict[str, str] = {name: name for name in (*inputs, *outputs)}
    names |= {name: name.removeprefix(strip) for name in weights}
    for initializer in graph.initializer:
        names.setdefault(initializer.name, f"c{len(names)}")
    for node in nodes:
        for output in node.output:
            if output and output not in names:
                names[output] = f"v{len(names)}"
    clean = onnx.GraphProto(name="fluxc")
    for value in graph.input:
        if value.name in inputs or value.name in used:
            clean.input.append(renamed(value, names[value.name]))
    clean.output.extend(graph.output)
    for value in (*clean.input, *clean.output):
        del value.metadata_props[:]
    for initializer in graph.initializer:
        if initializer.name in used or initializer.name in outputs:
            clean.initializer.append(
                numpy_helper.from_array(numpy_helper.to_array(initializer), names[initializer.name])
            )
    for node in nodes:
        kept = rewired(node, lambda name: names[name])
        kept.name = kept.doc_string = ""
        del kept.metadata_props[:]
        clean.node.append(kept)
    return make_model(clean)


def _linear(x: str, weight: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Linear", [x, weight], [output], domain=LINEAR_DOMAIN)


def _is_plain_linear(node: onnx.NodeProto) -> bool:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    without_bias = len([name for name in node.input if name]) == 2
    return without_bias and all(attributes.get(k, {"alpha": 1.0, "beta": 1.0}.get(k, 0)) == v for k, v in plain.items())


def make_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model around `graph` with fixed opsets and IR version, and no trace of the machine."""
    return helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", OPSET),
            helper.make_opsetid("com.microsoft", 1),
            helper.make_opsetid(LINEAR_DOMAIN, 1),
        ],
        ir_version=11,
        producer_name="fluxc",
    )


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_REGISTRIES: dict[int, Any] = {}


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """torch parses the source of its whole ONNX operator library again for every graph, a fifth of a trace's time.

    Nothing here registers an operator, so one reading serves all graphs. A torch without this function keeps its own way.
    """
    try:
        registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        read, own = registry.from_torchlib, vars(registry)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        registry = None
    if registry is None:
        yield
        return

    def from_torchlib(_: type, opset_version: int) -> Any:
        if opset_version not in _REGISTRIES:
            _REGISTRIES[opset_version] = read(opset_version=opset_version)
        return _REGISTRIES[opset_version]

    registry.from_torchlib = classmethod(from_torchlib)
    try:
        yield
    finally:
        registry.from_torchlib = own


@contextmanager
def _making(component: str) -> Iterator[None]:
    """The body makes a component's model by its config, on the meta device; CheckpointError if the library cannot."""
    with loading(Path(component, "config.json"), "its model cannot be made"), torch.device("meta"), _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters log and warn about matters of their own (torchvision missing, deprecations); users cannot act on them."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir", "diffusers", "transformers")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
