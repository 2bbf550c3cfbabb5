"""Runs every graph of a bundle's CPU target with another execution provider of ONNX Runtime, on the inputs that the bundle's
evidence leads to, and compares with the CPU provider: relative error, seconds, and which operators stayed on the CPU.

    python benchmarks/provider_graphs.py BUNDLE --provider CoreMLExecutionProvider
    python benchmarks/provider_graphs.py BUNDLE --provider WebGpuExecutionProvider --package onnxruntime_ep_webgpu

`--package` is a Python package that brings a provider as a plugin; it must have `get_library_path`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fluxrt.backends.onnxruntime import OnnxRuntimeBackend, session_options
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.evidence import read_evidence, relative_error
from fluxrt.manifest import Evidence, Graph
from fluxrt.pipeline import Pipeline
from fluxrt.unfold import unfold
from fluxrt.weights import component_weights

FOLDED = ("optimization.constant_folding_max_output_size_in_bytes", str(1 << 20))
ASSIGNED = ("session.record_ep_graph_assignment_info", "1")


class Recording(OnnxRuntimeBackend):
    """Keeps what each graph was given and gave, the first time it ran, in the form that its main file has."""

    seen: dict[str, tuple[dict[str, Any], dict[str, Any]]]

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self.seen = {}

    def _variant(self, graph: str) -> Graph:
        return self._described(graph)

    def _run(self, graph: str, session: Any, described: Graph) -> list[Any]:
        results = super()._run(graph, session, described)
        given = {port.name: self._buffers[port.name] for port in described.inputs}
        given |= unfold(described.unfolded, component_weights(self._bundle, described.weights))
        gave = {port.name: value for port, value in zip(described.outputs, results, strict=True)}
        self.seen.setdefault(described.file, (given, gave))
        return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--package")
    options = parser.parse_args()
    if options.package:
        library = importlib.import_module(options.package).get_library_path()
        onnxruntime.register_execution_provider_library(options.package, library)
    bundle = open_bundle(options.bundle)
    print(f"ONNX Runtime {onnxruntime.__version__}, {options.provider}, target {options.target}")
    for file, (given, gave) in on_cpu(bundle, options.target).items():
        session = other_session(str(bundle.checked_file(file)), options.provider)
        began = time.perf_counter()
        results = session.run(list(gave), given)
        seconds = time.perf_counter() - began
        error = max(
            relative_error(np.asarray(ours), theirs) for ours, theirs in zip(results, gave.values(), strict=True)
        )
        print(f"{file}: relative error {error:.2g}, first run {seconds:.2f} s; {placement(session)}")


def on_cpu(bundle: Bundle, target: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By graph file what the first recorded prompt gives it and gets from it on the CPU: text, one step, an image."""
    evidence = bundle.manifest.evidence
    if not isinstance(evidence, Evidence):
        raise SystemExit(f"{bundle.root}: it has no evidence; build it with fidelity.level stages or images")
    recorded, sigma = read_evidence(bundle, evidence)[0], evidence.sigmas[0]
    backend = Recording(bundle, bundle.target(target))
    with Pipeline(bundle, target=target, backend=backend) as pipeline:
        grid = pipeline.grid(evidence.size)
        words = (recorded.input_ids, recorded.attention_mask)
        for text in (words, recorded.text):
            pipeline.begin(recorded.latents[:1], grid, evidence.guidance, text)
        pipeline.step(sigma, sigma + 1.0)
        pipeline.decode(recorded.final, grid)
        return dict(backend.seen)


def other_session(path: str, provider: str) -> Any:
    """A session with `provider` before the CPU's, as a plugin's devices or by its name."""
    options = session_options()
    options.add_session_config_entry(*FOLDED)
    options.add_session_config_entry(*ASSIGNED)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
    if devices:
        options.add_provider_for_devices(devices[:1], {})
        return onnxruntime.InferenceSession(path, options)
    if provider not in onnxruntime.get_available_providers():
        raise SystemExit(
            f"{provider}: this ONNX Runtime has {', '.join(onnxruntime.get_available_providers())}, and no device"
        )
    return onnxruntime.InferenceSession(path, options, providers=[provider, "CPUExecutionProvider"])


def placement(session: Any) -> str:
    """How many nodes each provider computes, and which operators the CPU's does."""
    nodes: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        nodes.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    left = nodes.pop("CPUExecutionProvider", Counter())
    counts = [f"{sum(found.values())} nodes on {name}" for name, found in nodes.items()]
    return ", ".join([*counts, f"on the CPU {dict(left)}"])


if __name__ == "__main__":
    main()
