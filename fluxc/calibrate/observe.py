"""Watches the inputs of every Linear of a module while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fluxc.calibrate.records import BINS, MANTISSA_BITS, LayerInputs

ROWS_A_PROMPT = 4


class Observer:
    """Forward pre-hooks on every Linear of `module`; `take` gives the records since the last `take`."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: dict[str, _Inputs] = {}
        self._handles = [
            child.register_forward_pre_hook(self._hook(name))
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def record(_: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach()
            self._seen.setdefault(name, _Inputs(x.shape[-1], x.device)).add(x.reshape(-1, x.shape[-1]))

        return record

    def take(self) -> dict[str, LayerInputs]:
        """The records by layer name; the next ones start from nothing."""
        records = {name: inputs.record() for name, inputs in self._seen.items()}
        self._seen.clear()
        return records

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Inputs:
    """Running totals of one Linear's inputs, on the device they are computed on."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._amax = 0.0
        self._tokens = 0
        self._histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self._channels = torch.zeros(channels, device=device)
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """`x` [tokens, channels], as the Linear gets it."""
        magnitude = x.abs()
        channels = magnitude.amax(0).float()
        largest = channels.amax().item()
        self._amax = self._amax if math.isnan(self._amax) or self._amax >= largest else largest
        # A NaN keeps its sign bit.
        patterns = (magnitude.bfloat16().view(torch.int16) & 0x7FFF) >> (7 - MANTISSA_BITS)
        self._histogram += torch.bincount(patterns.flatten().int(), minlength=BINS)
        self._squares += x.float().square().sum(0, dtype=torch.float64)
        self._channels = torch.maximum(self._channels, channels)
        # Another token at every call, so that the sample covers the picture and the prompt; the factor is prime.
        self._rows.append(x[7919 * len(self._rows) % len(x)].bfloat16().cpu())
        self._tokens += len(x)

    def record(self) -> LayerInputs:
        chosen = np.linspace(0, len(self._rows) - 1, min(ROWS_A_PROMPT, len(self._rows))).round().astype(int)
        return LayerInputs(
            self._amax,
            self._tokens,
            self._histogram.cpu().numpy(),
            self._squares.cpu().numpy(),
            self._channels.cpu().numpy(),
            torch.stack([self._rows[i] for i in chosen]).float().numpy(),
        )
