"""The kind `openvino`: graphs for OpenVINO, audited on the CPU here, for a CPU, or a GPU or an NPU of Intel."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fluxc.base.cache import Made
from fluxc.base.errors import BuildError, RecipeError
from fluxc.graph.stage import ExportInputs
from fluxc.recipe.targets import OpenVinoTarget
from fluxc.targets.base import COMPONENTS, TargetContext, TargetKind, TargetWork
from fluxc.targets.openvino import stage
from fluxc.targets.parts import Weights, place_graphs
from fluxrt import manifest as format
from fluxrt.backends import openvino_target
from fluxrt.backends.openvino_target import PACKAGE, how_to_install, load_library

if TYPE_CHECKING:
    from rich.console import RenderableType

COMPUTES = {
    "exact": "computes in fp32",
    "bf16": "computes in bf16, where the processor does so itself, or else in fp32",
    "fp16": "computes in fp16, where the device does so itself, or else in fp32",
    "int8": "quantized layers compute in int8 (weights by row, inputs by groups of 128), all else in fp32",
    "int8-bf16": "quantized layers compute in int8 (weights by row, inputs by groups of 128), all else in bf16",
}


class OpenVino(TargetKind[OpenVinoTarget, openvino_target.OpenVinoTarget]):
    """See TargetKind."""

    options = OpenVinoTarget

    def check(self, field: str, target: OpenVinoTarget, context: TargetContext) -> None:
        """Refuse sizes that an NPU's graphs, compiled for one at a time, do not have, and weights that int8 is not made of."""
        context.decoder().check(field)
        if target.device == "NPU" and context.recipe.size_range is not None:
            raise RecipeError(
                f"{field}.device: an NPU compiles its graphs for one size at a time, and this recipe has a range of sizes; "
                "list the sizes under `sizes`, or choose another device"
            )
        formats = {entry.format for plan in context.source.plans.values() for entry in plan}
        unknown = sorted(formats - {"nvfp4", "nvfp4-w4a16", "mxfp4", "fp8", "bf16"})
        if target.computes_in_int8 and unknown:
            raise RecipeError(
                f"{field}.compute: {target.compute} is made of nvfp4, mxfp4 and fp8, not of {', '.join(unknown)}, as the "
                "precision plan asks; set compute: exact"
            )

    def check_library(self, target: OpenVinoTarget) -> None:
        """OpenVINO audits what is built, for any device."""
        if importlib.util.find_spec(PACKAGE) is None:
            raise BuildError(f"target {target.name}: openvino is not installed; {how_to_install()}")

    def tools(self) -> dict[str, str]:
        """OpenVINO."""
        return {PACKAGE: _version()} if importlib.util.find_spec(PACKAGE) else {}

    def exports(self, target: OpenVinoTarget, context: TargetContext) -> dict[str, ExportInputs]:
        """Whole graphs in fp32."""
        return {name: context.export(name, composed=True) for name in COMPONENTS}

    def work(
        self,
        target: OpenVinoTarget,
        context: TargetContext,
        exports: Mapping[str, Made],
        weights: Mapping[str, Weights],
        step_cache: format.StepCache | None,
    ) -> TargetWork:
        """Lowered, bound and audited graphs."""
        inputs = stage.OpenVinoInputs(
            target=target,
            exports=dict(exports),
            weights=dict(weights),
            plans=context.source.plans,
            unused=context.source.unused,
            step_cache=context.recipe.step_cache is not None,
            decoder_tiles=context.decoder().tiles,
            machine=_machine(),
        )
        return TargetWork(inputs, stage.run)

    def place(
        self, entry: openvino_target.OpenVinoTarget, folder: Path, staging: Path
    ) -> openvino_target.OpenVinoTarget:
        """The graphs; those that are the same to the byte as another target's share its file."""
        return msgspec.structs.replace(entry, graphs=place_graphs(entry.name, entry.graphs, folder, staging))

    def evidence(self, entry: openvino_target.OpenVinoTarget) -> dict[str, Any]:
        """The OpenVINO that the graphs were audited with, and what was found in them."""
        return {"library": PACKAGE, "version": entry.version, "graphs": entry.audit}

    def inspect(self, entry: openvino_target.OpenVinoTarget) -> RenderableType:
        """The graphs as the audit found them."""
        from fluxc.targets.openvino.table import graph_table

        return graph_table(entry)

    def describe(self, target: OpenVinoTarget) -> str:
        """Where it runs and what it computes in."""
        places = {
            "CPU": "on the CPU",
            "GPU": "on a GPU of Intel",
            "NPU": "on an NPU of Intel, one size at a time",
            "AUTO": "on a GPU of Intel where there is one, or else on the CPU",
        }
        where = "built, audited and run" if target.runs_here else "built and audited (by the CPU plugin)"
        version = _version() if importlib.util.find_spec(PACKAGE) else None
        here = (
            f"{where} on this machine (openvino {version})" if version else f"needs openvino here: {how_to_install()}"
        )
        return f"OpenVINO {places[target.device]}; 4-bit weights stay 4-bit; {COMPUTES[target.compute]}; {here}"


def _version() -> str:
    return metadata.version(PACKAGE)


def _machine() -> tuple[str, ...]:
    """OpenVINO's version, and what it says this CPU computes in; nothing where it is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        return ()
    return (_version(), *sorted(load_library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
