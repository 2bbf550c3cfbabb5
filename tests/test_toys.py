"""What a stranger adds: a family is its own file and one line of registration, and builds a bundle that generates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fluxrt
from conftest import QUICK, compile_into, copy_checkpoint
from fluxc.base.safetensors import read_header
from fluxc.families.registry import FAMILIES
from fluxrt.bundle import open_bundle


@pytest.fixture
def toy_family() -> Iterator[None]:
    from toys.family_toy import TOY

    FAMILIES[TOY.pipeline_class] = TOY
    yield
    del FAMILIES[TOY.pipeline_class]


@pytest.mark.usefixtures("toy_family")
def test_a_toy_family_builds_a_bundle_that_generates(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    out = compile_into(tmp_path / "toy", *QUICK, f"model.source={checkpoint}", "targets=[{kind: onnxruntime}]")
    manifest = open_bundle(out).manifest
    assert manifest.family == "ToyPipeline"
    figures = manifest.fidelity["targets"]["onnxruntime"]
    # Embeddings of the toy's own layers, as diffusers takes them, and not of klein's.
    assert figures["text_error"] < 1e-3
    assert figures["step_cosine"] > 0.99
    layers = {
        name.split(".")[2] for name in read_header(out / "text_encoder" / "model.safetensors") if "layers" in name
    }
    assert layers == {str(number) for number in range(21)}
    image = np.asarray(fluxrt.load(out)("a small red ring", seed=3).images[0])
    assert image.shape == (64, 64, 3)
    assert image.std() > 10
