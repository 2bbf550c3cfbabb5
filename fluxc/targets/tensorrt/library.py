"""The two TensorRT libraries, which share one API: TensorRT-RTX, which builds for other GPUs without one, and TensorRT."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from fluxc.base.errors import BuildError, RecipeError
from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import multiplied_in

FORMATS_OF = {
    "7.5": (),
    "8.0": (),
    "8.6": (),
    "8.9": ("fp8",),
    "9.0": ("fp8",),
    "10.0": ("fp8", "nvfp4"),
    "10.3": ("fp8", "nvfp4"),
    "12.0": ("fp8", "nvfp4"),
    "12.1": ("fp8", "nvfp4"),
}
"""Compute capabilities and the quantized formats their tensor cores multiply."""

GPUS = {
    "7.5": "Turing",
    "8.0": "A100",
    "8.6": "RTX 30",
    "8.9": "RTX 40, L40",
    "9.0": "H100, H200",
    "10.0": "B200",
    "10.3": "B300",
    "12.0": "RTX 50, RTX PRO Blackwell",
    "12.1": "GB10",
}


KEEPS_RANKS = (11, 2)


@dataclass(frozen=True)
class Library:
    """One of the libraries: how it is imported and installed, what it builds for, and whether that needs the GPU itself."""

    kind: str
    package: str
    extra: str
    compute_capabilities: tuple[str, ...]
    builds_without_gpu: bool


LIBRARIES = {
    "tensorrt_rtx": Library(
        "tensorrt_rtx",
        "tensorrt-rtx-cu13",
        "tensorrt-rtx",
        ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        True,
    ),
    "tensorrt": Library(
        "tensorrt",
        "tensorrt-cu13",
        "tensorrt",
        ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"),
        False,
    ),
}


def load_library(kind: str) -> ModuleType:
    """The Python module of library `kind`; BuildError names the extra to install."""
    library = LIBRARIES[kind]
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise BuildError(
            f"target {kind}: {library.package} is not installed here ({error}); run `{how_to_install(library)}`"
        ) from error


def how_to_install(library: Library) -> str:
    """The command that installs `library` where fluxc runs."""
    from fluxrt.install import install_extra

    return install_extra("fluxc", library.extra)


def installed_version(kind: str) -> str | None:
    """The version of library `kind` on this machine, None without it."""
    try:
        return str(importlib.import_module(kind).__version__)
    except ImportError:
        return None


def check_keeps_ranks(module: ModuleType) -> None:
    """Refuse the TensorRT versions whose plans can lose the number of ranks; BuildError says which do not."""
    version = tuple(int(part) for part in str(module.__version__).split(".")[:2])
    if module.__name__ == "tensorrt" and version < KEEPS_RANKS:
        raise BuildError(
            f"TensorRT {module.__version__} can lose the number of ranks of a sharded plan, whose collectives then do nothing; "
            f"use {'.'.join(map(str, KEEPS_RANKS))} or newer"
        )


def check_formats(kind: str, formats: set[str], field: str) -> None:
    """Refuse formats that no engine computes in, whatever the GPU; RecipeError names `field`."""
    able = {format for found in FORMATS_OF.values() for format in found}
    unknown = sorted(format for format in formats if multiplied_in(format) not in {BF16, *able})
    if unknown:
        raise RecipeError(
            f"{field}: no engine of {kind} computes in {', '.join(unknown)}, as the precision plan asks, whatever the GPU "
            f"multiplies; engines compute in {', '.join(sorted(able))} and bf16. Set precision to those, or leave it out"
        )


def check_capabilities(kind: str, capabilities: tuple[str, ...], formats: set[str], field: str) -> None:
    """Refuse GPUs that `kind` does not build for, and `formats` that they do not compute in; RecipeError names `field`."""
    library = LIBRARIES[kind]
    for capability in capabilities:
        if capability not in library.compute_capabilities:
            possible = ", ".join(f"{c} ({GPUS[c]})" for c in library.compute_capabilities)
            others = [f"kind: {o.kind} does" for o in LIBRARIES.values() if capability in o.compute_capabilities]
            hint = "; ".join(others) or "write it as, for example, '12.0'"
            raise RecipeError(
                f"{field}: {kind} does not build for compute capability {capability!r} ({hint}). It builds for {possible}"
            )
        missing = sorted(format for format in formats if multiplied_in(format) not in {BF16, *FORMATS_OF[capability]})
        if missing:
            able = ", ".join(FORMATS_OF[capability]) or "no quantized format"
            wanted = {multiplied_in(format) for format in formats}
            others = [c for c in library.compute_capabilities if wanted <= {BF16, *FORMATS_OF[c]}]
            raise RecipeError(
                f"{field}: GPUs of compute capability {capability} ({GPUS[capability]}) do not compute in "
                f"{', '.join(missing)}, as the precision plan asks; they compute in {able} and bf16. Set precision to "
                f"those, or build for {', '.join(others) or 'another target'}"
            )


def gpu_here(compute_capabilities: tuple[str, ...]) -> bool:
    """Whether this machine has a GPU of one of these compute capabilities."""
    import torch

    if not torch.cuda.is_available():
        return False
    found = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    return bool(found.intersection(compute_capabilities))
