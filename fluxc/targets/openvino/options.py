"""What a recipe can ask of an `openvino` target."""

from __future__ import annotations

from typing import Annotated, Literal

from fluxc.recipe.fields import about
from fluxc.recipe.targets import Refuse, Target


class OpenVinoTarget(Target, frozen=True, tag="openvino"):
    """Graphs for OpenVINO, on a CPU, or on a GPU or an NPU of Intel."""

    device: Annotated[
        Literal["CPU", "GPU", "NPU", "AUTO"],
        about("where it runs; `AUTO` is a GPU of Intel where there is one, or else the CPU", "GPU"),
    ] = "CPU"
    compute: Annotated[
        Literal["exact", "bf16", "fp16", "int8"],
        about(
            "what it computes in: `exact` is fp32; `int8` rounds weights that are quantized, and their inputs, to 8 bits, and "
            "computes all else in fp32. Where the machine lacks it, fp32 is used, which is said",
            "bf16",
        ),
    ] = "exact"
    performance: Annotated[
        Literal["latency", "throughput"], about("OpenVINO's hint of that name; see [OpenVINO](openvino.md)", "throughput")
    ] = "latency"

    in_name = ("device", "compute", "performance")

    @property
    def runs_here(self) -> bool:
        """On the CPU."""
        return self.device == "CPU"

    @property
    def dtype(self) -> str:
        """The type of values between layers."""
        return {"bf16": "bfloat16", "fp16": "float16"}.get(self.compute, "float32")

    @property
    def activation_bytes(self) -> int:
        """Of that type."""
        return 4 if self.dtype == "float32" else 2

    def check(self, field: str, refuse: Refuse) -> None:
        """What an NPU does not compute in."""
        if self.device == "NPU" and self.compute != "fp16":
            refuse(f"{field}.compute", f"an NPU computes in fp16, not in {self.compute}; set compute: fp16")
