"""Checks that a plan computes as the precision plan says, by reading the program the compiler put into it.

1. Every Linear planned nvfp4 is a GEMM of two fp4_e2m1 operands, fp8 one of two fp8_e4m3 operands, nvfp4-w4a16 one in bf16;
   every bf16 one is there.
2. Every fusion group is one GEMM.
3. Every attention is one fused kernel.
4. The plan runs on the GPUs it was asked for and on no others, it can be captured in a CUDA graph, and all the memory it works
   in is stated: no region of it is allocated while it runs.
5. Of bound weights, a run copies block scales and vectors only, never a quantized or a Linear's weight; only those planned
   nvfp4-w4a16 are read by a kernel that is no GEMM, which dequantizes them.
6. Every collective is there, of the kind and among as many ranks as asked for. TensorRT has been reported to forget the number
   of ranks when a plain attention follows; such a plan loads, and its collectives do nothing.

Kinds of findings: `missing` (no kernel computes the layer), `format` (it runs in another one), `group` (a fusion group is
several GEMMs), `attention` (not one fused kernel), `copy` (a run moves the whole weight); and, of the plan itself, `gpus`,
`capture`, `allocation` (working memory that is allocated while it runs), `ranks`, `collective`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import multiplied_in
from fluxc.targets.findings import Finding
from fluxc.targets.tensorrt.program import Kernel, Program, Tensor, read_programs

OPERAND = {"nvfp4": "fp4_e2m1", "fp8": "fp8_e4m3"}
GEMM_KINDS = ("fully_connected",)
ALL_TO_ALL = "comm_alltoall"
_APPENDED = re.compile(r"( \[profile \d+\])?(_U\d+)?$")
"""What the compiler appends to the names it takes over."""


@dataclass(frozen=True)
class Expected:
    """What a plan must be: GEMMs with their formats, the groups that are one GEMM, attention nodes, the inputs that hold
    weights of Linears (`matrices`) or anything else that is bound (`vectors`), and the all-to-alls among `ranks` GPUs.

    Of `matrices` those in `dequantized` are read by a kernel of their own at every run, as they are planned.
    """

    gemms: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]
    attentions: tuple[str, ...]
    matrices: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    collectives: tuple[str, ...] = ()
    ranks: int = 1
    dequantized: tuple[str, ...] = ()


WAIVABLE = ("missing", "format", "group", "attention", "copy")
"""Kinds of findings that cost speed or precision of a layer; anything else means another plan than was asked for."""


@dataclass(frozen=True)
class Audit:
    """What was found in a plan: GEMMs by format as they run, fused attentions, kernels a run, bytes of weights a run copies,
    collectives, bytes of working memory, and in `faults` everything that is not as it must be, naming the layer.

    `read` says where: in the plan's "program", or with the engine "inspector" (inspector.py).
    """

    gemms: dict[str, int]
    attentions: int
    kernels: int
    fused_share: float
    copied_bytes: int
    compute_capabilities: tuple[str, ...]
    faults: tuple[Finding, ...] = field(default=())
    collectives: int = 0
    working_bytes: int = 0
    read: str = "program"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def audit(plan: bytes, expected: Expected, compute_capabilities: tuple[str, ...]) -> Audit:
    """Read `plan` and compare it with `expected`, for these GPUs ("12.0"); with several profiles, each of their programs.

    Raises BuildError when the plan cannot be read; what is wrong in it comes back in `faults`.
    """
    programs = read_programs(plan)
    whole = [program for program in programs if not program.is_fragment]
    audits = [_audit_program(program, expected, compute_capabilities) for program in whole]
    return worst_of(audits)


def worst_of(audits: list[Audit]) -> Audit:
    """Of the audits of a plan's profiles the worst, with the faults of all and the most working memory."""
    faults = tuple(dict.fromkeys(fault for found in audits for fault in found.faults))
    worst = max(audits, key=lambda found: (len(found.faults), found.copied_bytes))
    working = max(found.working_bytes for found in audits)
    return replace(worst, faults=faults, working_bytes=working)


