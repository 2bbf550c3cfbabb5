"""Where the model runs while it is calibrated: on the GPU if there is one, and in pieces if it does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fluxc.checkpoint.safetensors_file import TensorRef
from fluxc.checkpoint.source import Checkpoint, Component
from fluxc.errors import BuildError
from fluxc.reference import load_pipeline

# Left free for activations and the allocator.
ROOM = 0.8
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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


def find_placement(checkpoint: Checkpoint, device: str) -> Placement:
    """The placement on this machine; `device` is auto, cpu or cuda. BuildError if cuda is asked for and not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BuildError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or install torch for CUDA")
    gpu = torch.cuda.mem_get_info()[0] if device != "cpu" and torch.cuda.is_available() else None
    weights = {
        name: sum(2 * math.prod(ref.shape) for ref in part.tensors.values())
        for name, part in checkpoint.components.items()
        if name in ("transformer", "text_encoder", "vae")
    }
    return choose(weights, gpu, _available_memory())


def place(checkpoint: Checkpoint, placement: Placement) -> Any:
    """diffusers' pipeline in bfloat16, placed."""
    if placement.pieces == "layer":
        return _read_by_layer(checkpoint, torch.device(placement.device))
    pipeline = load_pipeline(checkpoint, torch.bfloat16)
    if placement.pieces == "component":
        pipeline.enable_model_cpu_offload()
    elif placement.device == "cuda":
        pipeline.to("cuda")
    return pipeline


def _available_memory(system: Path = Path("/")) -> int:
    """What this process can still take: MemAvailable, or less where its control group (cgroup v2) has a limit."""
    meminfo = (system / "proc/meminfo").read_text()
    found = re.search(r"^MemAvailable: +(\d+) kB$", meminfo, re.MULTILINE)
    if found is None:
        raise BuildError("/proc/meminfo does not say how much memory is available")
    available, group = int(found[1]) * 1024, system / "sys/fs/cgroup"
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return available
    return min(available, limit - used)


class _Files(Mapping[str, torch.Tensor]):
    """A component's weights, read in bfloat16 from its files whenever they are asked for."""

    def __init__(self, component: Component) -> None:
        self._tensors: dict[str, TensorRef] = dict(component.tensors)
        if "lm_head.weight" not in self._tensors and "model.embed_tokens.weight" in self._tensors:
            # Tied in the checkpoint, but accelerate looks every parameter up by its own name.
            self._tensors["lm_head.weight"] = self._tensors["model.embed_tokens.weight"]

    def __getitem__(self, name: str) -> torch.Tensor:
        ref = self._tensors[name]
        data = torch.from_numpy(ref.bytes_view().copy()).view(DTYPES[ref.dtype])
        return data.reshape(ref.shape).bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read_by_layer(checkpoint: Checkpoint, device: torch.device) -> Any:
    import accelerate
    import diffusers
    import transformers

    parts = {}
    for name, library in (("transformer", diffusers), ("text_encoder", transformers)):
        component = checkpoint.components[name]
        model_class = getattr(library, component.class_name)
        with accelerate.init_empty_weights(include_buffers=False):
            if library is diffusers:
                model = model_class.from_config(component.config)
            else:
                model = model_class(model_class.config_class.from_dict(component.config))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        accelerate.cpu_offload(model.eval(), execution_device=device, state_dict=_Files(component))
        parts[name] = model
    pipeline = load_pipeline(checkpoint, torch.bfloat16, **parts)
    # diffusers takes the first component that accelerate does not manage for the device everything runs on.
    accelerate.cpu_offload(pipeline.vae, execution_device=device)
    return pipeline
