"""The targets of a recipe: a struct for each kind, with the options that mean something for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import msgspec

from fluxc.recipe.fields import Count, about

Refuse = Callable[[str, str], None]
"""Notes that a field cannot be, and why."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """What to compile for. `kind` in the recipe says which struct an entry is; its fields are the kind's options.

    What a build asks of a target of any kind is answered here as for one that is only made, not run, where it is built.
    """

    in_name: ClassVar[tuple[str, ...]] = ()
    """Options whose value is part of the name, where it is not the default."""

    @property
    def kind(self) -> str:
        """The word that a recipe uses."""
        return kind_name(type(self))

    @property
    def name(self) -> str:
        """What the bundle calls it: the kind, and what distinguishes it from others of its kind."""
        fields = {field.name: field for field in msgspec.structs.fields(self)}
        chosen = [getattr(self, option) for option in self.in_name if getattr(self, option) != fields[option].default]
        return "-".join([self.kind, *chosen, *([f"{self.ranks}gpus"] if self.ranks > 1 else [])])

    @property
    def ranks(self) -> int:
        """How many ranks its graphs are sharded for; 1 where another program divides the work."""
        return 1

    @property
    def runs_here(self) -> bool:
        """Whether the machine that builds can generate with it in one process, so that it is compared with diffusers."""
        return False

    @property
    def in_one(self) -> Target | None:
        """The target of one process which images of its several processes are compared with, if those run here."""
        return None

    @property
    def exact(self) -> Target | None:
        """The same target computing in fp32, if this one runs here and computes in fewer bits. Where a recipe has both, their
        velocities are compared."""
        return None

    @property
    def computes_in_int8(self) -> bool:
        """Whether products of quantized layers are computed in int8."""
        return False

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of NVFP4 and FP8 layers are rounded to the weights' format."""
        return False

    @property
    def one_precision(self) -> str:
        """Why steps cannot differ in precision, although it rounds inputs; empty where they can."""
        return ""

    @property
    def activation_bytes(self) -> int:
        """Bytes of a value that layers exchange."""
        return 2

    @property
    def runs_graphs(self) -> bool:
        """Whether fluxrt runs the bundle's graphs or engines with it; otherwise another program generates in its own way."""
        return True

    def check(self, field: str, refuse: Refuse) -> None:
        """Refuse options that do not go together, whatever the checkpoint; `field` is the target in the recipe."""


class ShardedTarget(Target, frozen=True):
    """A target whose transformer can be sharded by sequence (Ulysses)."""

    gpus: Annotated[
        Count,
        about(
            "shards the transformer for so many GPUs, or with `onnxruntime` on the CPU for so many processes; see "
            "[several GPUs](multi-gpu.md)",
            2,
        ),
    ] = 1

    @property
    def ranks(self) -> int:
        """One for each GPU or process."""
        return self.gpus


