"""What is here before anything runs: GPUs, driver, libraries, which targets fit; and what would make ranks fail."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from fluxc.gpu_check.child import Found
from fluxc.gpu_check.place import Place
from fluxc.gpu_check.subject import Subject
from fluxrt.bundle import open_bundle, verify_files
from fluxrt.choose import obstacle
from fluxrt.system import ENOUGH_SHM, MORE_SHM, shared_memory

LIBRARIES = (
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "onnxruntime",
    "onnxruntime-gpu",
    "cuda-bindings",
    "nccl4py",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
    "torch",
    "diffusers",
    "numpy",
)


@dataclass(frozen=True)
class Inventory:
    """The GPUs (see Place.describe), versions of what is installed, and by target what stands in its way, None if nothing."""

    device: dict[str, Any]
    versions: dict[str, str]
    obstacles: dict[str, str | None]


def look(place: Place, bundle: str) -> Inventory:
    """What is here; BackendError without a GPU."""
    opened = open_bundle(bundle)
    device = place.describe()
    machine = place.machine(opened)
    obstacles: dict[str, str | None] = {}
    for target in opened.manifest.targets:
        reason = obstacle(opened, target, machine)
        # Where the bundle lies here is of no use elsewhere.
        obstacles[target.name] = reason and reason.replace(str(opened.root), opened.manifest.name)
    return Inventory(device, library_versions(), obstacles)


def library_versions() -> dict[str, str]:
    """Versions of the LIBRARIES that are installed, and of fluxc and fluxrt with a digest of their source."""
    from fluxc.base.cache import tool_versions

    found = {name: tool_versions()[name] for name in ("fluxc", "fluxrt")}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_machine(subject: Subject) -> Found:
    """GPUs, driver, CUDA, libraries, P2P and /dev/shm; a fault where ranks would fail for want of either."""
    device = subject.place.describe()
    shared = shared_memory()
    figures = {**device, "shared_memory_bytes": shared, "libraries": library_versions()}
    reach = all(all(row) for row in device["peers"])
    faults = []
    if len(device["gpus"]) > 1 and not reach and (shared or 0) < ENOUGH_SHM:
        faults.append(
            f"GPUs cannot read each other's memory and /dev/shm has {(shared or 0) >> 20} MiB, less than the "
            f"{ENOUGH_SHM >> 20} MiB that NCCL then wants; {MORE_SHM}"
        )
    return Found(figures, faults)


def check_bundle(subject: Subject) -> Found:
    """Every file's SHA-256; BundleError names what is damaged."""
    bundle = open_bundle(subject.bundle)
    verify_files(bundle)
    return Found({"files": len(bundle.manifest.files), "bytes": sum(f.size for f in bundle.manifest.files.values())})
