"""The parts of a module, and their weights: read from the checkpoint's files when they are needed, the next one ahead.

A part is a block of a list of blocks, or another child with weights. Its weights are copied from the file, in the type that is
computed in. A table of embeddings on the CPU is not: it stays a map of the file, and the rows that are taken are converted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from fluxc.base.errors import CheckpointError
from fluxc.checkpoint.dequantized import DTYPES, PlainTensors
from fluxc.checkpoint.source import Component


def parts_of(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the parts of `module`, in the order of its children; together they hold all its parameters."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from (f"{full}.{number}" for number in range(len(child)))
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from parts_of(child, f"{full}.")
        elif next(child.parameters(), None) is not None:
            yield full


class PartWeights:
    """Gives the parts of `model`, whose parameters have no data yet, their weights of `component`, in `dtype` on `device`."""

    def __init__(self, model: nn.Module, component: Component, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self._component, self._tensors = component, PlainTensors(component, dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.tables = self._map_tables()
        self.parts = [part for part in parts_of(model) if part not in self.tables]
        self._empty = {part: self._parameters(part) for part in self.parts}
        self._reader = ThreadPoolExecutor(1, "fluxc-read")
        self._ahead: tuple[str, Future[dict[str, torch.Tensor]]] | None = None
        self._next = dict(zip(self.parts, [*self.parts[1:], self.parts[0]], strict=True))
        self._last: str | None = None

    def load(self, part: str, ahead: bool = True) -> None:
        """Give `part` its weights, and, with `ahead`, begin to read those of the part that followed it the last time."""
        if self._last is not None:
            self._next[self._last] = part
        self._last = part
        if self._ahead is not None and self._ahead[0] == part:
            tensors = self._ahead[1].result()
        else:
            self._drop_ahead()
            tensors = self._read(part)
        self._ahead = None
        for name, tensor in tensors.items():
            self._set(name, nn.Parameter(tensor, requires_grad=False))
        following = self._next[part]
        if ahead and following != part:
            self._ahead = following, self._reader.submit(self._read, following)

    def free(self, part: str) -> None:
        """Take the weights of `part` away again."""
        for name, parameter in self._empty[part].items():
            self._set(name, parameter)

    def close(self) -> None:
        """Take all weights away and end the reading thread."""
        self._drop_ahead()
        self._reader.shutdown()
        for part in self.parts:
            self.free(part)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def _parameters(self, part: str) -> dict[str, nn.Parameter]:
        return {f"{part}.{name}": value for name, value in self._model.get_submodule(part).named_parameters()}

    def _read(self, part: str) -> dict[str, torch.Tensor]:
        found = {}
        for name, empty in self._empty[part].items():
            if name not in self._tensors:
                raise CheckpointError(
                    f"{self._component.folder}: has no tensor {name}; use the checkpoint as published"
                )
            tensor = self._tensors[name]
            if tensor.shape != empty.shape:
                raise CheckpointError(
                    f"{self._component.folder}: {name} is {list(tensor.shape)}, expected {list(empty.shape)}; "
                    "use the checkpoint as published"
                )
            found[name] = tensor.to(self._device)
        return found

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, last = name.rpartition(".")
        self._model.get_submodule(owner)._parameters[last] = parameter

    def _map_tables(self) -> list[str]:
        """Map the tables of embeddings that the checkpoint holds in a floating type; names of the parts they are."""
        if self._device.type != "cpu":
            return []
        mapped = []
        for part in parts_of(self._model):
            table = self._model.get_submodule(part)
            ref = self._component.tensors.get(f"{part}.weight")
            if not isinstance(table, nn.Embedding) or ref is None or ref.dtype not in ("BF16", "F16", "F32"):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weight = torch.from_numpy(ref.bytes_view()).view(DTYPES[ref.dtype]).reshape(ref.shape)
            self._set(f"{part}.weight", nn.Parameter(weight, requires_grad=False))
            table.register_forward_hook(self._converted)
            mapped.append(part)
        return mapped

    def _converted(self, _module: nn.Module, _inputs: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self._dtype)
