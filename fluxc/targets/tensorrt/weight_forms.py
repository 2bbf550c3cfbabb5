"""Which form TensorRT multiplies in FP4: weights as a plan's inputs, or inside it. `fluxc finish` tries one block both ways.

1. The plan of the most NVFP4 GEMMs is built as it is, and once more with the weights of the first block that runs it inside.
2. A form is good if every NVFP4 Linear is a GEMM of FP4 operands and no whole weight is copied at a run.
3. Inputs are kept where they are good, as the recipe asked; else the plans of every block are built with its weights inside, if
   that is good. Where neither is, inputs are kept, and their faults are the error.
4. Where the GPU can be opened, both are timed and the times are said. They decide nothing: weights inside plans are a second
   copy of those in the bundle, which the recipe did not ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
import onnx
from onnx import TensorProto

from fluxc.targets.tensorrt.audit import Audit, Expected
from fluxrt.manifest import Call, Engine, Plan, Program, WeightPort
from fluxrt.weights import StoredTensor

Form = Literal["inputs", "inside"]
Weights = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Baked:
    """A plan that gets weights inside: the plan it is made of, whose weights are inputs, and which they are."""

    plan: Plan
    prefix: str
    weights: str


@dataclass(frozen=True)
class Tried:
    """One block in one form: what its plan is, and seconds a run, None where nothing was timed."""

    audit: Audit
    seconds: float | None = None


@dataclass(frozen=True)
class Choice:
    """The form that is kept, and why, in a sentence for the user."""

    form: Form
    why: str


def block_to_try(engine: Engine) -> tuple[str, Baked] | None:
    """The unfinished plan of the most NVFP4 GEMMs whose weights are inputs, and the first call's weights to put inside; None
    where there is none, or all run on several GPUs, where neither form can be tried alone."""
    able = {
        name: sum(format == "nvfp4" for format in plan.expected["gemms"].values())
        for name, plan in engine.plans.items()
        if takes_fp4(plan) and plan.file is None and not plan.expected.get("collectives")
    }
    if not able:
        return None
    name = max(able, key=lambda found: able[found])
    program, call = next((p, c) for p in engine.programs.values() for c in p.calls if c.plan == name)
    return name, Baked(engine.plans[name], call.prefix, program.weights)


def takes_fp4(plan: Plan) -> bool:
    """Whether NVFP4 weights are inputs of the plan."""
    return bool(plan.weights) and "nvfp4" in plan.expected.get("gemms", {}).values()


def choose(name: str, inputs: Tried, inside: Tried) -> Choice:
    """3, for plan `name`."""
    good = {"inputs": _is_good(inputs.audit), "inside": _is_good(inside.audit)}
    times = ""
    if inputs.seconds is not None and inside.seconds is not None:
        took = [f"{1e3 * seconds:.3f} ms" for seconds in (inputs.seconds, inside.seconds)]
        times = f"; a run takes {took[0]} with weights as inputs, {took[1]} with them inside"
    if good["inputs"]:
        also = "so are they inside a plan" if good["inside"] else "inside a plan they are not"
        return Choice("inputs", f"{name}: weights as inputs are FP4 GEMMs and stay inputs ({also}){times}")
    if good["inside"]:
        instead = _instead(inputs.audit)
        why = f"{name}: weights are FP4 GEMMs only inside a plan, so every block gets one (as inputs, {instead})"
        return Choice("inside", why + times)
    return Choice(
        "inputs", f"{name}: weights are no FP4 GEMMs, as inputs or inside (there, {_instead(inside.audit)}){times}"
    )


def _is_good(audit: Audit) -> bool:
    return not any(fault.kind in ("missing", "format", "copy") for fault in audit.faults)


def _instead(audit: Audit) -> str:
    return str(next(fault for fault in audit.faults if fault.kind in ("missing", "format", "copy")))


def with_weights_inside(engine: Engine, target: str) -> tuple[Engine, dict[str, Baked]]:
    """`engine` with a plan of its own for each call of one that takes FP4 weights, to be built, and what those are made of.

    Plan "single" becomes single.0, single.1 and so on, in the order they run.
    """
    baked: dict[str, Baked] = {}
    programs = {}
    for stage, program in engine.programs.items():
        calls = []
        for call in program.calls:
            plan = engine.plans[call.plan]
            if not takes_fp4(plan):
                calls.append(call)
                continue
            made = Baked(plan, call.prefix, program.weights)
            name = next((n for n, known in baked.items() if known == made and n.rpartition(".")[0] == call.plan), None)
            if name is None:
                name = f"{call.plan}.{sum(n.rpartition('.')[0] == call.plan for n in baked)}"
                baked[name] = made
            calls.append(Call(name, "", call.buffers))
        programs[stage] = Program(program.weights, tuple(calls), program.outputs)
    plans = {name: plan for name, plan in engine.plans.items() if not takes_fp4(plan)}
    plans |= {name: _entry(made, name, target) for name, made in baked.items()}
    return msgspec.structs.replace(engine, plans=plans, programs=programs), baked


def _entry(made: Baked, name: str, target: str) -> Plan:
    # External data must lie beside or below the graph that points to it.
    folder = made.weights.rpartition("/")[0]
    source = f"{folder}/{target}-{name}.onnx".removeprefix("/")
    expected = msgspec.to_builtins(expected_inside(made.plan))
    return msgspec.structs.replace(made.plan, source=source, weights=(), expected=expected)


def expected_inside(plan: Plan) -> Expected:
    """What the plan must be with its weights inside: none of its inputs is a weight."""
    expected = msgspec.convert(plan.expected, Expected)
    return Expected(expected.gemms, expected.groups, expected.attentions)


def bake(model: onnx.ModelProto, made: Baked, stored: Weights, inline: bool = True) -> onnx.ModelProto:
    """`model`, the graph of the plan that `made` is of, with the weights as initializers: their bytes `inline`, or else places
    in the weights files beside it. Tensors of one input that do not lie end to end there are bytes in any case."""
    baked = onnx.ModelProto.FromString(model.SerializeToString())
    graph = baked.graph
    declared = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for port in made.plan.weights:
        parts = [stored[made.prefix + tensor] for tensor in port.tensors]
        graph.initializer.append(_initializer(port, declared[port.name], parts, inline))
    names = {port.name for port in made.plan.weights}
    arguments = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.input if v.name not in names]
    del graph.input[:]
    graph.input.extend(arguments)
    return baked


def _initializer(port: WeightPort, element: int, parts: list[StoredTensor], inline: bool) -> TensorProto:
    tensor = TensorProto(name=port.name, data_type=element, dims=port.shape)
    first = parts[0]
    ends = [part.offset + part.nbytes for part in parts]
    is_one = all(a.file == b.file and end == b.offset for a, b, end in zip(parts, parts[1:], ends, strict=False))
    if inline or not is_one:
        tensor.raw_data = b"".join(part.read().tobytes() for part in parts)
        return tensor
    tensor.data_location = TensorProto.EXTERNAL
    place = (("location", first.file.name), ("offset", str(first.offset)), ("length", str(ends[-1] - first.offset)))
    for key, value in place:
        tensor.external_data.add(key=key, value=value)
    return tensor
