"""Watches the inputs of every Linear of a module while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fluxc.calibrate.records import BINS, MANTISSA_BITS, LayerInputs


class _Totals(NamedTuple):
    """`histogram` int64 [BINS] and `channel_amax` float32 [in], on the input's device."""

    histogram: torch.Tensor
    channel_amax: torch.Tensor


class Observer:
    """Forward pre-hooks on every Linear of `module`; `take` gives the records since the last `take`."""

    def __init__(self, module: nn.Module) -> None:
        self._points: dict[int, list[float]] = {}
        self._seen: dict[str, _Inputs] = {}
        self._last: tuple[torch.Tensor, int, _Totals] | None = None
        self._handles = [
            child.register_forward_pre_hook(self._hook(name))
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        ]

    def keep_rows(self, points: dict[int, list[float]]) -> None:
        """Keep these rows of the following calls: {call: positions in 0..1 along its tokens} (sample.py)."""
        self._points = points

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def record(_: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach()
            x = x.reshape(-1, x.shape[-1])
            seen = self._seen.setdefault(name, _Inputs())
            seen.add(x, self._totals(inputs[0], x), self._points.get(seen.calls, []))

        return record

    def _totals(self, given: torch.Tensor, x: torch.Tensor) -> _Totals:
        """Of `x` [tokens, in]. Members of a fusion group get one tensor, one after the other: it is measured once."""
        if self._last and self._last[0] is given and self._last[1] == given._version:
            return self._last[2]
        # A NaN keeps its sign bit.
        patterns = (x.bfloat16().view(torch.int16) & 0x7FFF) >> (7 - MANTISSA_BITS)
        totals = _Totals(
            count_patterns(patterns),
            x.abs().amax(0).float(),
        )
        self._last = (given, given._version, totals)
        return totals

    def take(self) -> dict[str, LayerInputs]:
        """The records by layer name; the next ones start from nothing."""
        records = {name: inputs.record() for name, inputs in self._seen.items()}
        self._seen.clear()
        self._last = None
        return records

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def count_patterns(patterns: torch.Tensor) -> torch.Tensor:
    """int64 [BINS]: how often each bin's number stands in `patterns`, integers of any shape and device."""
    flat = patterns.flatten()
    return torch.bincount(flat, minlength=BINS) if flat.device.type == "cpu" else add_up(flat)


def add_up(bins: torch.Tensor) -> torch.Tensor:
    """torch.bincount(bins, minlength=BINS) of bins [n] below BINS, without reading back the largest to size the result.

    On a GPU that read waits for everything asked before; on a CPU it costs nothing and bincount is the faster one.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=bins.device)
    one = torch.ones(1, dtype=torch.int64, device=bins.device)
    return counts.index_add_(0, bins.int(), one.expand(len(bins)))


class _Inputs:
    """Running totals of one Linear's inputs. Nothing is read back from the device before `record`."""

    def __init__(self) -> None:
        self.calls = 0
        self._totals: _Totals | None = None
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, totals: _Totals, positions: list[float]) -> None:
        """`x` [tokens, in], as the Linear gets it, with its totals; the rows at `positions` are kept."""
        self.calls += 1
        if self._totals is None:
            self._totals = _Totals(*(total.clone() for total in totals))
        else:
            self._totals.histogram.add_(totals.histogram)
            # torch.maximum keeps a NaN, so one that was seen once is reported.
            torch.maximum(self._totals.channel_amax, totals.channel_amax, out=self._totals.channel_amax)
        if positions:
            # One by one: a list of rows would go to the GPU as a tensor, for which the stream is waited for.
            kept = sorted({int(position * len(x)) for position in positions})
            self._rows.append(torch.stack([x.select(0, row) for row in kept]).bfloat16())

    def record(self) -> LayerInputs:
        assert self._totals is not None
        histogram, channel_amax = (total.cpu().numpy() for total in self._totals)
        rows = (
            torch.cat(self._rows).float().cpu().numpy() if self._rows else np.empty((0, len(channel_amax)), np.float32)
        )
        return LayerInputs(float(channel_amax.max()), histogram, channel_amax, rows)
