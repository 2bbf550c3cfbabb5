"""Calibration's observer: the largest input of every Linear, and what it must not lose."""

from __future__ import annotations

import math

import torch

from fluxc.calibrate.run import AmaxObserver


def observe(*inputs: float) -> AmaxObserver:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    observer = AmaxObserver(model)
    for value in inputs:
        model(torch.tensor([[0.0, value]]))
    observer.remove()
    model(torch.tensor([[0.0, 1e6]]))
    return observer


def test_the_largest_magnitude_is_kept_until_the_observer_is_removed() -> None:
    assert observe(1.0, -3.0, 2.0).amax == {"0": 3.0}


def test_a_nan_is_never_lost_whenever_it_was_seen() -> None:
    for inputs in ((math.nan, 1.0), (1.0, math.nan), (1.0, math.nan, 2.0)):
        assert math.isnan(observe(*inputs).amax["0"])


def test_an_input_that_is_always_zero_is_recorded() -> None:
    assert observe(0.0).amax == {"0": 0.0}
