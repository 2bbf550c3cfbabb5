"""`tensorrt` targets: everything but the plans is built anywhere; `fluxc finish` builds the plans where the GPU is.

Full TensorRT cannot be installed here. TensorRT-RTX, which has the same API and builds for a GPU that is not there, stands in
for it, and the GPU is made up; so the plans and their audit are real, the library's name and the GPU are not.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

from conftest import compile_into
from fluxc.base.errors import BuildError
from fluxc.cli.main import main
from fluxc.fidelity.on_target import digest_without_entries, entries_of
from fluxc.fidelity.verify import verify_bundle
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxc.rehearsal.operators import DTYPES, E2M1, OPERATORS
from fluxc.rehearsal.place import MadeUpPlace
from fluxc.report.bundles import page_of, report_of
from fluxc.targets.findings import Finding
from fluxc.targets.tensorrt import finish, library
from fluxc.targets.tensorrt.audit import Audit, Expected
from fluxc.targets.tensorrt.build import build_audited
from fluxc.targets.tensorrt.builder import PlanRequest
from fluxc.targets.tensorrt.finish import finish_bundle
from fluxc.targets.tensorrt.timing import LooseFiles, time_program
from fluxc.targets.tensorrt.trial import Place, try_forms
from fluxc.targets.tensorrt.weight_forms import Baked, bake
from fluxrt.bundle import Bundle, open_bundle, verify_files
from fluxrt.cuda import Gpu
from fluxrt.errors import BackendError, BundleError
from fluxrt.manifest import TensorRTTarget, dimension_size
from fluxrt.pipeline import Pipeline
from fluxrt.weights import component_weights
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
    assert len(lines) == 1 + 17 + 1
    form = "double: weights as inputs are FP4 GEMMs and stay inputs (so are they inside a plan); not timed: no NVIDIA driver"
    assert lines[0].startswith(f"target tensorrt: {form}")
    assert lines[-1].endswith("finished for a made-up RTX PRO (compute capability 12.0, driver 13.0)")
    opened = open_bundle(bundle)
    engine = opened.target("tensorrt").engine
    assert engine is not None
    assert engine.unfinished == []
    assert (engine.version, engine.gpu, engine.driver) == (trt.__version__, GPU.name, GPU.driver)
    assert engine.audit["double"]["gemms"] == {"nvfp4": 8}
    assert engine.audit["double"]["weights"].startswith(form)
    assert {found["read"] for found in engine.audit.values()} == {"program"}
    assert form.partition(";")[0] in " ".join(CliRunner().invoke(main, ["inspect", str(bundle)]).output.split())
    assert all(found["compute_capabilities"] == ["12.0"] for found in engine.audit.values())
    assert opened.manifest.digest != before.digest
    assert next(iter(verify_bundle(bundle, "onnxruntime-nvfp4"))).endswith("match their SHA-256")
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]
    assert list(finish_bundle(bundle, find_gpu=lambda: GPU)) == [f"{bundle}: nothing is left to build"]


@pytest.mark.usefixtures("stand_in")
def test_what_is_finished_is_compared_with_the_evidence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb, on the fakes of the driver and of TensorRT: figures in manifest and report, and the digest of what runs."""
    monkeypatch.setattr(finish, "finish_bundle", partial(finish_bundle, find_gpu=lambda: GPU))
    monkeypatch.setattr("fluxc.gpu_check.place.GpuPlace", lambda: MadeUpPlace(GPU, is_rehearsal=False))
    result = CliRunner().invoke(main, ["finish", str(bundle)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[18].endswith("finished for a made-up RTX PRO (compute capability 12.0, driver 13.0)")
    assert lines[19].startswith("target tensorrt: evidence replayed: text encoder 0.0")
    assert lines[20].endswith("a made-up RTX PRO: tensorrt matched on the target; entries of 1 machines in all")
    opened = open_bundle(bundle)
    verify_files(opened)
    (entry,) = entries_of(opened.manifest)
    assert entry.bundle == digest_without_entries(opened.manifest)
    assert opened.target("tensorrt").engine.unfinished == []
    evidence = opened.manifest.recorded
    assert evidence is not None
    assert evidence.targets["tensorrt"].measured == ()
    rows = entry.checks["evidence:tensorrt"].figures["prompts"]
    assert [row["prompt"] for row in rows] == [recorded.prompt for recorded in evidence.prompts]
    velocity = [stage for stage in rows[0]["stages"] if stage["stage"] == "velocity"]
    assert all(0 < stage["error"] < stage["bound"] for stage in velocity)
    assert {stage["of"] for stage in velocity} == {"2 times what onnxruntime-nvfp4 had when it was built"}
    (tensorrt, _) = report_of(bundle).tiers
    assert (tensorrt.matched, tensorrt.on_target, tensorrt.missing) == ("yes", "yes", "")
    assert "evidence:tensorrt" in page_of(bundle).read_text()


def no_inputs_are_fused(module: ModuleType, request: PlanRequest, expected: Expected, path: Path) -> Audit:
    """A TensorRT that does not multiply in FP4 where weights are inputs."""
    found = build_audited(module, request, expected, path)
    if not expected.matrices or "nvfp4" not in expected.gemms.values():
        return found
    fault = Finding("format", tuple(expected.gemms)[:1], "planned nvfp4, runs as bf16 (gemm)")
    return replace(found, faults=(fault,))


@pytest.mark.usefixtures("stand_in")
def test_where_inputs_are_no_fp4_gemms_every_block_gets_its_weights_inside(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxc.targets.tensorrt.trial.build_audited", no_inputs_are_fused)
    monkeypatch.setattr("fluxc.targets.tensorrt.finish.build_audited", no_inputs_are_fused)
    before = open_bundle(bundle).target("tensorrt").engine
    lines = list(finish_bundle(bundle, find_gpu=lambda: GPU))
    assert "double: weights are FP4 GEMMs only inside a plan, so every block gets one" in lines[0]
    assert "planned nvfp4, runs as bf16 (gemm)" in lines[0]
    opened = open_bundle(bundle)
    engine = opened.target("tensorrt").engine
    assert [call.plan for call in engine.programs["body"].calls] == [
        "double.0", "double.1", "single.0", "single.1", "single.2", "single.3", "single.4", "single.5", "residual",
    ]  # fmt: skip
    assert engine.unfinished == []
    assert "double" not in engine.plans
    assert engine.audit["double.1"]["gemms"]["nvfp4"] >= 8
    assert "only inside a plan" in engine.audit["double.0"]["weights"]
    assert next(iter(verify_bundle(bundle, "onnxruntime-nvfp4"))).endswith("match their SHA-256")
    # The graph beside the weights is the block's own, and computes what the graph with inputs computes.
    plan, made = engine.plans["double.1"], before.plans["double"]
    assert (plan.source, plan.weights) == ("transformer/tensorrt-double.1.onnx", ())
    stored = component_weights(opened, engine.programs["body"].weights)
    rng = np.random.default_rng(0)
    sizes = {"branches": 1, "batch": 1, "tokens": 64}
    feeds = {
        port.name: rng.standard_normal([dimension_size(d, sizes) for d in port.shape]).astype(DTYPES[port.dtype])
        for port in plan.inputs
    }
    weights = {}
    for port in made.weights:
        data = np.concatenate([stored[f"transformer_blocks.1.{name}"].read() for name in port.tensors])
        if port.dtype == "float4_e2m1":
            weights[port.name] = np.stack([data & 15, data >> 4], -1).reshape(port.shape).view(E2M1)
        else:
            weights[port.name] = data.view(DTYPES[port.dtype]).reshape(port.shape)
    (inside,) = ReferenceEvaluator(onnx.load(opened.path(plan.source)), new_ops=OPERATORS).run(None, feeds)
    (inputs,) = ReferenceEvaluator(onnx.load(opened.path(made.source)), new_ops=OPERATORS).run(None, feeds | weights)
    np.testing.assert_array_equal(inside.view(np.uint16), inputs.view(np.uint16))
    assert np.isfinite(inside.astype(np.float32)).all()


@pytest.mark.usefixtures("stand_in")
def test_where_neither_form_is_an_fp4_gemm_the_fault_is_the_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(module: ModuleType, request: PlanRequest, expected: Expected, path: Path) -> Audit:
        if not expected.matrices and "nvfp4" in expected.gemms.values():
            raise BuildError("no kernel for it")
        return no_inputs_are_fused(module, request, expected, path)

    monkeypatch.setattr("fluxc.targets.tensorrt.trial.build_audited", refused)
    monkeypatch.setattr("fluxc.targets.tensorrt.finish.build_audited", refused)
    manifest = (bundle / "bundle.json").read_bytes()
    with pytest.raises(BuildError, match=r"plan double: .*: planned nvfp4, runs as bf16"):
        list(finish_bundle(bundle, find_gpu=lambda: GPU))
    assert (bundle / "bundle.json").read_bytes() == manifest
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.usefixtures("stand_in")
def test_both_forms_are_timed_where_a_gpu_can_be_opened(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the fakes: a run is what ONNX's reference evaluator makes of the graph, so the times mean nothing."""
    opened: list[FakeDriver] = []

    def open_driver() -> FakeDriver:
        opened.append(FakeDriver(GPU))
        return opened[-1]

    def on_fakes(
        made: Bundle, target: TensorRTTarget, program: str, sizes: dict[str, int], driver: Any, _: Any
    ) -> float:
        ((name, plan),) = target.engine.plans.items()
        files = {plan.file: made.path(plan.file)}
        if not plan.weights:
            files["inside.onnx"] = tmp_path / "inside.onnx"
            weights = component_weights(made, target.engine.programs[program].weights)
            block = Baked(before.plans[name], "transformer_blocks.0.", "")
            onnx.save(bake(onnx.load(made.path(plan.source)), block, weights), files["inside.onnx"])
            plan = msgspec.structs.replace(plan, source="inside.onnx")
        loose = LooseFiles(made.root, files, open_bundle(bundle))
        engine = msgspec.structs.replace(target.engine, plans={name: plan})
        target = msgspec.structs.replace(target, engine=engine)
        return time_program(loose, target, program, sizes, driver, FakeLibrary(loose, target, driver))

    before = open_bundle(bundle).target("tensorrt").engine
    monkeypatch.setattr("fluxc.targets.tensorrt.timing.RUNS", 2)
    monkeypatch.setattr("fluxc.targets.tensorrt.trial.time_program", on_fakes)
    entry = open_bundle(bundle).target("tensorrt")
    folder = tmp_path / "plans"
    folder.mkdir()
    place = Place(trt, GPU, open_driver, folder)
    name, choice = try_forms(open_bundle(bundle), entry, place)
    assert (name, choice.form) == ("double", "inputs")
    assert re.search(r"; a run takes \d+\.\d{3} ms with weights as inputs, \d+\.\d{3} ms with them inside$", choice.why)
    assert len(opened) == 2
    for driver in opened:
        assert driver.closed
        assert "launch" in driver.log
    assert not list(folder.iterdir())


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
    with pytest.raises(BuildError, match=r"tensorrt-cu13 is not installed here .* run `.* install 'tensorrt-cu13>=11"):
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
