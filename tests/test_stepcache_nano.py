"""flux2-nano in 50 steps: what the step cache gains over simply fewer steps, on prompts the model never saw."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from conftest import ROOT, compile_into
from fluxc.fidelity.metrics import psnr
from fluxc.stepcache.frontier import FrontierRequest, generate_all
from fluxrt.bundle import open_bundle
from oracle import follows
from pictures import split_specs

UNSEEN = split_specs()[1][:16]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipes/flux2-nano-50-steps.yaml, traced on 16 prompts, without the frontier."""
    changes = (
        "calibration.prompts=../tests/data/two-prompts.txt",
        "fidelity.prompts=../tests/data/two-prompts.txt",
        "step_cache={skip: 19, prompts: prompts/flux2-nano-calibration.txt, frontier: []}",
    )
    return compile_into(
        tmp_path_factory.mktemp("nano") / "50", *changes, recipe=ROOT / "recipes/flux2-nano-50-steps.yaml"
    )


@pytest.fixture(scope="module")
def generated(bundle: Path) -> dict[str, tuple[np.ndarray, list[list[int]]]]:
    """By method, images fp32 and the steps each skipped."""
    opened = open_bundle(bundle)
    cache = opened.manifest.step_cache
    captions = [spec.caption(number % 3) for number, spec in enumerate(UNSEEN)]
    request = FrontierRequest(captions, 0, cache.steps, opened.manifest.sampling.guidance, cache.size)
    policies = {
        "full": {},
        "static": {"schedule": list(cache.schedule)},
        "dynamic": {"rule": msgspec.to_builtins(cache.rule)},
        "34 steps": {"steps": 34},
    }
    return {
        name: generate_all(opened, "onnxruntime-exact", request, policy, lambda: None)
        for name, policy in policies.items()
    }


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_skipping_beats_fewer_steps_by_far_at_less_compute(generated: dict, mode: str) -> None:
    """At least 16 steps skipped on average, and images 5 dB nearer to the full run's than those of 34 steps."""
    assert np.mean([len(steps) for steps in generated[mode][1]]) >= 16
    assert generated["full"][1] == generated["34 steps"][1] == [[]] * len(UNSEEN)
    full, ours, fewer = (generated[name][0] for name in ("full", mode, "34 steps"))
    gained = [psnr(mine, whole) - psnr(plain, whole) for mine, plain, whole in zip(ours, fewer, full, strict=True)]
    assert np.mean(gained) >= 5


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_oracle_sees_no_difference(generated: dict, mode: str) -> None:
    right = {
        name: [follows(image, spec) for image, spec in zip(generated[name][0], UNSEEN, strict=True)]
        for name in ("full", mode)
    }
    assert right[mode] == right["full"]
    assert sum(right["full"]) == len(UNSEEN)
