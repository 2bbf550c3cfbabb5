"""What the system around the GPUs must give: a driver new enough for CUDA 13, and a way from GPU to GPU.

Everything is read without a context on a GPU, in milliseconds.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluxrt.cuda import Gpu

CUDA = 13
"""What the libraries of our extras are built with."""
DRIVER = 580
"""The oldest driver on Linux that runs programs built with CUDA 13 (NVIDIA, CUDA Compatibility)."""
NEWER_DRIVER = (
    f"install NVIDIA's driver {DRIVER} or later on the host; on data-centre GPUs the package cuda-compat-13-0 in the container "
    "does too"
)
NVIDIA_PCI = "0x10de"
DISPLAY_PCI = "0x03"
"""The PCI class of display controllers; a data-centre GPU is a 3D controller, which is one of them."""
DOCKERS_SHM = 64 << 20
"""What a container's /dev/shm has unless it is given more: too little for NCCL's buffers where GPUs do not reach each other."""
ENOUGH_SHM = 1 << 30
MORE_SHM = "start the container with --shm-size=1g or --ipc=host"


def installed_driver(system: Path = Path("/")) -> str | None:
    """The version of NVIDIA's kernel driver ("580.95.05"), None without one."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", (system / "proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def has_nvidia_gpu(system: Path = Path("/")) -> bool:
    """Whether an NVIDIA GPU or its driver shows itself: the kernel driver, its devices, WSL's, or a display or 3D controller of
    NVIDIA's on the PCI bus, which a container without GPUs still sees."""
    if any((system / path).exists() for path in ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg")):
        return True
    return any(
        _read(device / "vendor") == NVIDIA_PCI and _read(device / "class").startswith(DISPLAY_PCI)
        for device in (system / "sys/bus/pci/devices").glob("*")
    )


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def shared_memory(folder: Path = Path("/dev/shm")) -> int | None:
    """The size of /dev/shm in bytes, None where there is none."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def pairs_apart(gpus: int, reaches: Callable[[int, int], bool]) -> tuple[tuple[int, int], ...]:
    """The pairs of `gpus` GPUs of which one cannot read the other's memory; `reaches(a, b)` says whether a reads b's."""
    pairs = itertools.combinations(range(gpus), 2)
    return tuple((a, b) for a, b in pairs if not (reaches(a, b) and reaches(b, a)))


def reaches(gpu: int, other: int) -> bool:
    """Whether GPU `gpu` reads the memory of `other` (P2P), as the driver says; cuInit was called."""
    from cuda.bindings import driver

    devices = [driver.cuDeviceGet(number)[1] for number in (gpu, other)]
    result, able = driver.cuDeviceCanAccessPeer(*devices)
    return bool(result == driver.CUresult.CUDA_SUCCESS and able)


def old_driver(version: str | None) -> str | None:
    """What is wrong with an installed driver, None if nothing is or there is none."""
    if version is None or int(version.partition(".")[0]) >= DRIVER:
        return None
    return f"NVIDIA's driver {version} is too old for CUDA {CUDA}; {NEWER_DRIVER}"


def check_driver(gpu: Gpu) -> None:
    """Refuse a driver that supports CUDA 12 or older, with which libraries for CUDA 13 fail to load or to run a kernel."""
    if int(gpu.driver.partition(".")[0]) < CUDA:
        raise BackendError(
            f"the driver of {gpu.name} supports CUDA {gpu.driver}, the libraries need CUDA {CUDA}; {NEWER_DRIVER}"
        )
