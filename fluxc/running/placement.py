"""Where a model runs while it is measured, in which type, and how much of it is in memory at a time."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fluxc.base.errors import BuildError
from fluxc.checkpoint.dequantized import weights_bytes
from fluxc.checkpoint.source import Checkpoint
from fluxrt.memory import available_memory

ROOM = 0.6
"""The share of what is free that weights may take; activations, libraries and the allocator have the rest."""
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of /proc/cpuinfo: products of bfloat16 in hardware, on x86 and on Arm."""
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX2_VNNI_2"}
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN, which torch multiplies bfloat16 with, has none."""


@dataclass(frozen=True)
class Placement:
    """The model computes on `device` in `dtype`. `component`: text encoder, then transformer, then VAE is in memory there.
    `layer`: of text encoder and transformer one layer at a time, read from the checkpoint's files, the next one ahead.

    `str` names what results depend on: how much is in memory changes none.
    """

    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    pieces: Literal["component", "layer"]

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}"

    def groups(self, count: int, most: int) -> list[list[int]]:
        """The numbers below `count`, in order, as they go through the model together: at most `most`, or each by itself where
        nothing is gained by more."""
        size = most if self.pieces == "layer" else 1
        return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def choose(weights: dict[str, int], gpu_free: int | None, host_free: int) -> tuple[Literal["cpu", "cuda"], bool]:
    """The device, and whether every component fits there whole: `weights` are their bytes, `gpu_free` (None: there is no GPU)
    and `host_free` the bytes that are free.
    """
    if gpu_free is None:
        return "cpu", max(weights.values()) <= ROOM * host_free
    return "cuda", max(weights.values()) <= ROOM * gpu_free


def check_device(device: str) -> None:
    """Refuse cuda (BuildError) where torch sees no GPU; `device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BuildError(
            "--device cuda: torch sees no CUDA GPU here; use --device cpu, or install the torch that has "
            "this driver's CUDA (pytorch.org/get-started)"
        )


def find_placement(checkpoint: Checkpoint, device: str, dtype: torch.dtype, memory: int | None = None) -> Placement:
    """The placement on this machine of a model that is asked to compute in `dtype`; `device` is auto, cpu or cuda.

    `memory` is what the process may take of the host's, by default what is free. bfloat16 becomes float32 on a CPU that does
    not multiply it. BuildError if cuda is asked for and not there.
    """
    check_device(device)
    gpu = torch.cuda.mem_get_info()[0] if device != "cpu" and torch.cuda.is_available() else None
    if gpu is None and dtype == torch.bfloat16 and not multiplies_bf16():
        dtype = torch.float32
    parts = {name: weights_bytes(checkpoint.components[name]) for name in ("transformer", "text_encoder", "vae")}
    weights = {name: math.ceil(size * dtype.itemsize / 2) for name, size in parts.items()}
    found, fits = choose(weights, gpu, available_memory() if memory is None else memory)
    return Placement(found, dtype, "component" if fits else "layer")


def multiplies_bf16(system: Path = Path("/")) -> bool:
    """Whether this CPU multiplies bfloat16 in hardware and oneDNN may use that; in software it is many times slower than
    float32. `system` is the root of /proc.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16:
        return False
    try:
        listed = (system / "proc/cpuinfo").read_text()
    except OSError:
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", listed, re.MULTILINE)
    return bool(found and BF16_FLAGS & set(found[1].split()))
