"""Second moments of the inputs of Linears, sum x x^T, gathered while a model runs; what rounding them to NVFP4 makes wrong of
each channel; and some inputs apart, to judge by."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import nn

from fluxc.calibrate.solve_needs import NOISE_ROWS
from fluxc.formats.registry import FORMATS
from fluxc.running.lockstep import CALL

PANEL = 1024
"""Columns that are multiplied at a time: a moment and its mirror image are computed once."""
ROWS_AT_A_TIME = 512
HELD_OUT_EVERY, HELD_OUT_FROM = 8, 5
"""Every eighth call is held out, the sixth first; with fewer than eight calls none."""
HELD_OUT_ROWS = 256
"""Inputs kept of all calls that are held out."""


def held_out(calls: int) -> list[int]:
    """The numbers of the calls that are held out of so many."""
    return list(range(HELD_OUT_FROM, calls, HELD_OUT_EVERY)) if calls >= HELD_OUT_EVERY else []


class Moments:
    """Forward pre-hooks on the Linears `layers` of `module`, while `calls` calls of it run, each of which calls them once.

    What is gathered of a layer is there from its first call until `take`. Of layers in `sampled`, the inputs that are
    rounded are kept.
    """

    def __init__(self, module: nn.Module, layers: Iterable[str], calls: int, sampled: Container[str] = ()) -> None:
        self._held_out = held_out(calls)
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._noise: dict[str, torch.Tensor] = {}
        self._sampled = sampled
        self._samples: dict[str, list[torch.Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._rounded_every = calls
        for layer in layers:
            module.get_submodule(layer).register_forward_pre_hook(self._hook(layer))

    def _hook(self, layer: str) -> Callable[[nn.Module, Any], None]:
        def gather(_: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach()
            x = x.reshape(-1, x.shape[-1])
            self._counts[layer] = self._counts.get(layer, 0) + 1
            if CALL.get(0) in self._held_out:
                step = -(-len(x) * len(self._held_out) // HELD_OUT_ROWS)
                self._rows.setdefault(layer, []).append(x[::step].clone())
                return
            size = x.shape[1]
            sums = self._sums.get(layer)
            if sums is None:
                sums = self._sums[layer] = torch.zeros(size, size, device=x.device)
            step = -(-len(x) * self._rounded_every // NOISE_ROWS)
            self._noise[layer] = self._noise.get(layer, 0.0) + _lost(x[::step].float())
            if layer in self._sampled:
                self._samples.setdefault(layer, []).append(x[::step].clone())
            # Few rows at a time, or threads part the sum over them.
            for rows in x.float().split(ROWS_AT_A_TIME):
                for first in range(0, size, PANEL):
                    last = first + PANEL
                    sums[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])

        return gather

    def calls_of(self, layer: str) -> int:
        """How many calls of `layer` there were."""
        return self._counts.get(layer, 0)

    def noise_of(self, layer: str) -> torch.Tensor:
        """fp32 [in]: squares of what rounding inputs of `layer` to NVFP4 makes wrong of each channel; let go of here."""
        return self._noise.pop(layer).float()

    def samples_of(self, layer: str) -> torch.Tensor | None:
        """fp32 [rows, in]: the inputs of `layer` that were rounded, or None; let go of here."""
        found = self._samples.pop(layer, None)
        return None if found is None else torch.cat(found).float()

    def take(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The second moments of `layer` fp32 [in, in], and inputs fp32 [rows, in] of the calls that were held out, or none;
        they are let go of here."""
        sums = self._sums.pop(layer)
        for first in range(0, len(sums), PANEL):
            last = first + PANEL
            sums[last:, first:last] = sums[first:last, last:].T
        rows = self._rows.pop(layer, [])
        return sums, torch.cat(rows).float() if rows else torch.empty(0, sums.shape[1], device=sums.device)


def _lost(x: torch.Tensor) -> torch.Tensor:
    """fp64 [in]: squares of what rounding `x` fp32 [rows, in] loses, under the range that calibration gives such inputs."""
    format = FORMATS["nvfp4"]
    rounded = format.fake_quantize(x, format.tensor_scale(x.abs().amax() * format.margin))
    return (rounded - x).square().sum(0, dtype=torch.float64)
