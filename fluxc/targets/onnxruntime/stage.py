"""The stage of an `onnxruntime` target: its graphs, lowered, bound, and loaded once by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import UNSET

from fluxc.base.cache import Made
from fluxc.base.progress import Report
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.targets import OnnxRuntimeTarget
from fluxc.targets.parts import Weights, load_exports, weights_beside, write_entry
from fluxrt import manifest as format

if TYPE_CHECKING:
    import onnx

WHOLE = ("prologue", "signal", "epilogue", "vae_decoder", "vae_blend")


@dataclass(frozen=True)
class OnnxRuntimeInputs:
    """`exports` are neutral graphs by component: whole in fp32, or one for each kind of block for a GPU or a rank. `bodies` are
    the transformer's plans for bodies beside `body`.

    `decoder_tiles` are those of queries in the VAE's attention. `padding`: whether some size's image tokens need padding for
    all ranks to hold as many.
    """

    target: OnnxRuntimeTarget
    exports: dict[str, Made]
    weights: dict[str, Weights]
    plans: dict[str, list[LayerPlan]]
    bodies: dict[str, list[LayerPlan]]
    unused: dict[str, tuple[str, ...]]
    transformer: Flux2Transformer
    text_length: int
    text_layers: tuple[int, ...]
    step_cache: bool
    decoder_tiles: int
    padding: bool


def run(inputs: OnnxRuntimeInputs, folder: Path, report: Report) -> None:
    """Write the graphs under COMPONENT/, and the manifest entry."""
    from fluxc.graph.attention import attention_in_tiles
    from fluxc.targets.onnxruntime import build

    target, for_gpu = inputs.target, inputs.target.device == "cuda"
    exported = load_exports(inputs.exports, inputs.step_cache)
    graphs = {name: model for pieces in exported.values() for name, model in pieces.items()}
    graphs["vae_decoder"] = attention_in_tiles(graphs["vae_decoder"], inputs.decoder_tiles)
    sharding = None
    if target.ranks > 1:
        graphs, sharding = _sharded(inputs, graphs)
    if for_gpu:
        graphs = _composed(inputs, graphs)
    if sharding is None:
        graphs |= dict.fromkeys(inputs.bodies, graphs["body"])
    weights = inputs.weights
    refs = {name: written.tensors for name, written in weights.items()}
    entries = {name: Path(written.entry).name for name, written in weights.items()}
    plans = build.Plans(inputs.plans, inputs.bodies)
    built = build.build_graphs(graphs, refs, entries, plans, target, inputs.unused)
    with weights_beside(folder, weights):
        files = {file: model for graph in built.values() for file, model in graph.files.items()}
        for file, model in files.items():
            (folder / file).write_bytes(model.SerializeToString(deterministic=True))
        build.check_loads(folder, list(files), for_gpu)
    graph_entries = {name: graph.entry for name, graph in built.items()}
    entry = format.struct_of(target.kind, format.OnnxRuntimeTarget)
    write_entry(folder, entry(target.name, target.activations, graph_entries, target.device, sharding))


def _composed(inputs: OnnxRuntimeInputs, graphs: Mapping[str, onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
    """Whole graphs from those of each kind of block."""
    from fluxc.graph.compose import compose_body, compose_text_encoder

    model = inputs.transformer
    body = compose_body(dict(graphs), model.num_layers, model.num_single_layers, inputs.text_length)
    encoder = compose_text_encoder(dict(graphs), inputs.text_layers)
    return {name: graphs[name] for name in WHOLE if name in graphs} | {"body": body, "text_encoder": encoder}


def _sharded(
    inputs: OnnxRuntimeInputs, graphs: dict[str, onnx.ModelProto]
) -> tuple[dict[str, onnx.ModelProto], format.Sharding]:
    """The graphs of one rank, the body in pieces between its exchanges, and what becomes of them."""
    from fluxc.graph.compose import compose_body
    from fluxc.graph.ulysses import Exchange, hide_padding, shard, split_at_exchanges
    from fluxc.targets.onnxruntime.build import port_of

    model, ranks = inputs.transformer, inputs.target.ranks
    text_tokens = inputs.text_length // ranks
    body = compose_body(graphs, model.num_layers, model.num_single_layers, text_tokens)
    kept = {name: graph for name, graph in graphs.items() if not name.endswith("_block")}
    if inputs.padding and "signal" in kept:
        kept["signal"] = hide_padding(kept["signal"])
    bodies: dict[str, list[str | format.Exchange]] = {name: [] for name in ("body", *inputs.bodies)}
    for part in split_at_exchanges(shard(body, model, ranks, inputs.padding)):
        for body_name, order in bodies.items():
            if isinstance(part, Exchange):
                port = port_of(part.sends)
                order.append(format.Exchange(port.name, part.receives.name, port.dtype, port.shape))
            else:
                name = f"{body_name}-{sum(isinstance(known, str) for known in order)}"
                order.append(name)
                kept[name] = part
    first, *others = ((name, tuple(order)) for name, order in bodies.items())
    return kept, format.Sharding(ranks, text_tokens, inputs.padding, first[1], dict(others) or UNSET)
