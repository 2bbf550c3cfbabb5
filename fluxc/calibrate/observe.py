"""Watches the inputs of every Linear of a module while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fluxc.calibrate.records import BINS, MANTISSA_BITS, LayerInputs
from fluxc.running.lockstep import CALL


class _Totals(NamedTuple):
    """`histogram` int64 [BINS] and `channel_amax` float32 [in], on the input's device."""

    histogram: torch.Tensor
    channel_amax: torch.Tensor


class Observer:
    """Forward pre-hooks on every Linear of `module`; `take` gives the records since the last `take`.

    Calls of PlacedModel.run count apart: each has rows of its own that are kept, and they follow one another in its order.
    """

    def __init__(self, module: nn.Module) -> None:
        self._points: list[dict[int, list[float]]] = []
        self._seen: dict[str, _Inputs] = {}
        self._last: tuple[torch.Tensor, int, _Totals] | None = None
        self._handles = [
            child.register_forward_pre_hook(self._hook(name))
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        ]

    def keep_rows(self, points: list[dict[int, list[float]]]) -> None:
        """Of call number n of the next run, keep the rows points[n]: {time a Linear is called: positions in 0..1 along its
        tokens} (sample.py).
        """
        self._points = points

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def record(_: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach()
            x = x.reshape(-1, x.shape[-1])
            seen, number = self._seen.setdefault(name, _Inputs()), CALL.get(0)
            points = self._points[number] if number < len(self._points) else {}
            seen.add(x, self._totals(inputs[0], x), number, points)

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
        self._times: dict[int, int] = {}
        self._totals: _Totals | None = None
        self._rows: dict[int, list[torch.Tensor]] = {}

    def add(self, x: torch.Tensor, totals: _Totals, number: int, points: dict[int, list[float]]) -> None:
        """`x` [tokens, in], as the Linear gets it in call `number`, with its totals; the rows at `points` are kept."""
        time = self._times[number] = self._times.get(number, 0) + 1
        if self._totals is None:
            self._totals = _Totals(*(total.clone() for total in totals))
        else:
            self._totals.histogram.add_(totals.histogram)
            # torch.maximum keeps a NaN, so one that was seen once is reported.
            torch.maximum(self._totals.channel_amax, totals.channel_amax, out=self._totals.channel_amax)
        positions = points.get(time - 1, [])
        if positions:
            # One by one: a list of rows would go to the GPU as a tensor, for which the stream is waited for.
            kept = sorted({int(position * len(x)) for position in positions})
            self._rows.setdefault(number, []).append(torch.stack([x.select(0, row) for row in kept]).bfloat16())

    def record(self) -> LayerInputs:
        assert self._totals is not None
        histogram, channel_amax = (total.cpu().numpy() for total in self._totals)
        kept = [row for _, rows in sorted(self._rows.items()) for row in rows]
        rows = torch.cat(kept).float().cpu().numpy() if kept else np.empty((0, len(channel_amax)), np.float32)
        return LayerInputs(float(channel_amax.max()), histogram, channel_amax, rows)
