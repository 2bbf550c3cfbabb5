"""A machine with two made-up GPUs, for rehearsing what `fluxc gpu-check` does on a real one; see fluxc.gpu_check.place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.rehearsal.gpu import RTX, FakeDriver, FakeLibrary
from fluxc.rehearsal.onnxruntime import MadeUpCudaBackend
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle
from fluxrt.cuda import Gpu
from fluxrt.machine import Machine
from fluxrt.manifest import OnnxRuntimeTarget, Target, TensorRTTarget

if TYPE_CHECKING:
    from fluxrt.backends import Backend
    from fluxrt.ranked import RankedPipeline

GPUS = 2


@dataclass(frozen=True)
class MadeUpPlace:
    """Two GPUs called `gpu`. What TensorRT and ONNX Runtime would run is evaluated, ranks are processes on the CPU."""

    gpu: Gpu = RTX
    is_rehearsal: bool = True

    def describe(self) -> dict[str, Any]:
        gpu = {
            "name": self.gpu.name,
            "compute_capability": self.gpu.compute_capability,
            "memory_bytes": FakeDriver(self.gpu).memory()[1],
            "id": "0" * 12,
        }
        return {"gpus": [gpu] * GPUS, "peers": [[True] * GPUS] * GPUS, "driver": "none", "cuda": self.gpu.driver}

    def machine(self, bundle: Bundle) -> Machine:
        """A machine that has ONNX Runtime on CUDA and the TensorRT library of the version every target wants; NCCL is not
        made up."""
        wanted = [target.engine for target in bundle.manifest.targets if isinstance(target, TensorRTTarget)]
        versions = {engine.library: str(engine.version) for engine in wanted}
        return Machine(
            self.gpu, versions=versions, providers=("CUDAExecutionProvider", "CPUExecutionProvider"), gpus=GPUS
        )

    def driver(self) -> FakeDriver:
        return FakeDriver(self.gpu)

    def library(self, bundle: Bundle, target: Target, driver: Any) -> FakeLibrary:
        assert isinstance(target, TensorRTTarget)
        return FakeLibrary(bundle, target, driver)

    def backend(self, bundle: Bundle, target: Target, driver: Any, captures: bool) -> Backend:
        if isinstance(target, OnnxRuntimeTarget):
            return MadeUpCudaBackend(bundle, target)
        assert isinstance(target, TensorRTTarget)
        return TensorRTBackend(bundle, target, driver, FakeLibrary(bundle, target, driver), captures=captures)

    def build(self, request: Any, expected: Any, path: Path) -> dict[str, Any]:
        """A file in a plan's place: the fake library runs the graph it would have been built from."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"in place of a plan of {request.name}".encode())
        return {}

    def ranked(self, bundle: Bundle, target: Target) -> RankedPipeline | None:
        """Processes on the CPU, for a target that is sharded for those."""
        from fluxrt.ranked import RankedPipeline

        return RankedPipeline(bundle, target) if target.device == "cpu" else None