@dataclass(frozen=True)
class Runs:
    """What runs an ONNX node in a plan: itself, the format it multiplies in, and what it is in words."""

    by: Hashable
    format: str
    kind: str


@dataclass(frozen=True)
class Compared:
    """GEMMs by format, fused attentions, their share of what was planned, and the faults."""

    gemms: dict[str, int]
    fused: int
    share: float
    faults: tuple[Finding, ...]


def compare(
    expected: Expected, noun: str, runs: Callable[[str], Runs | None], is_fused: Callable[[str], bool]
) -> Compared:
    """GEMMs, their groups and attentions of a plan against `expected`; `noun` is what it consists of, kernels or layers."""
    faults: list[Finding] = []
    gemms: dict[str, int] = {}
    by: dict[str, Hashable] = {}
    for name, format in expected.gemms.items():
        found = runs(name)
        if found is None:
            faults.append(Finding("missing", (name,), f"no {noun} of the plan computes it"))
            continue
        by[name] = found.by
        gemms[found.format] = gemms.get(found.format, 0) + 1
        # A weight that is planned in bf16 may be multiplied in something wider.
        if format != BF16 and found.format != multiplied_in(format):
            faults.append(Finding("format", (name,), f"planned {format}, runs as {found.format} ({found.kind})"))
    for group in expected.groups:
        count = len({by[name] for name in group if name in by})
        if count > 1:
            faults.append(Finding("group", group, f"{count} GEMMs instead of one"))
    apart = [name for name in expected.attentions if not is_fused(name)]
    faults += [Finding("attention", (name,), "attention is not one fused kernel") for name in apart]
    fused = len(expected.attentions) - len(apart)
    wanted = len(expected.gemms) + len(expected.attentions)
    good = sum(gemms.values()) + fused - sum(1 for finding in faults if finding.kind == "format")
    share = round(good / wanted, 4) if wanted else 1.0
    return Compared(dict(sorted(gemms.items())), fused, share, tuple(faults))


def moved_weight(by: str, weight: str) -> Finding:
    """That `by`, a kernel or layer, copies a whole weight."""
    layer = weight.partition("+")[0].removesuffix(".weight")
    return Finding("copy", (layer,), f"{by} moves the whole weight {weight} at every run")


def _audit_program(program: Program, expected: Expected, compute_capabilities: tuple[str, ...]) -> Audit:
    faults: list[Finding] = []
    found = tuple(_capability(name) for name in program.accelerators)
    if set(found) != set(compute_capabilities):
        asked = ", ".join(compute_capabilities)
        faults.append(Finding("gpus", (), f"runs on {', '.join(found)}, asked for {asked}"))
    for region in program.run_time_regions:
        text = (
            f"allocates its memory region {region} while it runs, so its working memory is unknown and no CUDA graph can hold "
            "it; build for smaller sizes, with shapes: profiles, or with a TensorRT whose builder has REQUIRE_USER_ALLOCATION "
            "(TensorRT-RTX 1.7)"
        )
        faults.append(Finding("allocation", (), text))
    if not program.capturable and not program.run_time_regions:
        faults.append(Finding("capture", (), "cannot be captured in a CUDA graph"))

    def runs(name: str) -> Runs | None:
        kernel = _gemm_of(program, name)
        return None if kernel is None else Runs(kernel, _format_of(program, kernel), kernel.kind)

    def is_fused(name: str) -> bool:
        return any("mha" in kernel.name and name in kernel.layers for kernel in program.kernels)

    compared = compare(expected, "kernel", runs, is_fused)
    faults += compared.faults
    copies = list(_copies(program, expected))
    moved = [(kernel, weight) for kernel, weight, _ in copies if weight in expected.matrices]
    for kernel, weight in dict.fromkeys([*moved, *_read_outside(program, expected)]):
        faults.append(moved_weight(kernel.name, weight))
    collectives = [kernel for kernel in program.kernels if kernel.kind.startswith("comm_")]
    faults += _collective_faults(program.ranks, collectives, expected)
    return Audit(
        gemms=compared.gemms,
        attentions=compared.fused,
        kernels=len(program.kernels),
        fused_share=compared.share,
        copied_bytes=sum(nbytes for _, _, nbytes in copies),
        compute_capabilities=found,
        faults=tuple(faults),
        collectives=len(collectives),
        working_bytes=program.working_bytes,
    )


