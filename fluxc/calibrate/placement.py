"""Where the model runs while it is measured: on the GPU if there is one, and in pieces if it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fluxc.base.errors import BuildError
from fluxc.checkpoint.dequantized import PlainTensors, empty_model, weights_bytes
from fluxc.checkpoint.reference import load_pipeline
from fluxc.checkpoint.source import Checkpoint
from fluxrt.memory import available_memory

# Left free for activations and the allocator.
ROOM = 0.8


@dataclass(frozen=True)
class Placement:
    """`whole`: all weights on `device`. `component`: one component at a time there. `layer`: each layer's weights are read
    from the checkpoint's files when it runs, and forgotten after.
    """

    device: Literal["cpu", "cuda"]
    pieces: Literal["whole", "component", "layer"]

    def __str__(self) -> str:
        return (
            f"{self.device}, {'the whole model at once' if self.pieces == 'whole' else f'one {self.pieces} at a time'}"
        )


def choose(weights: dict[str, int], gpu_free: int | None, host_free: int) -> Placement:
    """The placement for components of so many bytes, with so many free on the GPU (None: there is none) and the host."""
    fits_host = sum(weights.values()) <= ROOM * host_free
    if gpu_free is None:
        return Placement("cpu", "whole" if fits_host else "layer")
    if sum(weights.values()) <= ROOM * gpu_free:
        return Placement("cuda", "whole")
    if max(weights.values()) <= ROOM * gpu_free and fits_host:
        return Placement("cuda", "component")
    return Placement("cuda", "layer")


def check_device(device: str) -> None:
    """Refuse cuda (BuildError) where torch sees no GPU; `device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BuildError(
            "--device cuda: torch sees no CUDA GPU here; use --device cpu, or install the torch that has "
            "this driver's CUDA (pytorch.org/get-started)"
        )


def find_placement(checkpoint: Checkpoint, device: str, dtype: torch.dtype = torch.bfloat16) -> Placement:
    """The placement on this machine for weights in `dtype`; `device` is auto, cpu or cuda.

    BuildError if cuda is asked for and not there.
    """
    check_device(device)
    gpu = torch.cuda.mem_get_info()[0] if device != "cpu" and torch.cuda.is_available() else None
    weights = {
        name: weights_bytes(part) * dtype.itemsize // torch.bfloat16.itemsize
        for name, part in checkpoint.components.items()
        if name in ("transformer", "text_encoder", "vae")
    }
    return choose(weights, gpu, available_memory())


def place(checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype = torch.bfloat16) -> Any:
    """diffusers' pipeline in `dtype`, placed."""
    if placement.pieces == "layer":
        return _read_by_layer(checkpoint, torch.device(placement.device), dtype)
    pipeline = load_pipeline(checkpoint, dtype)
    if placement.pieces == "component":
        pipeline.enable_model_cpu_offload()
    elif placement.device == "cuda":
        pipeline.to("cuda")
    return pipeline


def _read_by_layer(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    import accelerate

    parts = {}
    for name in ("transformer", "text_encoder"):
        component = checkpoint.components[name]
        model = empty_model(component)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        accelerate.cpu_offload(model, execution_device=device, state_dict=PlainTensors(component, dtype))
        parts[name] = model
    pipeline = load_pipeline(checkpoint, dtype, **parts)
    # diffusers takes the first component that accelerate does not manage for the device everything runs on.
    accelerate.cpu_offload(pipeline.vae, execution_device=device)
    return pipeline