class OnnxRuntimeTarget(ShardedTarget, frozen=True, tag="onnxruntime"):
    """Graphs for ONNX Runtime, on the CPU or on an NVIDIA GPU."""

    device: Annotated[
        Literal["cpu", "cuda"],
        about(
            "where it runs: `cuda` is for an NVIDIA GPU of compute capability 9.0 or later, with 4-bit weights", "cuda"
        ),
    ] = "cpu"
    dtype: Annotated[Literal["bfloat16", "float16"], about("on CUDA: what activations are computed in", "float16")] = (
        "bfloat16"
    )
    activations: Annotated[
        Literal["none", "nvfp4"],
        about("on the CPU: `nvfp4` rounds the inputs of NVFP4 and FP8 layers as an FP4 GPU does", "nvfp4"),
    ] = "none"
    weights_in_memory: Annotated[
        Literal["8-bit", "4-bit"],
        about("on the CPU: `4-bit` halves the memory of weights of four bits, and takes longer", "4-bit"),
    ] = "8-bit"

    compute: Annotated[
        Literal["exact", "int8"] | None,
        about(
            "on the CPU: `exact` multiplies in fp32; `int8` rounds weights of quantized layers to int8 rows, and their inputs "
            "to int8 a token at a time, and is several times as fast ([performance](performance.md))",
            "exact",
            left_out="`int8`; `exact` with `activations: nvfp4` or `weights_in_memory: 4-bit`",
        ),
    ] = None

    in_name = ("device", "dtype", "activations", "weights_in_memory", "compute")

    @property
    def computes_in_int8(self) -> bool:
        """Whether products of quantized layers are computed in int8."""
        if self.compute is None:
            return self.device == "cpu" and not self.rounds_inputs and self.weights_in_memory == "8-bit"
        return self.compute == "int8"

    @property
    def runs_here(self) -> bool:
        """On the CPU, in one process."""
        return self.device == "cpu" and self.gpus == 1

    @property
    def in_one(self) -> Target | None:
        """On the CPU, the same without `gpus`."""
        return msgspec.structs.replace(self, gpus=1) if self.device == "cpu" and self.gpus > 1 else None

    @property
    def exact(self) -> Target | None:
        """With `compute: exact`."""
        return msgspec.structs.replace(self, compute="exact") if self.runs_here and self.computes_in_int8 else None

    @property
    def rounds_inputs(self) -> bool:
        """Where `activations` asks for it."""
        return self.activations != "none"

    @property
    def activation_bytes(self) -> int:
        """fp32 on the CPU, 16 bits on a GPU."""
        return 4 if self.device == "cpu" else 2

    def check(self, field: str, refuse: Refuse) -> None:
        """Options of the other device, and ranks on a GPU."""
        usual = OnnxRuntimeTarget()
        on_cpu = ("activations", "weights_in_memory", "compute")
        for option, device in (*((option, "cpu") for option in on_cpu), ("dtype", "cuda")):
            if self.device != device and getattr(self, option) != getattr(usual, option):
                refuse(f"{field}.{option}", f"goes with device: {device}")
        for option in ("activations", "weights_in_memory"):
            if self.compute == "int8" and getattr(self, option) != getattr(usual, option):
                refuse(f"{field}.{option}", "goes with compute: exact")
        if self.gpus > 1 and self.device == "cuda":
            refuse(
                f"{field}.gpus",
                "ONNX Runtime has no collectives for device: cuda; use a tensorrt target, or device: cpu",
            )


class OpenVinoTarget(Target, frozen=True, tag="openvino"):
    """Graphs for OpenVINO, on a CPU, or on a GPU or an NPU of Intel."""

    device: Annotated[
        Literal["CPU", "GPU", "NPU", "AUTO"],
        about("where it runs; `AUTO` is a GPU of Intel where there is one, or else the CPU", "GPU"),
    ] = "CPU"
    compute: Annotated[
        Literal["exact", "bf16", "fp16", "int8", "int8-bf16"],
        about(
            "what it computes in: `exact` is fp32; `int8` rounds weights that are quantized, and their inputs, to 8 bits, and "
            "computes all else in fp32, `int8-bf16` in bf16. Where the machine lacks it, fp32 is used, which is said",
            "bf16",
        ),
    ] = "exact"
    performance: Annotated[
        Literal["latency", "throughput"],
        about("OpenVINO's hint of that name; see [OpenVINO](openvino.md)", "throughput"),
    ] = "latency"

    in_name = ("device", "compute", "performance")

    @property
    def computes_in_int8(self) -> bool:
        """As `compute` says."""
        return self.compute.startswith("int8")

    @property
    def exact(self) -> Target | None:
        """With `compute: exact`."""
        return msgspec.structs.replace(self, compute="exact") if self.runs_here and self.compute != "exact" else None

    @property
    def runs_here(self) -> bool:
        """On the CPU."""
        return self.device == "CPU"

    @property
    def dtype(self) -> str:
        """The type of values between layers."""
        return {"bf16": "bfloat16", "int8-bf16": "bfloat16", "fp16": "float16"}.get(self.compute, "float32")

    @property
    def activation_bytes(self) -> int:
        """Of that type."""
        return 4 if self.dtype == "float32" else 2

    def check(self, field: str, refuse: Refuse) -> None:
        """What an NPU does not compute in."""
        if self.device == "NPU" and self.compute != "fp16":
            refuse(f"{field}.compute", f"an NPU computes in fp16, not in {self.compute}; set compute: fp16")


