"""The targets of a recipe: a struct for each kind, with the options that mean something for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import msgspec

Refuse = Callable[[str, str], None]
"""Raises RecipeError naming a field, and saying why it cannot be."""


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
    def rounds_inputs(self) -> bool:
        """Whether inputs of NVFP4 and FP8 layers are rounded to the weights' format."""
        return False

    @property
    def activation_bytes(self) -> int:
        """Bytes of a value that layers exchange."""
        return 2

    def check(self, field: str, refuse: Refuse) -> None:
        """Refuse the first value that is not possible, whatever the checkpoint; `field` is the target in the recipe."""


class ShardedTarget(Target, frozen=True):
    """`gpus` shards the transformer by sequence (Ulysses) for so many GPUs, onnxruntime for so many processes on the CPU."""

    gpus: int = 1

    @property
    def ranks(self) -> int:
        """One for each GPU or process."""
        return self.gpus

    def check(self, field: str, refuse: Refuse) -> None:
        """A number of ranks."""
        if self.gpus < 1:
            refuse(f"{field}.gpus", f"must be at least 1, got {self.gpus}")


class OnnxRuntimeTarget(ShardedTarget, frozen=True, tag="onnxruntime"):
    """Graphs for ONNX Runtime. `device: cuda` is for an NVIDIA GPU of SM90 or later, with 4-bit weights and activations in
    `dtype`.

    On the CPU `activations: nvfp4` rounds the inputs of NVFP4 and FP8 layers as an FP4 GPU does; `weights_in_memory: 4-bit`
    halves the memory of NVFP4 weights at run time, and takes longer.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    activations: Literal["none", "nvfp4"] = "none"
    weights_in_memory: Literal["8-bit", "4-bit"] = "8-bit"

    in_name = ("device", "dtype", "activations", "weights_in_memory")

    @property
    def runs_here(self) -> bool:
        """On the CPU, in one process."""
        return self.device == "cpu" and self.gpus == 1

    @property
    def in_one(self) -> Target | None:
        """On the CPU, the same without `gpus`."""
        return msgspec.structs.replace(self, gpus=1) if self.device == "cpu" and self.gpus > 1 else None

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
        for option, device in (("activations", "cpu"), ("weights_in_memory", "cpu"), ("dtype", "cuda")):
            if self.device != device and getattr(self, option) != getattr(usual, option):
                refuse(f"{field}.{option}", f"goes with device: {device}")
        super().check(field, refuse)
        if self.gpus > 1 and self.device == "cuda":
            refuse(
                f"{field}.gpus",
                "ONNX Runtime has no collectives for device: cuda; use a tensorrt target, or device: cpu",
            )


class Allow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Findings of an engine's audit that are accepted: about layers that the pattern matches, of this kind or any.

    Kinds: missing, format, group, attention, copy. In YAML a pattern alone stands for {layer: PATTERN}.
    """

    layer: str
    kind: Literal["missing", "format", "group", "attention", "copy"] | None = None


class TensorRTTarget(ShardedTarget, frozen=True, tag="tensorrt"):
    """Engines of TensorRT. `compute_capabilities` are the GPUs to build for, by default those it is used for most.

    `weights: baked` puts the blocks' weights into the plans, in segments that can be built in `memory_gib`; `shapes` makes an
    optimization profile of every size, or one that spans them; `allow` lists findings of the audit that are accepted.
    """

    compute_capabilities: tuple[str, ...] = ("10.0",)
    weights: Literal["bound", "baked"] = "bound"
    memory_gib: float = 16.0
    shapes: Literal["profiles", "range"] = "profiles"
    allow: tuple[Allow, ...] = ()

    in_name = ("weights",)

    @property
    def rounds_inputs(self) -> bool:
        """As its GPUs do."""
        return True

    def check(self, field: str, refuse: Refuse) -> None:
        """GPUs, and memory that suffices for the library alone."""
        super().check(field, refuse)
        if not self.compute_capabilities:
            refuse(f"{field}.compute_capabilities", "give at least one, or leave it out")
        if len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            refuse(f"{field}.compute_capabilities", "one appears twice")
        if not self.memory_gib > 1:
            refuse(f"{field}.memory_gib", f"must be more than 1, which the library itself takes, got {self.memory_gib}")


class TensorRTRtxTarget(TensorRTTarget, frozen=True, tag="tensorrt_rtx"):
    """Engines of TensorRT-RTX; the same options."""

    compute_capabilities: tuple[str, ...] = ("12.0", "12.1")


class VisualGenTarget(Target, frozen=True, tag="visual_gen"):
    """A folder for TensorRT-LLM's VisualGen; `gpus` lists the numbers of GPUs it can be served with."""

    gpus: int | tuple[int, ...] = 1

    @property
    def gpu_counts(self) -> tuple[int, ...]:
        """`gpus` as a list."""
        return (self.gpus,) if isinstance(self.gpus, int) else self.gpus

    @property
    def rounds_inputs(self) -> bool:
        """As its GPUs do."""
        return True

    def check(self, field: str, refuse: Refuse) -> None:
        """Numbers of GPUs."""
        if not self.gpu_counts or min(self.gpu_counts) < 1:
            refuse(f"{field}.gpus", f"must be at least 1, got {self.gpus}")
        if len(set(self.gpu_counts)) != len(self.gpu_counts):
            refuse(f"{field}.gpus", "one appears twice")


def kind_name(struct: type[Target]) -> str:
    """What `kind` is in an entry that `struct` is for."""
    return str(struct.__struct_config__.tag)


TARGETS: dict[str, type[Target]] = {
    kind_name(struct): struct for struct in (OnnxRuntimeTarget, TensorRTRtxTarget, TensorRTTarget, VisualGenTarget)
}
"""The structs of targets by kind; fluxc.targets.registry adds those of further kinds."""
