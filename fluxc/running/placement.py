"""Where a model runs while it is measured, in which type, and how much of it is in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fluxc.base.cpu import multiplies_bf16
from fluxc.base.errors import BuildError
from fluxc.base.memory import memory_limit
from fluxc.checkpoint.needs import Asked, memory_by_component, models_of
from fluxc.checkpoint.source import Checkpoint


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


def check_device(device: str) -> None:
    """Refuse cuda (BuildError) where torch sees no GPU; `device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BuildError(
            "--device cuda: torch sees no CUDA GPU here; use --device cpu, or install the torch that has "
            "this driver's CUDA (pytorch.org/get-started)"
        )


def find_placement(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, asked: Asked, memory: int | None = None
) -> Placement:
    """The placement on this machine of a model that is asked to compute in `dtype`; `device` is auto, cpu or cuda.

    A component at a time where that fits into `memory`, bytes of the whole process, by default what is free or the user
    chose; on a GPU into what is free there. bfloat16 becomes float32 on a CPU that does not multiply it. BuildError if cuda is
    asked for and not there.
    """
    check_device(device)
    gpu = torch.cuda.mem_get_info()[0] if device != "cpu" and torch.cuda.is_available() else None
    if gpu is None and dtype == torch.bfloat16 and not multiplies_bf16():
        dtype = torch.float32
    needed = memory_by_component(models_of(checkpoint), replace(asked, itemsize=dtype.itemsize))
    there = gpu if gpu is not None else memory_limit() if memory is None else memory
    return Placement("cpu" if gpu is None else "cuda", dtype, "component" if needed <= there else "layer")
