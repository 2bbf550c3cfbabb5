"""`fluxc export-onnx --for tensorrt`: whole graphs that plain trtexec builds, for those who do not use fluxrt.

Each stage of a TensorRT target's programs becomes one graph: its calls put together in order, their weights external
initializers in copies of the bundle's weights files.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.output import check_output, names_place
from fluxc.base.progress import StageProgress
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.graph import OPSET
from fluxc.graph.values import inline, renamed
from fluxc.targets.tensorrt.nodes import TRT_DOMAIN
from fluxrt.bundle import Bundle
from fluxrt.errors import RequestError
from fluxrt.manifest import Engine, TensorRTTarget, WeightPort, dimension_size
from fluxrt.weights import weights_files


def export_onnx(bundle: Bundle, target: str | None, out: Path, progress: StageProgress | None = None) -> list[str]:
    """Write the graphs and weights of `target` (the first TensorRT target by default) into the new folder `out`.

    Returns the trtexec command that builds each. Raises RecipeError when `out` exists, RequestError when there is
    no such target.
    """
    check_output(out, "an export", is_folder=True)
    if out.exists():
        raise RecipeError(
            f"{out}: exists; give a folder that does not, so that nothing in it is taken for part of the export"
        )
    targets = [t for t in bundle.manifest.targets if isinstance(t, TensorRTTarget)]
    engines = {t.name: t.engine for t in targets if not t.sharding}
    name = next(iter(engines), None) if target is None else target
    if name not in engines:
        named = "" if target is None else f" {target!r}"
        known = ", ".join(engines) or "none"
        raise RequestError(f"{bundle.root}: no TensorRT target{named} for one GPU in this bundle; it has: {known}")
    engine = engines[name]
    if any(not plan.weights and plan.expected["gemms"] for plan in engine.plans.values()):
        raise BuildError(
            f"{bundle.root}: the plans of this target have their weights baked in; export from a target with weights: bound"
        )
    with names_place("export", out), (progress or StageProgress()).stage("write graphs and weights"):
        return _export(bundle, engine, out)


def _export(bundle: Bundle, engine: Engine, out: Path) -> list[str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=out.resolve().parent))
    try:
        commands = []
        for stage in engine.programs:
            model = whole_graph(bundle, engine, stage)
            (scratch / f"{stage}.onnx").write_bytes(model.SerializeToString(deterministic=True))
            commands.append(_command(stage, model, profile_of(engine, stage)))
        for program in engine.programs.values():
            for file in weights_files(bundle, program.weights):
                copy = scratch / file.relative_to(bundle.root)
                if not copy.exists():
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copy)
        scratch.chmod(0o755)
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return commands


def whole_graph(bundle: Bundle, engine: Engine, stage: str) -> onnx.ModelProto:
    """The calls of a stage's program as one graph; what no call gives is its input, and its results its outputs."""
    program = engine.programs[stage]
    tensors = {name: ref for file in weights_files(bundle, program.weights) for name, ref in read_header(file).items()}
    sources = {call.plan: onnx.load(bundle.checked_file(engine.plans[call.plan].source)) for call in program.calls}
    last = {
        call.buffers.get(port.name, port.name): number
        for number, call in enumerate(program.calls)
        for port in engine.plans[call.plan].outputs
    }
    results = set(program.outputs)
    graph = onnx.GraphProto(name="fluxc")
    held: dict[str, str] = {}
    bound: set[str] = set()
    for number, call in enumerate(program.calls):
        plan, source = engine.plans[call.plan], sources[call.plan].graph
        names: dict[str, str] = {}
        for value in source.input:
            weight = next((port for port in plan.weights if port.name == value.name), None)
            if weight is not None:
                names[value.name] = name = call.prefix + value.name
                if name not in bound:
                    graph.initializer.append(_external(bundle, tensors, call.prefix, weight, value))
                    bound.add(name)
                continue
            buffer = call.buffers.get(value.name, value.name)
            if buffer not in held:
                held[buffer] = buffer
                graph.input.append(renamed(value, buffer))
            names[value.name] = held[buffer]
        for value in source.output:
            buffer = call.buffers.get(value.name, value.name)
            is_result = buffer in results and last[buffer] == number
            names[value.name] = held[buffer] = buffer if is_result else f"{number}/{buffer}"
            if is_result:
                graph.output.append(renamed(value, buffer))
        inline(graph, source, names, f"{number}/")
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(TRT_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11, producer_name="fluxc")


def _external(
    bundle: Bundle, tensors: dict[str, TensorRef], prefix: str, weight: WeightPort, value: onnx.ValueInfoProto
) -> TensorProto:
    """The tensors of a port as one initializer; they lie end to end in the weights file."""
    refs = [tensors[prefix + name] for name in weight.tensors]
    for one, following in itertools.pairwise(refs):
        if one.file != following.file or one.offset + one.nbytes != following.offset:
            raise BuildError(
                f"{following.name}: it does not follow {one.name} in the weights file, so both cannot be one initializer; "
                "build the bundle from a checkpoint that is not quantized already"
            )
    tensor = TensorProto(name=prefix + weight.name, data_location=TensorProto.EXTERNAL)
    tensor.data_type = value.type.tensor_type.elem_type
    tensor.dims.extend(weight.shape)
    place = {
        "location": refs[0].file.relative_to(bundle.root).as_posix(),
        "offset": str(refs[0].offset),
        "length": str(sum(ref.nbytes for ref in refs)),
    }
    for key, text in place.items():
        tensor.external_data.add(key=key, value=text)
    return tensor


def _command(stage: str, model: onnx.ModelProto, profile: dict[str, tuple[int, int, int]]) -> str:
    """The trtexec command line that builds a stage, for its first optimization profile."""
    command = f"trtexec --onnx={stage}.onnx --saveEngine={stage}.plan --stronglyTyped"
    for at, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = []
        for value in model.graph.input:
            dimensions = value.type.tensor_type.shape.dim
            if any(d.dim_param for d in dimensions):
                bound = {symbol: sizes[at] for symbol, sizes in profile.items()}
                sizes = [dimension_size(d.dim_param or d.dim_value, bound) for d in dimensions]
                shapes.append(f"{value.name}:{'x'.join(map(str, sizes))}")
        command += f" --{option}={','.join(shapes)}" if shapes else ""
    return command


def profile_of(engine: Engine, stage: str) -> dict[str, tuple[int, int, int]]:
    """What every dimension of a stage counts: the first profile of each of its plans."""
    found: dict[str, tuple[int, int, int]] = {}
    for call in engine.programs[stage].calls:
        for profile in engine.plans[call.plan].profiles[:1]:
            found.update(profile)
    return found
