"""The calls of a component that calibration keeps: a later stage runs it again on them, with no tokenizer, scheduler or VAE.

They are the calls that rows are kept of (sample.py): at most ROWS of a component, spread over prompts, steps and guidance
branches. Tensors that calls share, such as the embeddings of a prompt, are kept once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fluxc.running.lockstep import CALL

FIXED: dict[str, dict[str, Any]] = {"transformer": {"return_dict": False}, "text_encoder": {"use_cache": False}}
"""Arguments that are no tensors, with which a call is made again."""
BF16 = ".bf16"
"""At the end of the name of an array that holds patterns of bfloat16, which numpy has no type for."""

Call = dict[str, torch.Tensor]


@dataclass
class Calls:
    """`calls`: of each, {argument: the digest of its value}; `values` by digest, on the CPU."""

    calls: list[dict[str, str]] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Call:
        return {name: self.values[digest] for name, digest in self.calls[number].items()}

    def __len__(self) -> int:
        return len(self.calls)

    def extend(self, others: Calls) -> None:
        """Add `others` behind these."""
        self.calls += others.calls
        self.values |= others.values

    def arrays(self, component: str) -> dict[str, np.ndarray]:
        """Arrays to be stored, by name: each value under its digest; of each argument, which of the digests in order."""
        digests = sorted(self.values)
        numbers = {digest: number for number, digest in enumerate(digests)}
        arrays = {
            f"{component}/values/{digest}{_suffix(self.values[digest])}": _array(self.values[digest])
            for digest in digests
        }
        for argument in self.calls[0] if self.calls else ():
            used = [numbers[call[argument]] for call in self.calls]
            arrays[f"{component}/arguments/{argument}"] = np.array(used, np.int64)
        return arrays


def of_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Calls]:
    """The calls by component that `arrays` of Calls.arrays hold; KeyError, IndexError or ValueError where they hold none."""
    found: dict[str, Calls] = {}
    arguments: dict[str, dict[str, list[int]]] = {}
    for name, array in sorted(arrays.items()):
        component, kind, what = name.split("/")
        if kind == "values":
            digest, is_bf16, _ = what.partition(BF16)
            tensor = torch.from_numpy(np.array(array))
            value = tensor.view(torch.bfloat16) if is_bf16 else tensor
            found.setdefault(component, Calls()).values[digest] = value
        else:
            arguments.setdefault(component, {})[what] = array.tolist()
    for component, of in arguments.items():
        digests = list(found[component].values)
        for row in zip(*of.values(), strict=True):
            found[component].calls.append({name: digests[number] for name, number in zip(of, row, strict=True)})
    return found


class CallRecorder:
    """A forward pre-hook on `module` that keeps calls; `take` gives those since the last."""

    def __init__(self, module: nn.Module) -> None:
        self._points: list[dict[int, list[float]]] = []
        self._times: dict[int, int] = {}
        self._kept: list[tuple[int, int, dict[str, str]]] = []
        self._values: dict[str, torch.Tensor] = {}
        self._handle = module.register_forward_pre_hook(self._record, with_kwargs=True)

    def keep(self, points: list[dict[int, list[float]]]) -> None:
        """Of call number n of the next run, keep the calls of the module whose numbers are in points[n]."""
        self._points = points

    def _record(self, _: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        number = CALL.get(0)
        time = self._times[number] = self._times.get(number, 0) + 1
        if number >= len(self._points) or time - 1 not in self._points[number]:
            return
        call = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                kept = value.detach().to("cpu", copy=True)
                call[name] = hashlib.sha256(
                    f"{kept.dtype} {tuple(kept.shape)}".encode() + _array(kept).tobytes()
                ).hexdigest()
                self._values.setdefault(call[name], kept)
        self._kept.append((number, time, call))

    def take(self) -> Calls:
        """The calls in the order of the run's, and of each its own; the next ones start from nothing."""
        found = Calls([call for *_, call in sorted(self._kept, key=lambda kept: kept[:2])], self._values)
        self._times, self._kept, self._values = {}, [], {}
        return found


def _suffix(value: torch.Tensor) -> str:
    return BF16 if value.dtype == torch.bfloat16 else ""


def _array(value: torch.Tensor) -> np.ndarray:
    value = value.contiguous()
    array: np.ndarray = (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    return array
