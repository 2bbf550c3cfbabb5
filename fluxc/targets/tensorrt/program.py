"""Reads the program inside a serialized plan: which kernels run, on what, for which layers of the graph.

A plan of TensorRT's compiler holds its program as readable text: a header, `descriptors` of tensors, and `main`, one line an
instruction. Observed in TensorRT-RTX 1.7; there is no published grammar, so whatever is not recognised is an error, never a
pass.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fluxc.base.errors import BuildError

BITS = {
    "fp4_e2m1": 4, "fp8_e4m3": 8, "int8": 8, "uint8": 8, "bool": 8,
    "bf16": 16, "half": 16, "fp16": 16, "float": 32, "int32": 32, "int64": 64, "double": 64,
}  # fmt: skip
_PROGRAM = re.compile(rb"header \{\n  version = .*?\nmain \{.*?\n\}\n", re.S)
_UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e]+")
_TENSOR = re.compile(r'^ +tensor=\{.*?dims=\{([^}]*)\}.*? name="([^"]*)".*? region="?([^ "]*)"? .*?type=(\w+)', re.M)
_VIEW = re.compile(r'^ +sub_tensor=\{ base="([^"]*)".*?dims=\{([^}]*)\}.*? name="([^"]*)".*?type=(\w+)', re.M)
_KERNEL = re.compile(r'^  (\w+)=\{ name=(?:"([^"]*)"|(\S+)) (.*?)(?=^  \w+=\{|^\}|\Z)', re.M | re.S)
_REGION = re.compile(r"^  region = \{ name=(\S+) size=(\d+) .*?type=(\w+) place=(\w+) ", re.M)
_QUOTED = re.compile(r'"([^"]*)"')
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a program: its type as the compiler names it, its dimensions (0 where only a run knows them), and the
    tensor it is a view of, or itself."""

    type: str
    dims: tuple[int, ...]
    base: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.dims) * BITS[self.type] // 8


@dataclass(frozen=True)
class Kernel:
    """One instruction that computes: its `kind` (fully_connected, function, ...), name, operands, and the layers in it."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """What a plan runs. `accelerators` are the GPUs it was compiled for ("sm120"), `inputs` the plan's own, `ranks` how many
    GPUs run it together, `working_bytes` the memory it wants beside inputs and outputs, `run_time_regions` the regions of GPU
    memory that are in it by no more than a name, because the plan allocates them while it runs."""

    accelerators: tuple[str, ...]
    ranks: int
    capturable: bool
    inputs: tuple[str, ...]
    tensors: dict[str, Tensor]
    kernels: tuple[Kernel, ...]
    working_bytes: int = 0
    run_time_regions: tuple[str, ...] = ()

    @property
    def is_fragment(self) -> bool:
        """Whether this is a piece that another program calls, compiled for whatever GPU there is."""
        return self.accelerators == ("*",)

    def types(self, names: tuple[str, ...]) -> list[str]:
        """The types of these tensors; BuildError for one that the program does not describe."""
        unknown = [name for name in names if name not in self.tensors]
        if unknown:
            raise BuildError(
                f"the plan does not describe its tensor {unknown[0]!r}; this TensorRT's plans cannot be audited"
            )
        return [self.tensors[name].type for name in names]


def read_programs(plan: bytes) -> list[Program]:
    """The programs in `plan`: one, or one for each optimization profile. BuildError when there is none to be read."""
    programs = [_program(_UNPRINTABLE.sub("\n", found.decode("latin-1"))) for found in _PROGRAM.findall(plan)]
    if not programs:
        raise BuildError(
            "the plan holds no program that can be read, so it cannot be audited; use a version of TensorRT that "
            "docs/tensorrt.md lists"
        )
    return programs


def _program(text: str) -> Program:
    head, _, rest = text.partition("descriptors {")
    described, _, main = rest.partition("\nmain {")
    regions = [(name, int(size), type) for name, size, type, place in _REGION.findall(head) if place == "accelerator"]
    unallocated = tuple(name for name, _, type in regions if type not in ("user", "system"))
    accelerators = re.search(r"accelerators=\{([^}]*)\}", head)
    ranks = re.search(r"^  world_size = (\d+)$", head, re.M)
    inputs = re.search(r"^  inputs=\{([^}]*)\}", head, re.M)
    if accelerators is None or inputs is None or not main:
        raise BuildError("the program inside the plan has another form than is known; it cannot be audited")
    tensors = {name: Tensor(type, _dimensions(dims), name) for dims, name, _, type in _TENSOR.findall(described)}
    for base, dims, name, type in _VIEW.findall(described):
        root = tensors[base].base if base in tensors else base
        tensors[name] = Tensor(type, _dimensions(dims), root)
    return Program(
        accelerators=tuple(sorted(accelerators[1].split())),
        ranks=int(ranks[1]) if ranks else 1,
        capturable="stream_capturable=1" in head and not unallocated,
        inputs=tuple(_QUOTED.findall(inputs[1])),
        tensors=tensors,
        kernels=tuple(_kernel(*found) for found in _KERNEL.findall(main) if found[0] not in ("signal", "wait")),
        working_bytes=sum(size for _, size, type in regions if type == "user"),
        run_time_regions=unallocated,
    )


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(word) if word.isdigit() else 0 for word in text.split())


def _kernel(kind: str, quoted: str, plain: str, rest: str) -> Kernel:
    def operands(*fields: str) -> tuple[str, ...]:
        for field in fields:
            found = re.search(rf"\b{field}=\{{([^}}]*)\}}", rest)
            if found:
                return tuple(_QUOTED.findall(found[1]))
        return ()

    return Kernel(
        kind=kind,
        name=quoted or plain,
        inputs=operands("input_args", "input", "inputs"),
        outputs=operands("output_args", "output", "outputs"),
        layers=tuple(dict.fromkeys(_LAYER.findall(rest))),
    )