class Allow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Findings of an engine's audit that are accepted. A pattern alone stands for {layer: PATTERN}."""

    short_form: ClassVar[str] = "layer"
    """The field that a word in place of the mapping is the value of."""

    layer: Annotated[str, about("a pattern of layer names", "proj_out")]
    kind: Annotated[
        Literal["missing", "format", "group", "attention", "copy"] | None,
        about("the kind of finding", "copy", left_out="every kind"),
    ] = None


class TensorRTTarget(ShardedTarget, frozen=True, tag="tensorrt"):
    """Engines of TensorRT, which `fluxc finish` builds on the GPU itself."""

    compute_capabilities: Annotated[
        Annotated[tuple[str, ...], msgspec.Meta(min_length=1)],
        about("the GPUs to build for, by compute capability; `tensorrt` takes one", ["12.0"]),
    ] = ("10.0",)
    weights: Annotated[
        Literal["bound", "baked"],
        about(
            "`bound`: an engine a kind of block, weights given when it runs; `baked` puts the blocks' weights into the engines",
            "baked",
        ),
    ] = "bound"
    memory_gib: Annotated[
        Annotated[float, msgspec.Meta(gt=1)],
        about("memory (GiB) that building may take with `weights: baked`; the library alone takes 1", 32),
    ] = 16.0
    shapes: Annotated[
        Literal["profiles", "range"],
        about(
            "`profiles`: an optimization profile a size; `range`: one for all sizes, and any size between them may be "
            "generated; its memory is that of the most rows and the most columns",
            "range",
        ),
    ] = "profiles"
    allow: Annotated[
        tuple[Allow, ...],
        about(
            "findings of the audit that are accepted. What is wrong with an engine as a whole (GPUs, ranks, collectives, "
            "memory allocated while it runs) is never accepted",
            ["proj_out", {"layer": "*.to_q", "kind": "format"}],
        ),
    ] = ()

    in_name = ("weights",)

    @property
    def rounds_inputs(self) -> bool:
        """As its GPUs do."""
        return True

    @property
    def one_precision(self) -> str:
        """With baked weights, which a second engine would hold again."""
        return "" if self.weights == "bound" else "a second engine would hold the weights again; use weights: bound"

    def check(self, field: str, refuse: Refuse) -> None:
        """Each kind of GPU once."""
        if len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            refuse(f"{field}.compute_capabilities", "one appears twice")


class TensorRTRtxTarget(TensorRTTarget, frozen=True, tag="tensorrt_rtx"):
    """Engines of TensorRT-RTX, built on any machine."""

    compute_capabilities: Annotated[
        Annotated[tuple[str, ...], msgspec.Meta(min_length=1)],
        about("the GPUs to build for, by compute capability", ["12.0"]),
    ] = ("12.0", "12.1")


class VisualGenTarget(Target, frozen=True, tag="visual_gen"):
    """A folder that TensorRT-LLM's VisualGen loads."""

    gpus: Annotated[
        Count | Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)],
        about("the numbers of GPUs to write settings for: one, or a list", [1, 2, 4, 8]),
    ] = 1

    @property
    def runs_graphs(self) -> bool:
        """VisualGen runs code of its own: one prompt a call, images decoded whole."""
        return False

    @property
    def gpu_counts(self) -> tuple[int, ...]:
        """`gpus` as a list."""
        return (self.gpus,) if isinstance(self.gpus, int) else self.gpus

    @property
    def one_precision(self) -> str:
        """VisualGen loads one transformer for all steps."""
        return "VisualGen computes all steps alike; give it a recipe of its own without precision.steps"

    @property
    def rounds_inputs(self) -> bool:
        """As its GPUs do."""
        return True

    def check(self, field: str, refuse: Refuse) -> None:
        """Each number of GPUs once."""
        if len(set(self.gpu_counts)) != len(self.gpu_counts):
            refuse(f"{field}.gpus", "one appears twice")


def kind_name(struct: type[Target]) -> str:
    """What `kind` is in an entry that `struct` is for."""
    return str(struct.__struct_config__.tag)


TARGETS: dict[str, type[Target]] = {
    kind_name(struct): struct
    for struct in (OnnxRuntimeTarget, OpenVinoTarget, TensorRTRtxTarget, TensorRTTarget, VisualGenTarget)
}
"""The structs of targets by kind; fluxc.targets.registry adds those of further kinds."""
