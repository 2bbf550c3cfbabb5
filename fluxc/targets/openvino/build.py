"""The graphs of an `openvino` target: lowered, bound to the components' weights files, audited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef
from fluxc.formats.smoothing import PRE_QUANT_SCALE
from fluxc.graph.bind import argument_names, bind
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.onnxruntime.build import COMPONENT_OF, port_of
from fluxc.targets.onnxruntime.lower import lower_with
from fluxc.targets.openvino.audit import Audit, Expected, audit_graph, expected_of
from fluxc.targets.openvino.forms import FORMS
from fluxc.targets.unused import check_unused, unused_of_groups
from fluxrt.backends.openvino_device import settle
from fluxrt.backends.openvino_target import load_library
from fluxrt.manifest import Graph

NAMED = 6
"""Findings that a message names."""


@dataclass(frozen=True)
class BuiltGraph:
    """A graph file's bytes-to-be, its manifest entry, and what it must be executed as."""

    model: onnx.ModelProto
    entry: Graph
    expected: Expected


def build_graphs(
    neutral: Mapping[str, onnx.ModelProto],
    weights: Mapping[str, dict[str, TensorRef]],
    entries: Mapping[str, str],
    plans: Mapping[str, list[LayerPlan]],
    unused: Mapping[str, tuple[str, ...]],
) -> dict[str, BuiltGraph]:
    """Lower and bind the graphs.

    `weights` describes each component's written tensors, `entries` names its weights file or index, `unused` the name
    prefixes no graph needs. Raises BuildError naming tensors that no graph uses, so that nothing is dropped in silence.
    """
    built, bound = {}, {component: set[str]() for component in weights}
    for name, model in neutral.items():
        component, arguments = COMPONENT_OF[name], argument_names(model)
        stored = {tensor: ref.dtype for tensor, ref in weights[component].items()}
        planned = {entry.layer.name: entry for entry in plans.get(component, [])}
        lowered = lower_with(FORMS, model, arguments, stored, planned).model
        bound[component] |= bind(lowered, arguments, weights[component])
        entry = Graph(
            file=f"{component}/{name}.openvino.onnx",
            weights=f"{component}/{entries[component]}",
            inputs=tuple(port_of(value) for value in lowered.graph.input),
            outputs=tuple(port_of(value) for value in lowered.graph.output),
        )
        formats = {layer: entry.format for layer, entry in planned.items()}
        built[name] = BuiltGraph(lowered, entry, expected_of(lowered, formats, stored))
    for component, tensors in weights.items():
        # Inputs are not rounded as an FP4 GPU does it.
        plan = plans.get(component, [])
        scales = {f"{entry.layer.name}.input_scale" for entry in plan}
        scales |= unused_of_groups(plan, PRE_QUANT_SCALE, bound[component])
        left = [tensor for tensor in tensors if tensor not in bound[component] | scales]
        check_unused(component, left, unused.get(component, ()))
    return built


def audit_graphs(folder: Path, built: Mapping[str, BuiltGraph], compute: str) -> dict[str, Audit]:
    """Audit the graph files in `folder` on the CPU here, whatever device they are for; BuildError naming what is wrong."""
    openvino = load_library()
    core = openvino.Core()
    settled = settle(core, "CPU", compute)
    audits, faults = {}, []
    version = openvino.__version__.partition("-")[0]
    for name, graph in built.items():
        try:
            audits[name] = audit_graph(core, folder / graph.entry.file, graph.expected, settled)
        except RuntimeError as error:
            raise BuildError(
                f"{graph.entry.file}: OpenVINO {version} does not load it: {str(error).strip()}"
            ) from error
        faults += [f"{name}: {finding}" for finding in audits[name].faults]
    if faults:
        more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise BuildError(
            f"OpenVINO {version} does not execute the graphs as planned: {'; '.join(faults[:NAMED])}{more}. Use an "
            "OpenVINO that this fluxc was tested with (docs/dependencies.md), or leave the target out"
        )
    return audits