def _collective_faults(ranks: int, found: list[Kernel], expected: Expected) -> Iterable[Finding]:
    if expected.collectives and ranks != expected.ranks:
        text = f"the plan is for {ranks} ranks, not {expected.ranks}: its collectives would do nothing, or hang"
        yield Finding("ranks", (), text)
    kinds = {_APPENDED.sub("", kernel.name): kernel.kind for kernel in found}
    for name in expected.collectives:
        if kinds.get(name) != ALL_TO_ALL:
            instead = kinds.get(name, "nothing")
            yield Finding("collective", (name,), f"planned as an all-to-all, the plan has {instead} in its place")
    for name in kinds.keys() - set(expected.collectives):
        yield Finding("collective", (name,), "a collective that was not asked for")


def _gemm_of(program: Program, name: str) -> Kernel | None:
    """The kernel that computes node `name`: a GEMM named after it, alone or merged with others, else one that holds it."""
    for kernel in program.kernels:
        if kernel.kind in GEMM_KINDS and name in kernel.name.split("+"):
            return kernel
    holding = [kernel for kernel in program.kernels if name in kernel.layers]
    return next((k for k in holding if k.kind in GEMM_KINDS), holding[0] if holding else None)


def _format_of(program: Program, kernel: Kernel) -> str:
    if kernel.kind not in GEMM_KINDS:
        return "bf16"
    types = program.types(kernel.inputs[:2])
    for format, operand in OPERAND.items():
        if types == [operand, operand]:
            return format
    return "bf16" if len(set(types)) == 1 else " x ".join(types)


def _copies(program: Program, expected: Expected) -> Iterable[tuple[Kernel, str, int]]:
    """(kernel, weight, bytes) of every kernel that writes a weight to another place: it reads nothing else."""
    weight_of = {f"{name}.1": name for name in (*expected.matrices, *expected.vectors)}
    for kernel in program.kernels:
        bases = {_base(program, name) for name in kernel.inputs}
        if len(bases) == 1 and len(kernel.outputs) == 1 and (base := bases.pop()) in weight_of:
            written = program.tensors.get(kernel.outputs[0], Tensor("float", (), ""))
            weight_of[_base(program, kernel.outputs[0])] = weight_of[base]
            yield kernel, weight_of[base], written.nbytes


def copying_kernels(plan: bytes, expected: Expected) -> set[str]:
    """Names of the kernels of `plan` that do nothing but write a weight to another place; BuildError if it cannot be read."""
    programs = [program for program in read_programs(plan) if not program.is_fragment]
    return {kernel.name for program in programs for kernel, _, _ in _copies(program, expected)}


def _read_outside(program: Program, expected: Expected) -> Iterable[tuple[Kernel, str]]:
    """(kernel, weight) of every kernel but a GEMM that reads quantized values of a Linear, alone or with something else, unless
    that is planned."""
    weight_of = {f"{name}.1": name for name in expected.matrices if name not in expected.dequantized}
    for kernel in program.kernels:
        for name in kernel.inputs if kernel.kind not in GEMM_KINDS else ():
            tensor = program.tensors.get(name)
            if tensor is not None and tensor.base in weight_of and tensor.type in OPERAND.values():
                yield kernel, weight_of[tensor.base]


def _base(program: Program, name: str) -> str:
    return program.tensors[name].base if name in program.tensors else name


def _capability(accelerator: str) -> str:
    digits = accelerator.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"
