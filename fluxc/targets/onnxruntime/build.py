"""The `onnxruntime` target: graphs in standard and com.microsoft operators, bound to the components' weights files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from msgspec import UNSET
from msgspec.structs import replace
from onnx import TensorProto

from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef
from fluxc.formats.smoothing import PRE_QUANT_SCALE
from fluxc.graph.bind import argument_names, bind
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.targets import OnnxRuntimeTarget
from fluxc.targets.forms import Forms
from fluxc.targets.onnxruntime.cuda_kernels import check_kernels
from fluxc.targets.onnxruntime.forms import CPU, CUDA, UNFOLDED, LinearForm, in_int8
from fluxc.targets.onnxruntime.fuse import fused
from fluxc.targets.onnxruntime.lower import Lowered, lower_with
from fluxc.targets.unused import check_unused, unused_of_groups
from fluxrt.manifest import Faster, Graph, Port
from fluxrt.unfold import input_names

COMPONENT_OF = {
    "text_encoder": "text_encoder",
    "prologue": "transformer",
    "signal": "transformer",
    "body": "transformer",
    "epilogue": "transformer",
    "vae_decoder": "vae",
    "vae_blend": "vae",
}
FOLDED = 1 << 20
"""Bytes of the largest constant that is folded where a graph is only loaded."""
STORED, UNSIGNED, FASTER = "stored", "unsigned", "faster"
DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.INT64: "int64",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT16: "float16",
}
PRECISIONS = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class BuiltGraph:
    """The bytes-to-be of graph files by name, and their manifest entry, which names them."""

    files: dict[str, onnx.ModelProto]
    entry: Graph


@dataclass(frozen=True)
class Plans:
    """Precision plans by component, and those of bodies beside `body` by their names."""

    components: Mapping[str, list[LayerPlan]]
    bodies: Mapping[str, list[LayerPlan]] = field(default_factory=dict)

    def of(self, graph: str) -> list[LayerPlan]:
        """The plan of the layers of a graph, or of a piece of a body, whose name has a number behind it."""
        stem, _, number = graph.rpartition("-")
        body = stem if number.isdecimal() else graph
        return self.bodies.get(body, self.components.get(COMPONENT_OF[graph.partition("-")[0]], []))


def build_graphs(
    neutral: dict[str, onnx.ModelProto],
    weights: dict[str, dict[str, TensorRef]],
    entries: dict[str, str],
    plans: Plans,
    target: OnnxRuntimeTarget,
    unused: dict[str, tuple[str, ...]],
) -> dict[str, BuiltGraph]:
    """Lower and bind the graphs; those named "body-N" are pieces of the body, and other bodies have names like "body-exact".

    `weights` describes each component's written tensors, `entries` names its weights file or index, `unused` the name
    prefixes no graph needs. Raises BuildError naming tensors that no graph uses, so that nothing is dropped in silence.
    """
    built, bound = {}, {component: set[str]() for component in weights}
    for_gpu = target.device == "cuda"
    for name, model in neutral.items():
        component, arguments = COMPONENT_OF[name.partition("-")[0]], argument_names(model)
        stored = {tensor: ref.dtype for tensor, ref in weights[component].items()}
        planned = {entry.layer.name: entry for entry in plans.of(name)}
        # The VAE stays in fp32: the CUDA provider has no bf16 kernel for Resize.
        dtype = PRECISIONS[target.dtype] if for_gpu and component != "vae" else TensorProto.FLOAT
        variants = {}
        source = model if for_gpu else fused(model)
        for kind, forms in forms_of(target, component).items():
            lowered = lower_with(forms, source, arguments, stored, planned, target.activations, dtype)
            made = {name for entry in lowered.unfolds for name in input_names(entry)}
            bound[component] |= bind(lowered.model, arguments | made, weights[component])
            bound[component] |= {tensor for entry in lowered.unfolds for tensor in entry.tensors}
            variants[kind] = lowered
        built[name] = _described(name, component, f"{component}/{entries[component]}", variants, arguments)
        if for_gpu:
            check_kernels(name, variants[STORED].model)
    for component, tensors in weights.items():
        ignored = unused.get(component, ())
        plan = plans.components.get(component, [])
        rightly_unused = _unused_input_scales(plan, bound[component], target.activations)
        rightly_unused |= unused_of_groups(plan, PRE_QUANT_SCALE, bound[component])
        check_unused(component, [t for t in tensors if t not in bound[component] and t not in rightly_unused], ignored)
    return built


def forms_of(target: OnnxRuntimeTarget, component: str) -> dict[str, Forms[LinearForm]]:
    """The forms of Linears, by what distinguishes a graph file from its component's others."""
    if target.device == "cuda":
        return {STORED: CUDA}
    if target.computes_in_int8:
        every_step = component == "transformer"
        return {STORED: in_int8(True, every_step), UNSIGNED: in_int8(False, every_step)}
    return {STORED: CPU[target.weights_in_memory], FASTER: UNFOLDED}


def _described(
    name: str, component: str, weights: str, variants: Mapping[str, Lowered], arguments: set[str]
) -> BuiltGraph:
    """The graph files of `variants`; those without a Linear are one."""
    first = variants[STORED]
    files = {f"{component}/{name}.onnx": first.model}
    entry = Graph(
        file=f"{component}/{name}.onnx",
        weights=weights,
        inputs=tuple(port_of(value) for value in first.model.graph.input if value.name in arguments),
        outputs=tuple(port_of(value) for value in first.model.graph.output),
        unfold=first.unfolds or UNSET,
    )
    for kind in (UNSIGNED, FASTER):
        if kind not in variants or not variants[kind].unfolds:
            continue
        file = f"{component}/{name}.{kind}.onnx"
        if kind == FASTER:
            entry = replace(entry, faster=Faster(file, variants[kind].unfolds))
        elif any(unfold.form == "int8" for unfold in first.unfolds):
            entry = replace(entry, unsigned=file)
        else:
            continue
        files[file] = variants[kind].model
    return BuiltGraph(files, entry)


def _unused_input_scales(plan: list[LayerPlan], bound: set[str], activations: str) -> set[str]:
    """The input scales a graph rightly leaves alone: all of them when activations are not rounded, else those of fusion
    group members whose common input is rounded with another member's, equal, scale."""
    if activations == "none":
        return {f"{entry.layer.name}.input_scale" for entry in plan}
    return unused_of_groups(plan, "input_scale", bound)


def check_loads(folder: Path, files: list[str], for_gpu: bool = False) -> None:
    """Make a session of every graph; BuildError with ONNX Runtime's own words if one does not load.

    A graph for a GPU is loaded, typed and checked against every operator's schema here too; that the CPU has no kernel for
    it is how far it can come.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Whether a graph loads does not depend on it, and folded weights take up to ten times the memory of the file.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(FOLDED))
    for file in files:
        try:
            onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        except NoKernel as error:
            if not for_gpu:
                raise BuildError(
                    f"{file}: ONNX Runtime {onnxruntime.__version__} has no kernel for it: {error}"
                ) from error
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BuildError(f"{file}: ONNX Runtime {onnxruntime.__version__} does not load it: {error}") from error


def port_of(value: onnx.ValueInfoProto) -> Port:
    """A graph's input or output as the manifest has it."""
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return Port(value.name, DTYPES[tensor.elem_type], shape)
