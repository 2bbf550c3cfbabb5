"""What a stranger adds: a family or a format is a file and one line of registration, and builds a bundle that generates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxrt
from conftest import RECIPE, compile_into, copy_checkpoint
from fluxc.base.errors import RecipeError
from fluxc.base.safetensors import read_header
from fluxc.build.job import open_job
from fluxc.families.registry import FAMILIES
from fluxc.families.registry import register as register_family
from fluxc.formats.registry import FORMATS
from fluxc.formats.registry import register as register_format
from fluxc.recipe import fields
from fluxc.recipe.load import load_recipe
from fluxrt.bundle import open_bundle
from quick import QUICK


@pytest.fixture
def toy_family() -> Iterator[None]:
    from toys.family_toy import TOY

    register_family(TOY)
    yield
    del FAMILIES[TOY.pipeline_class]


@pytest.fixture
def toy_format() -> Iterator[None]:
    from toys.format_toy import INT8_ROWS

    register_format(INT8_ROWS)
    yield
    del FORMATS[INT8_ROWS.name], fields.FORMATS[INT8_ROWS.name]


@pytest.mark.usefixtures("toy_format")
def test_a_toy_format_builds_a_bundle_that_generates(tmp_path: Path) -> None:
    changes = ("precision.transformer.default=int8-rows", "targets=[{kind: onnxruntime}]")
    out = compile_into(tmp_path / "toy", *QUICK, *changes)
    manifest = open_bundle(out).manifest
    stored = read_header(out / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = [layer.name for layer in manifest.precision if layer.format == "int8-rows"]
    assert len(layers) == 36
    assert {stored[f"{name}.weight"].dtype for name in layers} == {"I8"}
    for entry in open_job(load_recipe(RECIPE, (*QUICK, *changes)), tmp_path).original.plans["transformer"]:
        parts = [ref.nbytes for name, ref in stored.items() if name.rpartition(".")[0] == entry.layer.name]
        assert entry.bytes_after == sum(parts), entry.layer.name
    config = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"] == {"dynamic": False, "num_bits": 8, "type": "int"}
    report = json.loads((out / "report" / "report.json").read_text())
    assert min(layer["snr_db"] for layer in report["layers"] if layer["format"] == "int8-rows") > 35
    assert manifest.fidelity.targets["onnxruntime"]["step_cosine"] > 0.9999
    assert np.asarray(fluxrt.load(out).generate(fluxrt.Request("a small red ring", seed=3)).images[0]).std() > 10


@pytest.mark.usefixtures("toy_format")
def test_a_target_that_has_no_form_for_a_format_refuses_it_by_name() -> None:
    for targets in ("{kind: tensorrt_rtx}", "{kind: visual_gen}"):
        loaded = load_recipe(RECIPE, (*QUICK, "precision.transformer.default=int8-rows", f"targets=[{targets}]"))
        with pytest.raises(RecipeError, match="int8-rows"):
            open_job(loaded, Path("unused"))


@pytest.mark.usefixtures("toy_family")
def test_a_toy_family_builds_a_bundle_that_generates(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    out = compile_into(tmp_path / "toy", *QUICK, f"model.source={checkpoint}", "targets=[{kind: onnxruntime}]")
    manifest = open_bundle(out).manifest
    assert manifest.family == "ToyPipeline"
    figures = manifest.fidelity.targets["onnxruntime"]
    # Embeddings of the toy's own layers, as diffusers takes them, and not of klein's.
    assert figures["text_error"] < 1e-3
    assert figures["step_cosine"] > 0.99
    layers = {
        name.split(".")[2] for name in read_header(out / "text_encoder" / "model.safetensors") if "layers" in name
    }
    assert layers == {str(number) for number in range(21)}
    image = np.asarray(fluxrt.load(out).generate(fluxrt.Request("a small red ring", seed=3)).images[0])
    assert image.shape == (64, 64, 3)
    assert image.std() > 10


@pytest.fixture
def toy_target() -> Iterator[None]:
    from fluxc.recipe.targets import TARGETS
    from fluxc.targets.registry import KINDS
    from fluxrt import manifest as bundle
    from fluxrt.backends import registry as backends
    from toys import target_toy

    assert KINDS["toy"].options is target_toy.ToyTarget
    yield
    for known in (KINDS, TARGETS, bundle.TARGETS):
        known.pop("toy")
    backends.KINDS.pop(("toy", "cpu"))


def test_a_kind_brings_its_own_pipeline(
    quick_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fluxrt.backends.registry import KINDS, Kind
    from fluxrt.cli import main
    from toys.pipeline_toy import PlainPipeline

    target = open_bundle(quick_bundle).manifest.targets[0]
    kind = Kind(type(target), target.device, 5, lambda *_: None, pipeline=PlainPipeline)
    monkeypatch.setitem(KINDS, (target.kind, target.device), kind)
    with fluxrt.load(quick_bundle, target=target.name, gpus=3) as pipeline:
        assert isinstance(pipeline, PlainPipeline)
        assert pipeline.gpus == 3
    assert pipeline.is_closed
    out = tmp_path / "image.png"
    arguments = [
        "generate",
        str(quick_bundle),
        "--target",
        target.name,
        "--prompt",
        "a",
        "--seed",
        "9",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    assert "no graph was run" in capsys.readouterr().err
    with Image.open(out) as image:
        assert (image.size, image.getpixel((0, 0))) == ((64, 64), (9, 9, 9))
    with pytest.raises(fluxrt.BackendError, match="which this fluxrt cannot run"):
        fluxrt.Pipeline(open_bundle(quick_bundle), target=target.name)


@pytest.mark.usefixtures("toy_target")
def test_a_toy_target_builds_a_bundle_that_generates(workshop: Path) -> None:
    from fluxc.targets.registry import kind_of
    from toys.target_toy import CountingBackend

    out = compile_into(workshop / "toy-target", *QUICK, "targets=[{kind: onnxruntime}, {kind: toy, beads: 7}]")
    manifest = open_bundle(out).manifest
    assert [target.kind for target in manifest.targets] == ["onnxruntime", "toy"]
    figures = manifest.fidelity.targets
    assert figures["toy"]["step_cosine"] == figures["onnxruntime"]["step_cosine"]
    assert manifest.recipe["targets"][1]["beads"] == 7
    toy = load_recipe(RECIPE, ("targets=[{kind: toy}]", "gates={}")).recipe.targets[0]
    assert kind_of("toy").describe(toy) == "a toy: counts the graphs it runs with 10 beads"
    with pytest.raises(RecipeError, match=r"targets\[0\]\.beads: .* no such option, those of kind toy have"):
        load_recipe(RECIPE, ("targets=[{kind: onnxruntime, beads: 7}]",))
    with fluxrt.load(out) as pipeline:
        assert pipeline.target.kind == "onnxruntime"
    before = CountingBackend.runs
    with fluxrt.load(out, target="toy") as pipeline:
        image = np.asarray(pipeline.generate(fluxrt.Request("a small red ring", seed=3)).images[0])
    assert CountingBackend.runs - before == 1 + 3 * 3 + 1
    assert image.std() > 10
