"""Audits a plan by what TensorRT's engine inspector says of it, for a TensorRT whose plans hold no text that can be read.

The inspector gives JSON: `Layers`, each with `Name`, `LayerType`, `Inputs` and `Outputs` (`Name`, `Dimensions`, and
`Format/Datatype` in TensorRT 10, `DataType` from 11 on), `TacticName` and `Metadata`, which names the ONNX nodes in it. It says
so much only of plans built with DETAILED, and needs the GPU: the plan is deserialized.

Documented, and seen in layers that others published; no FP4 plan of full TensorRT was at hand. So the rules of audit.py are
applied to what is recognised, and whatever is not is a fault:

1. A GEMM multiplies in FP4 (FP8) if its operands are: both of them where weights are inputs of the plan, the activation alone
   where the plan holds them, which the inspector does not list, unless its tactic names 16-bit operands.
2. An attention is fused if one layer holds it and is named after a fused attention.
3. Weights are followed by the names of the plan's inputs; a layer that reads one and nothing else copies it.
4. The inspector names no GPU: a plan built here runs here. Nor does it name the number of ranks, so a sharded plan is refused.
   Whether it can be captured is asked when it runs, and steps are launched call by call if not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from fluxc.base.errors import BuildError
from fluxc.targets.tensorrt.audit import Audit, Expected, Runs, compare, moved_weight, worst_of
from fluxrt.backends.library import make_logger

BITS = {"fp4": 4, "fp8": 8, "int8": 8, "bool": 8, "bf16": 16, "half": 16, "float": 32, "int32": 32, "int64": 64}
SPELLINGS = (
    ("fp4", ("fp4", "float4", "e2m1")),
    ("fp8", ("fp8", "float8", "e4m3")),
    ("bf16", ("bf16", "bfloat16")),
    ("half", ("half", "fp16", "float16")),
    ("int8", ("int8",)),
    ("int32", ("int32",)),
    ("int64", ("int64",)),
    ("bool", ("bool",)),
    ("float", ("float", "fp32")),
)
OPERAND = {"nvfp4": "fp4", "fp8": "fp8"}
GEMM_TYPES = ("gemm", "fusion", "matrixmultiply", "caskgemmmatrixmultiply", "fullyconnected")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_WIDE_TACTIC = re.compile(r"f16f16|bf16bf16|f32f32")


@dataclass(frozen=True)
class Tensor:
    """An input or output of a layer: its name, its type as BITS names it, and its dimensions."""

    name: str
    type: str
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(max(size, 0) for size in self.dims) * BITS[self.type] // 8


@dataclass(frozen=True)
class Layer:
    """A layer as TensorRT runs it: `nodes` are the ONNX nodes in it."""

    name: str
    type: str
    tactic: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        return "mha" in self.name.lower() or "mha" in self.tactic.lower()

    @property
    def is_gemm(self) -> bool:
        kind = re.sub(r"[^a-z]", "", self.type.lower())
        return not self.is_attention and (kind in GEMM_TYPES or "gemm" in self.tactic.lower())


def inspect(module: ModuleType, plan: bytes, expected: Expected, compute_capabilities: tuple[str, ...]) -> Audit:
    """Deserialize `plan` on this machine's GPU, ask its inspector, and compare with `expected`.

    Raises BuildError when the plan does not load here, the inspector says too little, or the plan is sharded.
    """
    if expected.collectives:
        raise BuildError("a sharded plan of this TensorRT cannot be audited: its engine inspector names no ranks")
    logger = make_logger(module)
    runtime = module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(f"{module.__name__} {module.__version__} does not load its own plan here: {logger.told()}")
    said = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    working = max(
        int(engine.get_device_memory_size_for_profile_v2(profile))
        for profile in range(max(1, int(engine.num_optimization_profiles)))
    )
    return replace(audit_layers(said, expected, compute_capabilities), working_bytes=working)


def audit_layers(said: str, expected: Expected, compute_capabilities: tuple[str, ...]) -> Audit:
    """Compare what the inspector said, JSON, with `expected`; with several profiles, each of their layers.

    BuildError when it is no such JSON, or holds names alone.
    """
    profiles: dict[str, list[Layer]] = {}
    for layer in read_layers(said):
        found = _PROFILE.search(layer.name)
        profiles.setdefault(found[1] if found else "0", []).append(layer)
    if not profiles:
        raise BuildError("the engine inspector names no layer, so the plan cannot be audited")
    return worst_of([_audit_profile(layers, expected, compute_capabilities) for layers in profiles.values()])


def read_layers(said: str) -> list[Layer]:
    """The layers in the inspector's JSON."""
    try:
        layers = json.loads(said)["Layers"]
        return [_layer(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"the engine inspector's answer is not of the form docs/tensorrt.md describes ({error!r}), so the plan cannot be "
            "audited; the plan must be built with DETAILED profiling verbosity, by a TensorRT of 10 or later"
        ) from error


def _layer(said: Mapping[str, Any]) -> Layer:
    return Layer(
        name=said["Name"],
        type=said["LayerType"],
        tactic=said.get("TacticName", ""),
        inputs=tuple(map(_tensor, said["Inputs"])),
        outputs=tuple(map(_tensor, said["Outputs"])),
        nodes=tuple(dict.fromkeys(_NODE.findall(said.get("Metadata", "")))),
    )


def _tensor(said: Mapping[str, Any]) -> Tensor:
    written = next(said[key] for key in ("DataType", "Datatype", "Format/Datatype", "Format/DataType") if key in said)
    plain = written.lower()
    known = next((type for type, spellings in SPELLINGS if any(s in plain for s in spellings)), None)
    if known is None:
        raise ValueError(f"a tensor of type {written!r}")
    return Tensor(said["Name"], known, tuple(said["Dimensions"]))


def _audit_profile(layers: list[Layer], expected: Expected, compute_capabilities: tuple[str, ...]) -> Audit:
    def runs(name: str) -> Runs | None:
        layer = _layer_of(layers, name)
        if layer is None:
            return None
        return Runs(layer, _format_of(layer, bound=bool(expected.matrices)), f"{layer.type} {layer.tactic}")

    def is_fused(name: str) -> bool:
        return any(layer.is_attention and name in layer.nodes for layer in layers)

    compared = compare(expected, "layer", runs, is_fused)
    copies = list(_copies(layers, expected))
    moved = [moved_weight(layer.name, weight) for layer, weight, _ in copies if weight in expected.matrices]
    return Audit(
        gemms=compared.gemms,
        attentions=compared.fused,
        kernels=len(layers),
        fused_share=compared.share,
        copied_bytes=sum(nbytes for _, _, nbytes in copies),
        compute_capabilities=compute_capabilities,
        faults=tuple(dict.fromkeys((*compared.faults, *moved))),
        read="inspector",
    )


def _layer_of(layers: list[Layer], name: str) -> Layer | None:
    """The layer that computes node `name`: a GEMM before anything else that holds it."""
    holding = [layer for layer in layers if name in layer.nodes]
    return next((layer for layer in holding if layer.is_gemm), holding[0] if holding else None)


def _format_of(layer: Layer, bound: bool) -> str:
    if not layer.is_gemm or not layer.inputs:
        return "bf16"
    types = [tensor.type for tensor in layer.inputs]
    for format, operand in OPERAND.items():
        enough = types.count(operand) >= (2 if bound else 1)
        # Block scales of FP4 are FP8 too, so FP8 operands are looked for where nothing is FP4.
        if types[0] == operand and enough and not _WIDE_TACTIC.search(layer.tactic):
            return format
    return "bf16" if types[0] in ("bf16", "half", "float") else " x ".join(types[:2])


def _copies(layers: Iterable[Layer], expected: Expected) -> Iterator[tuple[Layer, str, int]]:
    """(layer, weight, bytes) of every layer but a GEMM that reads a weight, alone or its values, and writes it elsewhere."""
    weight_of = {name: name for name in (*expected.matrices, *expected.vectors)}
    for layer in layers:
        read = [weight_of[tensor.name] for tensor in layer.inputs if tensor.name in weight_of]
        if not read or layer.is_gemm or layer.is_attention:
            continue
        is_alone = len({tensor.name for tensor in layer.inputs}) == 1 and len(layer.outputs) == 1
        if is_alone:
            weight_of[layer.outputs[0].name] = read[0]
            yield layer, read[0], layer.outputs[0].nbytes
            continue
        for tensor in layer.inputs:
            weight = weight_of.get(tensor.name)
            if weight in expected.dequantized:
                continue
            if weight in expected.matrices and tensor.type in OPERAND.values():
                yield layer, weight, 0
