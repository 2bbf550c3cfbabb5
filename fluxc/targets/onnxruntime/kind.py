"""The kind `onnxruntime`: graphs for ONNX Runtime on the CPU, in one process or several, or on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from msgspec import UNSET

from fluxc.base.cache import Made
from fluxc.base.errors import RecipeError
from fluxc.graph.stage import ExportInputs
from fluxc.recipe.targets import OnnxRuntimeTarget
from fluxc.targets.base import COMPONENTS, TargetContext, TargetKind, TargetWork
from fluxc.targets.onnxruntime import stage
from fluxc.targets.onnxruntime.forms import CUDA
from fluxc.targets.parts import Weights, place_graphs
from fluxc.targets.probe import Probe
from fluxc.targets.sharding import check_sharding, needs_padding
from fluxrt import manifest as format
from fluxrt.bundle import Bundle


class OnnxRuntime(TargetKind[OnnxRuntimeTarget, format.OnnxRuntimeTarget]):
    """See TargetKind."""

    options = OnnxRuntimeTarget

    def check(self, field: str, target: OnnxRuntimeTarget, context: TargetContext) -> None:
        """Refuse formats that the CUDA provider has no operator for, and a number of processes that cannot share the model."""
        formats = {entry.format for plan in context.source.plans.values() for entry in plan}
        unknown = CUDA.lacking(formats)
        if target.device == "cuda" and unknown:
            raise RecipeError(
                f"{field}.device: ONNX Runtime on CUDA does not compute in {', '.join(unknown)}, as the precision plan asks; "
                f"it computes in {CUDA}. Set precision to those, or leave `device` out to run on the CPU"
            )
        context.decoder().check(field)
        if target.ranks > 1:
            check_sharding(
                f"{field}.gpus",
                target.ranks,
                context.source.transformer,
                context.recipe.text.length,
                context.tokens,
                False,
            )

    def exports(self, target: OnnxRuntimeTarget, context: TargetContext) -> dict[str, ExportInputs]:
        """Whole graphs in fp32; on a GPU those of each kind of block in 16 bits, but for the VAE."""
        for_gpu = target.device == "cuda"
        dtype = target.dtype if for_gpu else "float32"
        found = {}
        for name in COMPONENTS:
            ranks = target.ranks if name == "transformer" else 1
            in_blocks = ranks > 1 or (for_gpu and name != "vae")
            found[name] = context.export(name, dtype if in_blocks else "float32", ranks, composed=not in_blocks)
        return found

    def work(
        self,
        target: OnnxRuntimeTarget,
        context: TargetContext,
        exports: Mapping[str, Made],
        weights: Mapping[str, Weights],
        step_cache: format.StepCache | None,
    ) -> TargetWork:
        """Lowered and bound graphs."""
        inputs = stage.OnnxRuntimeInputs(
            target=target,
            exports=dict(exports),
            weights=dict(weights),
            plans=context.source.plans,
            bodies=context.bodies(target),
            unused=context.source.unused,
            transformer=context.source.transformer,
            text_length=context.recipe.text.length,
            text_layers=context.source.family.text_layers,
            step_cache=context.recipe.step_cache is not None,
            decoder_tiles=context.decoder().tiles,
            padding=needs_padding(target.ranks, list(context.tokens.values())),
        )
        return TargetWork(inputs, stage.run)

    def place(self, entry: format.OnnxRuntimeTarget, folder: Path, staging: Path) -> format.OnnxRuntimeTarget:
        """The graphs; those that are the same to the byte as another target's share its file."""

        return msgspec.structs.replace(entry, graphs=place_graphs(entry.name, entry.graphs, folder, staging))

    def probes(self, bundle: Bundle, entry: format.OnnxRuntimeTarget, threads: int | None) -> Iterable[Probe]:
        """On the CPU, in one process: weights as they are stored, and each variant of the graphs; the faster one, which takes
        more memory, where it has room."""
        from fluxc.targets.onnxruntime.probe import ProbingBackend

        if entry.device == "cpu" and entry.gpus == 1:
            for variant in ("stored", "unsigned", "faster"):
                if variant == "stored" or any(getattr(graph, variant) is not UNSET for graph in entry.graphs.values()):
                    yield ProbingBackend(bundle, entry, threads, variant=variant)

    def describe(self, target: OnnxRuntimeTarget) -> str:
        """Where it runs and how it holds and multiplies weights."""
        if target.device == "cuda":
            return (
                "ONNX Runtime on an NVIDIA GPU of compute capability 9.0 or later; NVFP4 weights 4-bit in memory, dequantized "
                f"by the operator that multiplies; products in {target.dtype}, the VAE in fp32; its graphs are built and "
                "checked here"
            )
        computed = self._describe_exact(target)
        if target.computes_in_int8:
            computed = (
                "products of quantized layers in int8 (weights rounded to int8 rows when they are loaded, inputs to int8 a "
                "token at a time), all others in fp32"
            )
        where = f"in {target.ranks} processes on the CPU" if target.ranks > 1 else "on the CPU"
        return f"ONNX Runtime {where}; {computed}; built and run on this machine"

    def _describe_exact(self, target: OnnxRuntimeTarget) -> str:
        held = (
            f"weights in memory in fp32 where there is room, otherwise as stored (four-bit ones as {target.weights_in_memory} "
            "codes); matrix products in fp32"
        )
        if target.activations == "none":
            return f"{held}; activations in full precision"
        return (
            f"{held}; inputs of NVFP4 and FP8 layers rounded as an FP4 GPU rounds them (block scales from input_scale)"
        )
