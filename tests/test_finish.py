"""`tensorrt` targets: everything but the plans is built anywhere; `fluxc finish` builds the plans where the GPU is.

Full TensorRT cannot be installed here. TensorRT-RTX, which has the same API and builds for a GPU that is not there, stands in
for it, and the GPU is made up; so the plans and their audit are real, the library's name and the GPU are not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from conftest import compile_into
from fluxc.base.errors import BuildError
from fluxc.cli.main import main
from fluxc.fidelity.verify import verify_bundle
from fluxc.targets.tensorrt import finish, library
from fluxc.targets.tensorrt.finish import finish_bundle
from fluxrt.bundle import open_bundle
from fluxrt.cuda import Gpu
from fluxrt.errors import BackendError, BundleError
from fluxrt.pipeline import Pipeline
from quick import QUICK
from test_tensorrt import RTX, trt

GPU = Gpu("a made-up RTX PRO", "12.0", "13.0")
TARGETS = "targets=[{kind: tensorrt, compute_capabilities: ['12.0']}, {kind: onnxruntime, activations: nvfp4}]"


@pytest.fixture(scope="module")
def unfinished(workshop: Path) -> Path:
    return compile_into(workshop / "b200", *QUICK, TARGETS, recipe=RTX)


@pytest.fixture
def bundle(unfinished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unfinished, tmp_path / "bundle"))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "load_library", lambda kind: trt)


def test_without_the_gpu_the_bundle_says_what_is_left(bundle: Path) -> None:
    opened = open_bundle(bundle)
    engine = opened.target("tensorrt").engine
    assert engine is not None
    assert engine.version is None
    assert len(engine.unfinished) == len(engine.plans) == 17
    assert not list(bundle.rglob("*.plan"))
    assert all(opened.path(plan.source).is_file() for plan in engine.plans.values())
    assert Pipeline(opened).target.name == "onnxruntime-nvfp4"
    with pytest.raises(BackendError, match=r"built on the GPU itself .* run `fluxc finish"):
        Pipeline(opened, target="tensorrt")
    shown = CliRunner().invoke(main, ["inspect", str(bundle)]).output
    assert "to be built by tensorrt on the GPU" in shown
    assert "not built yet" in shown


@pytest.mark.usefixtures("stand_in")
def test_finish_builds_audits_and_records_where(bundle: Path) -> None:
    before = open_bundle(bundle).manifest
    lines = list(finish_bundle(bundle, find_gpu=lambda: GPU))
    assert len(lines) == 17 + 1
    assert lines[-1].endswith("finished for a made-up RTX PRO (compute capability 12.0, driver 13.0)")
    opened = open_bundle(bundle)
    engine = opened.target("tensorrt").engine
    assert engine is not None
    assert engine.unfinished == []
    assert (engine.version, engine.gpu, engine.driver) == (trt.__version__, GPU.name, GPU.driver)
    assert engine.audit["double"]["gemms"] == {"nvfp4": 8}
    assert all(found["compute_capabilities"] == ["12.0"] for found in engine.audit.values())
    assert opened.manifest.digest != before.digest
    assert next(iter(verify_bundle(bundle, "onnxruntime-nvfp4"))).endswith("match their SHA-256")
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]
    assert list(finish_bundle(bundle, find_gpu=lambda: GPU)) == [f"{bundle}: nothing is left to build"]


@pytest.mark.usefixtures("stand_in")
def test_another_gpu_is_refused_and_the_bundle_stays_as_it_was(bundle: Path) -> None:
    manifest = (bundle / "bundle.json").read_bytes()
    with pytest.raises(
        BuildError, match=r"for compute capability 12\.0, this machine has H100 with 9\.0; finish it on"
    ):
        list(finish_bundle(bundle, find_gpu=lambda: Gpu("H100", "9.0", "13.0")))
    assert (bundle / "bundle.json").read_bytes() == manifest
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.usefixtures("stand_in")
def test_an_altered_graph_is_not_built(bundle: Path) -> None:
    source = bundle / "engines" / "tensorrt" / "single.onnx"
    source.write_bytes(source.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"altered: engines/tensorrt/single\.onnx"):
        list(finish_bundle(bundle, find_gpu=lambda: GPU))
    assert not list(bundle.rglob("*.plan"))


def test_without_the_library_the_extra_is_named(bundle: Path) -> None:
    with pytest.raises(BuildError, match=r"tensorrt-cu13 is not installed here .* pip install 'fluxc\[tensorrt\]'"):
        list(finish_bundle(bundle, find_gpu=lambda: GPU))


def test_without_a_gpu_finish_says_so(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["finish", str(bundle)])
    assert result.exit_code == 1
    assert "no NVIDIA driver (libcuda) was found" in result.output


def test_with_the_library_and_the_gpu_at_hand_a_build_finishes_at_once(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxc.targets.tensorrt.kind.gpu_here", lambda capabilities: capabilities == ("12.0",))
    monkeypatch.setattr("fluxc.targets.tensorrt.kind.installed_version", lambda kind: str(trt.__version__))
    monkeypatch.setattr("fluxc.targets.tensorrt.build.load_library", lambda kind: trt)
    built = open_bundle(compile_into(workshop / "b200-here", *QUICK, TARGETS, recipe=RTX))
    engine = built.target("tensorrt").engine
    assert engine is not None
    assert engine.unfinished == []
    assert json.loads((built.root / "report" / "report.json").read_text())["engines"]["tensorrt"]["audit"]


def test_the_libraries_are_known_by_what_they_build_for() -> None:
    """TensorRT-RTX's list is its own."""
    known = {f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert set(library.LIBRARIES["tensorrt_rtx"].compute_capabilities) == known
