"""What a machine can build and run, as data: what `fluxc doctor` shows."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from fluxc.targets.tensorrt.library import LIBRARIES, how_to_install, installed_version
from fluxrt.bundle import Bundle
from fluxrt.choose import Machine, choose, obstacle, this_machine
from fluxrt.errors import BackendError
from fluxrt.install import install_extra, install_named
from fluxrt.system import DOCKERS_SHM, ENOUGH_SHM, MORE_SHM, check_driver, has_nvidia_gpu, old_driver

COMPILES_WITH = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors")
TORCH_WITH_CUDA = "install the torch that has this driver's CUDA (pytorch.org/get-started)"
RUNS_WITH = ("onnxruntime", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Check:
    """One thing that a machine does or lacks.

    `ready`: "yes"; "no"; "slow", it works at a price that `detail` names; "perhaps", it may not be enough; "not needed", this
    machine has no use for it; "chosen", of a bundle's targets the one that would run. `do` is the command or step that makes it
    ready, None where nothing is to be done.
    """

    what: str
    ready: Literal["yes", "no", "slow", "perhaps", "not needed", "chosen"]
    detail: str
    do: str | None = None


def machine_checks(machine: Machine | None = None, has_gpu: bool | None = None) -> list[Check]:
    """Of `machine` (this one by default), with an NVIDIA GPU or without (`has_gpu`): what it can build and run."""
    machine = machine or this_machine()
    has_gpu = has_nvidia_gpu() if has_gpu is None else has_gpu
    return [
        Check("Python", "yes", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _packages("compile", "fluxc", COMPILES_WITH),
        _packages("run onnxruntime targets on the CPU", "fluxrt", RUNS_WITH),
        _openvino(),
        _kernels(),
        *_gpu(machine, has_gpu),
        *system_checks(machine),
        *_libraries(has_gpu),
    ]


def target_checks(bundle: Bundle, machine: Machine | None = None) -> list[Check]:
    """A bundle's targets, by name: whether `machine` (this one by default) runs each, which it would choose, and why not the
    others."""
    machine = machine or this_machine()
    obstacles = {target.name: obstacle(bundle, target, machine) for target in bundle.manifest.targets}
    able = [target for target in bundle.manifest.targets if obstacles[target.name] is None and target.gpus == 1]
    chosen = choose(bundle, machine)[0].name if able else None
    return [
        Check(name, "no" if reason else "chosen" if name == chosen else "yes", reason or "")
        for name, reason in obstacles.items()
    ]


def system_checks(machine: Machine) -> list[Check]:
    """What the system gives GPU targets: the driver, and of several GPUs, how they reach each other's memory."""
    wrong = old_driver(machine.driver)
    if machine.gpu is None:
        return [Check("NVIDIA driver", "no", wrong)] if wrong else []
    try:
        check_driver(machine.gpu)
    except BackendError as error:
        checks = [Check("NVIDIA driver", "no", str(error))]
    else:
        checks = [Check("NVIDIA driver", "yes", f"{machine.driver or 'version unknown'}, CUDA {machine.gpu.driver}")]
    if machine.gpus == 1:
        return checks
    if not machine.apart:
        return [*checks, Check("GPU to GPU", "yes", f"{machine.gpus} GPUs reach each other's memory (P2P)")]
    pairs = ", ".join(f"{a} and {b}" for a, b in machine.apart)
    slow = f"GPUs {pairs} do not reach each other's memory (no P2P): NCCL goes through the host's memory, many times slower"
    checks.append(Check("GPU to GPU", "slow", slow))
    if machine.shared_memory is not None and machine.shared_memory < ENOUGH_SHM:
        little = f"{machine.shared_memory >> 20} MiB, NCCL may need more"
        checks.append(Check("/dev/shm", "no" if machine.shared_memory <= DOCKERS_SHM else "perhaps", little, MORE_SHM))
    return checks


def _packages(what: str, distribution: str, packages: tuple[str, ...]) -> Check:
    """Whether the packages that `distribution` requires for `what` are there, and in which versions."""
    found = {name: _version(name) for name in packages}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return Check(what, "no", f"missing: {', '.join(missing)}", install_named(distribution, missing))
    return Check(what, "yes", ", ".join(f"{name} {version}" for name, version in found.items()))


def _kernels() -> Check:
    from fluxc.formats.kernel_cache import kernel_folder

    folder, notice = kernel_folder()
    return Check("keep compiled kernels", "yes" if folder else "no", notice or f"in {folder}")


def _gpu(machine: Machine, has_gpu: bool) -> Iterator[Check]:
    """The GPU, and what calibration and fluxrt's GPU targets need to use it."""
    if not has_gpu:
        none = "none here: compiling, calibration and onnxruntime targets use the CPU"
        yield Check("NVIDIA GPU", "not needed", none)
        return
    if machine.gpu is None:
        lacking = _version("cuda-bindings") is None
        do = install_extra("fluxrt", "cuda") if lacking else None
        yield Check("run GPU targets", "no", "cuda-bindings is not installed" if lacking else machine.no_gpu, do)
    else:
        yield Check(
            "run GPU targets", "yes", f"{machine.gpu.name}, compute capability {machine.gpu.compute_capability}"
        )
    import torch

    if torch.cuda.is_available():
        yield Check("calibrate on the GPU", "yes", f"torch {torch.__version__} sees {torch.cuda.get_device_name()}")
    else:
        none = f"torch {torch.__version__} sees no GPU, so calibration uses the CPU"
        yield Check("calibrate on the GPU", "no", none, TORCH_WITH_CUDA)
    cuda = "CUDAExecutionProvider" in machine.providers
    from fluxrt.backends.onnxruntime_cuda import install_command

    yield Check(
        "run onnxruntime targets on the GPU",
        "yes" if cuda else "no",
        f"ONNX Runtime has {', '.join(machine.providers)}",
        None if cuda else install_command(),
    )


def _libraries(has_gpu: bool) -> Iterator[Check]:
    """The TensorRT libraries that build engines: one builds anywhere, the other on the GPU that engines are for."""
    for library in LIBRARIES.values():
        what = f"build {library.kind} targets"
        version = installed_version(library.kind)
        if library.builds_without_gpu:
            how = "engines are built here, without a GPU"
        elif has_gpu:
            how = "engines are built on this machine's GPU, by `fluxc finish`"
        else:
            how = "graphs are written here; `fluxc finish` builds the engines on the GPU's machine"
            yield Check(what, "yes", f"{how}; the library is not needed here")
            continue
        if version:
            yield Check(what, "yes", f"{library.kind} {version}; {how}")
        else:
            yield Check(what, "no", f"{library.package} is not installed; {how}", how_to_install(library))


def _openvino() -> Check:
    """The package that openvino targets are built and run with."""
    from fluxrt.backends.openvino_target import PACKAGE

    version = _version(PACKAGE)
    lacking = None if version else install_extra("fluxrt", PACKAGE)
    detail = f"{PACKAGE} {version}" if version else f"{PACKAGE} is not installed"
    return Check("build and run openvino targets", "yes" if version else "no", detail, lacking)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
