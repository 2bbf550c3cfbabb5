"""Figures and the files they are in: JSON has no infinity, and a figure that there is not is null."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fluxc.base.errors import BuildError
from fluxc.base.numbers import as_json
from fluxc.base.safetensors import read_header
from fluxc.calibrate import weights_stage
from fluxc.fidelity.metrics import ssim
from fluxc.models.base import Linear
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.writer import _Sums
from fluxc.recipe.structs import ComponentPrecision
from fluxc.stepcache.fit import Fit, quality
from fluxc.stepcache.frontier import figures


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_has_not_is_refused_by_name(value: float) -> None:
    with pytest.raises(BuildError, match=rf"^report: targets\.a\.psnr\[1\] came to {value}"):
        as_json({"name": "x", "targets": {"a": {"psnr": [1.0, value]}}}, "report")


def test_a_layer_quantized_without_error_has_no_ratio_and_one_without_a_figure_is_refused(tmp_path: Path) -> None:
    save_file({"layer.weight": np.zeros((64, 64), np.float32)}, tmp_path / "zero.safetensors")
    plan = precision_plan("transformer", [Linear("layer", 64, 64)], ComponentPrecision(default="mxfp4"))
    tensors = read_header(tmp_path / "zero.safetensors")
    inputs = weights_stage.WeightsInputs("transformer", {}, tensors, plan, None, None, "max", None, [])
    (tmp_path / "out").mkdir()
    weights_stage.run(inputs, tmp_path / "out", lambda *_: None)
    (layer,) = json.loads((tmp_path / "out" / weights_stage.LAYERS).read_text(), parse_constant=pytest.fail)
    assert layer["snr_db"] is None
    assert layer["scales"] == "max"
    assert math.isnan(_Sums.decibels(np.array([1.0, math.nan])))


@pytest.mark.parametrize("side", [8, 10, 11])
def test_ssim_of_images_that_its_window_does_not_fit_in_is_none(side: int) -> None:
    image = np.random.default_rng(0).random((side, 64, 3), np.float32)
    assert (ssim(image, image) is None) == (side < 11)


def test_a_constant_explains_nothing() -> None:
    x = np.linspace(0, 1, 4)
    assert quality(Fit((0.0, 1.0), (0.0, 1.0)), x, np.ones(4)).r2 == 0.0


def test_figures_of_small_images_have_no_ssim() -> None:
    image = np.zeros((8, 8, 3), np.float32)
    found = figures(image[None], image[None], [[1]], 4, [{}])
    assert (found["ssim"], found["ssim_worst"], found["by_prompt"][0]["ssim"]) == (None, None, None)
