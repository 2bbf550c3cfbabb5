"""The stage of an `openvino` target: its graphs, lowered, bound, and audited as OpenVINO's CPU plugin executes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluxc.base.cache import Made
from fluxc.base.progress import Report
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.targets import OpenVinoTarget
from fluxc.targets.parts import Weights, load_exports, weights_beside, write_entry
from fluxrt.backends import openvino_target


@dataclass(frozen=True)
class OpenVinoInputs:
    """`exports` are whole neutral graphs in fp32 by component; `decoder_tiles` those of queries in the VAE's attention.

    `machine` is the version of OpenVINO here, and what this CPU computes in: the audit depends on both.
    """

    target: OpenVinoTarget
    exports: dict[str, Made]
    weights: dict[str, Weights]
    plans: dict[str, list[LayerPlan]]
    unused: dict[str, tuple[str, ...]]
    step_cache: bool
    decoder_tiles: int
    machine: tuple[str, ...]


def run(inputs: OpenVinoInputs, folder: Path, report: Report) -> None:
    """Write the graphs under COMPONENT/, and the manifest entry."""
    from fluxc.graph.attention import attention_in_tiles
    from fluxc.targets.openvino import build

    target, weights = inputs.target, inputs.weights
    exported = load_exports(inputs.exports, inputs.step_cache)
    graphs = {name: model for pieces in exported.values() for name, model in pieces.items()}
    graphs["vae_decoder"] = attention_in_tiles(graphs["vae_decoder"], inputs.decoder_tiles)
    refs = {name: written.tensors for name, written in weights.items()}
    entries = {name: Path(written.entry).name for name, written in weights.items()}
    built = build.build_graphs(graphs, refs, entries, inputs.plans, inputs.unused)
    with weights_beside(folder, weights):
        for graph in built.values():
            (folder / graph.entry.file).write_bytes(graph.model.SerializeToString(deterministic=True))
        audits = build.audit_graphs(folder, built, target.compute)
    entry = openvino_target.OpenVinoTarget(
        target.name,
        {name: graph.entry for name, graph in built.items()},
        target.device,
        target.compute,
        target.performance,
        inputs.machine[0],
        {name: audit.as_json() for name, audit in audits.items()},
    )
    write_entry(folder, entry)
