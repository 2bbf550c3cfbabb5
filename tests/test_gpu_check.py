"""`fluxc gpu-check`: rehearsed end to end on fakes of CUDA and TensorRT, and what it does about faults, crashes and hangs.

No check here ran on a GPU.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import failing_checks
from fluxc.base.errors import BuildError
from fluxc.cli.main import main
from fluxc.gpu_check import images as images_module
from fluxc.gpu_check import machine as machine_module
from fluxc.gpu_check import runner
from fluxc.gpu_check.blocks import check_block_plans
from fluxc.gpu_check.checks import Check, bounds_of, checks_for
from fluxc.gpu_check.child import Ended, Found
from fluxc.gpu_check.copies import profiled
from fluxc.gpu_check.images import check_graphs, check_images, read_image
from fluxc.gpu_check.machine import Inventory, check_machine
from fluxc.gpu_check.memory import check_memory
from fluxc.gpu_check.place import GpuPlace
from fluxc.gpu_check.plan_runner import PlanRunner, running, timed
from fluxc.gpu_check.ranks import check_kill, check_ranks
from fluxc.gpu_check.record import read_record, write_record
from fluxc.gpu_check.runner import gpu_check, outcome_of, page_of
from fluxc.gpu_check.stages import faults_of
from fluxc.gpu_check.subject import REHEARSED, Subject, recorded_images
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxc.rehearsal.place import MadeUpPlace
from fluxc.targets.tensorrt.audit import Expected
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import open_bundle
from fluxrt.errors import BackendError, BundleError, RequestError
from fluxrt.sharding import sizes_of
from test_serving import bundle as sharded_bundle  # noqa: F401
from test_tensorrt import rtx_bundle  # noqa: F401

MACHINE = Inventory(MadeUpPlace().describe(), {}, {"onnxruntime": None, "onnxruntime-2gpus": None})
OF_RTX = [f"{name}:tensorrt_rtx" for name in ("images", "graphs", "stages", "memory", "steps", "start", "copies")]


@pytest.fixture
def bundle(rtx_bundle: Path) -> Path:  # noqa: F811
    return rtx_bundle


def subject_of(bundle: Path, tmp_path: Path, place: MadeUpPlace, **settings: Any) -> Subject:
    folders = [str(tmp_path / name) for name in ("kernels", "pictures", "cache")]
    return Subject(place, str(bundle), "tensorrt_rtx", REHEARSED, *folders, settings)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_rehearsal_runs_every_check_and_goes_on_from_its_file(bundle: Path, tmp_path: Path) -> None:
    """All checks, in their processes, on the fakes; then the same command again, which has nothing left to do."""
    out = tmp_path / "day.json"
    code, said = invoke("gpu-check", bundle, "--dry-run", "--out", out)
    assert code == 0, said
    record = read_record(out)
    assert list(record.checks) == ["machine", "bundle", *OF_RTX, "block-plans:tiny", "block-torch:tiny"]
    assert {found.status for found in record.checks.values()} == {"passed"}, said
    for file in (out, page_of(out)):
        assert "REHEARSAL: a made-up GPU on a CPU. No figure" in file.read_text().splitlines()[0]
    figures = {name: found.figures for name, found in record.checks.items()}
    images = figures["images:tensorrt_rtx"]["images"]
    assert [row["psnr_db"] > 30 and row["diffusers_psnr_db"] > 30 for row in images] == [True] * 3
    assert images[0]["sha256"] == images[2]["sha256"]
    assert all((tmp_path / row["file"]).is_file() for row in images)
    assert images[0]["file"] in page_of(out).read_text()
    assert {row["latents_that_differ"] for row in figures["graphs:tensorrt_rtx"]["images"]} == {0}
    assert len(figures["stages:tensorrt_rtx"]["step_cosine"]) == 3
    assert figures["stages:tensorrt_rtx"]["not_compared"] == []
    memory = figures["memory:tensorrt_rtx"]
    assert memory["held_bytes"].keys() == {"weights", "buffers", "working memory"}
    assert memory["elsewhere_bytes"] >= 0
    assert figures["steps:tensorrt_rtx"]["step"]["count"] == REHEARSED.steps
    assert figures["start:tensorrt_rtx"].keys() == {"cold", "warm"}
    plans = figures["copies:tensorrt_rtx"]["plans"]
    assert (plans["double"]["calls"], plans["single"]["calls"]) == (2, 6)
    assert plans["double"]["graph_ms"] > 0
    assert figures["block-plans:tiny"]["format"] == "nvfp4"
    assert record.ran.files["engines/tensorrt_rtx/single.plan"]
    before = out.read_bytes()
    code, said = invoke("gpu-check", bundle, "--dry-run", "--out", out)
    assert code == 0
    assert said.count(": known (passed)") == len(record.checks)
    assert out.read_bytes() == before
    code, said = invoke("add-evidence", bundle, out)
    assert code == 1
    assert "a rehearsal on a made-up GPU, of which no figure means anything" in said


def test_without_a_gpu_the_rehearsal_is_named(bundle: Path, tmp_path: Path) -> None:
    code, said = invoke("gpu-check", bundle, "--out", tmp_path / "day.json")
    assert code == 1
    assert "gpu-check needs a GPU: " in said
    assert "`fluxc gpu-check --dry-run` rehearses the checks" in said
    assert list(tmp_path.iterdir()) == []


def test_bad_words_on_the_command_line_are_refused(bundle: Path, tmp_path: Path) -> None:
    code, said = invoke("gpu-check", bundle, "--dry-run", "--out", tmp_path / "day.html")
    assert code == 2
    assert "give a name that ends in .json" in said
    code, said = invoke("gpu-check", bundle, "--dry-run", "--out", tmp_path / "day.json", "--again", "stps")
    assert code == 2
    assert "--again stps: no check has this name; did you mean 'steps'" in said
    code, said = invoke("gpu-check", tmp_path / "nothing", "--dry-run", "--out", tmp_path / "day.json")
    assert code == 1
    assert "no such bundle folder" in said


def few_checks(counter: Path) -> Callable[..., list[Check]]:
    names = ("crashes", "hangs", "fails", "breaks", "comes_to_nan", "does_not_apply", "passes")
    works = [getattr(failing_checks, name) for name in names]

    def checks(*_: object) -> list[Check]:
        settings = {"counter": str(counter)}
        return [Check(w.__name__, "", "", w, 3 if w.__name__ == "hangs" else 60, settings=settings) for w in works]

    return checks


def test_failures_crashes_and_hangs_are_recorded_and_the_rest_goes_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends its own process alone, is in the file, and is not repeated unless asked for, or under another version."""
    counter, out = tmp_path / "counter", tmp_path / "day.json"
    monkeypatch.setattr(runner, "checks_for", few_checks(counter))
    lines = list(gpu_check(bundle, out, MadeUpPlace(), REHEARSED))
    assert lines[-1].endswith("1 crashed, 3 failed, 1 passed, 1 skipped, 1 timed out")
    checks = read_record(out).checks
    assert "ended by SIGABRT" in checks["crashes"].why
    assert "what the library said" in checks["crashes"].log
    assert checks["hangs"].why == "not done after 3 s, and ended"
    assert checks["fails"].why == "cuMemAlloc failed: CUDA_ERROR_NOT_PERMITTED"
    assert checks["breaks"].why == "ZeroDivisionError: one by none"
    assert "failing_checks.py" in checks["breaks"].log
    assert (checks["comes_to_nan"].why, checks["comes_to_nan"].figures) == ("psnr[0] came to nan", {"psnr": [None]})
    assert (checks["does_not_apply"].status, checks["passes"].status) == ("skipped", "passed")
    assert "crashed" in page_of(out).read_text()

    lines = list(gpu_check(bundle, out, MadeUpPlace(), REHEARSED))
    assert "hangs: known (timed out)" in lines
    assert counter.read_text() == "x"
    list(gpu_check(bundle, out, MadeUpPlace(), REHEARSED, ("pass*",)))
    assert counter.read_text() == "xx"
    record = read_record(out)
    assert record.checks["hangs"] == checks["hangs"]
    other = msgspec.structs.replace(record.ran, versions={**record.ran.versions, "tensorrt-rtx-cu13": "1.8"})
    write_record(out, msgspec.structs.replace(record, ran=other, checks={"passes": record.checks["passes"]}))
    monkeypatch.setattr(runner, "checks_for", lambda *_: few_checks(counter)()[-1:])
    lines = list(gpu_check(bundle, out, MadeUpPlace(), REHEARSED))
    assert "are others than those of its checks, which are all repeated" in lines[0]
    assert counter.read_text() == "xxx"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bundle": "f" * 64}, "holds checks of another bundle"),
        ({"gpu": "0123456789ab"}, "holds checks of another GPU"),
        ({"rehearsal": False}, "holds checks of a GPU; give another --out"),
    ],
)
def test_a_file_about_something_else_is_not_overwritten(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    out = tmp_path / "day.json"
    monkeypatch.setattr(runner, "checks_for", lambda *_: [])
    monkeypatch.setattr(runner, "run_limited", lambda work, arguments, limit: Ended("returned", 0.0, work(*arguments)))
    list(gpu_check(bundle, out, MadeUpPlace(), REHEARSED))
    machine = machine_module.look(MadeUpPlace(), str(bundle))
    device = msgspec.json.decode(msgspec.json.encode(machine.device))
    if "gpu" in changes:
        device["gpus"][0]["id"] = changes["gpu"]
    digest = changes.get("bundle", runner.digest_without_entries(open_bundle(bundle).manifest))
    record = runner.new_record(runner.Ran("n", digest, {}, device, {}), changes.get("rehearsal", True))
    write_record(out, record)
    before = out.read_bytes()
    with pytest.raises(BuildError, match=said):
        list(gpu_check(bundle, out, MadeUpPlace(), REHEARSED))
    assert out.read_bytes() == before
    out.write_bytes(before.replace(b'"n"', b'"m"'))
    with pytest.raises(BuildError, match=r"its seal .* is not that of what it holds"):
        list(gpu_check(bundle, out, MadeUpPlace(), REHEARSED))


class ForgetfulDriver(FakeDriver):
    """Its graphs do all that was recorded when they are first launched, and less every time after."""

    def launch(self, graph: int) -> None:
        super().launch(graph)
        self.graphs[graph] = self.graphs[graph][:-1]


@dataclass(frozen=True)
class Forgetful(MadeUpPlace):
    def driver(self) -> FakeDriver:
        return ForgetfulDriver(self.gpu)


@dataclass(frozen=True)
class Refusing(MadeUpPlace):
    def driver(self) -> FakeDriver:
        return FakeDriver(self.gpu, refuses_capture=True)


@dataclass(frozen=True)
class Hungry(MadeUpPlace):
    """Its plans want more working memory than was read from them."""

    def backend(self, bundle: Any, target: Any, driver: Any, captures: bool) -> TensorRTBackend:
        library = FakeLibrary(bundle, target, driver)
        library.scratch = dict.fromkeys(library.scratch, 48 << 20)
        return TensorRTBackend(bundle, target, driver, library, captures=captures)


@pytest.fixture
def one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "recorded_images", lambda *given: recorded_images(*given)[:1])


@pytest.mark.usefixtures("one_image")
def test_launched_graphs_that_do_less_are_found(bundle: Path, tmp_path: Path) -> None:
    found = check_graphs(subject_of(bundle, tmp_path, Forgetful()))
    assert any("values of pixels differ between eager calls and captured steps" in fault for fault in found.faults)


@pytest.mark.usefixtures("one_image")
def test_a_fallback_from_graphs_is_a_fault(bundle: Path, tmp_path: Path) -> None:
    found = check_graphs(subject_of(bundle, tmp_path, Refusing()))
    assert found.faults
    assert all("a fallback: " in fault and "CUDA graph" in fault for fault in found.faults)


def test_images_that_are_not_the_recorded_ones_are_faults(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that gives the recorded images passes; one that gives noise, and another each time, does not."""
    opened = open_bundle(bundle)
    recorded = recorded_images(opened, opened.target("tensorrt_rtx"))
    right = [(read_image(opened, image.file) * 255).round().astype(np.uint8) for image in recorded]
    rng = np.random.default_rng(0)

    def found(images: list[np.ndarray]) -> Found:
        left = iter(images)
        pipeline = SimpleNamespace(
            notes=["a note"],
            generate=lambda request: SimpleNamespace(images=[Image.fromarray(next(left))], seconds={"text": 0.1}),
        )

        @contextlib.contextmanager
        def load(self: Subject, captures: bool = True) -> Iterator[Any]:
            yield SimpleNamespace(pipeline=pipeline, seconds=0.5)

        monkeypatch.setattr(Subject, "load", load)
        return check_images(subject_of(bundle, tmp_path, MadeUpPlace(), image_psnr_db=30))

    assert found(right).faults == []
    assert found(right).figures["notes"] == ["a note"]
    wrong = found([*right[:2], rng.integers(0, 256, right[0].shape, dtype=np.uint8)])
    last, mean = wrong.figures["images"][2], np.mean([row["diffusers_psnr_db"] for row in wrong.figures["images"]])
    assert [fault.partition(" (")[0] for fault in wrong.faults] == [
        f"{last['prompt']!r} is at {last['psnr_db']:.1f} dB of the image onnxruntime-nvfp4 recorded",
        "the first request, asked again, gave another image: eager and launched steps differ, or memory does",
        f"images are at {mean:.1f} dB of diffusers' on average",
    ]


def test_ranks_generate_and_the_killed_one_is_named(sharded_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    """On processes of the CPU, which stand in for GPUs."""
    subject = replace(subject_of(sharded_bundle, tmp_path, MadeUpPlace()), target="onnxruntime-2gpus")
    found = check_ranks(subject)
    assert (found.faults, found.figures["ranks"], len(found.figures["images"])) == ([], 2, 2)
    found = check_kill(subject)
    assert found.faults == []
    assert found.figures["said"].startswith("rank 1 of 2")
    names = [check.name for check in checks_for(open_bundle(sharded_bundle), MACHINE, REHEARSED, True)]
    assert {"ranks:onnxruntime-2gpus", "kill:onnxruntime-2gpus"} <= set(names)


def test_working_memory_beyond_the_audits_is_a_fault(bundle: Path, tmp_path: Path) -> None:
    found = check_memory(subject_of(bundle, tmp_path, Hungry()))
    assert found.figures["held_bytes"]["working memory"] == 48 << 20
    assert ["the prediction of memory is wrong" in fault for fault in found.faults] == [True]


@dataclass(frozen=True)
class Building(MadeUpPlace):
    """Plans are built and audited by the library itself, which needs no GPU for it; what runs them is made up."""

    def build(self, request: Any, expected: Any, path: Path) -> dict[str, Any]:
        return GpuPlace().build(request, expected, path)


def test_plans_of_blocks_are_built_for_this_gpu_and_audited(bundle: Path, tmp_path: Path, shared_cache: Path) -> None:
    for capability, chosen in (("12.0", "nvfp4"), ("8.9", "fp8"), ("8.0", "bf16")):
        settings = {"model": "tiny", "capability": capability, "format": chosen}
        subject = replace(subject_of(bundle, tmp_path, Building(), **settings), cache=str(shared_cache))
        found = check_block_plans(subject)
        assert found.faults == []
        assert found.figures["double"]["gemms"] == {chosen: 8}
        assert found.figures["single"]["gemms"] == {chosen: 2}
        # Block scales, and the norms' vectors.
        assert (found.figures["double"]["copied_bytes"] > 1024) == (chosen == "nvfp4")
        assert found.figures["double"]["profiler"] == "says nothing"


def test_stages_beyond_rounding_are_faults(bundle: Path) -> None:
    opened = open_bundle(bundle)
    bounds = bounds_of(opened, opened.target("tensorrt_rtx"))
    assert bounds == {"text_error": 0.15, "prologue_error": 0.15, "decode_error": 0.15}
    good = {"text_error": 0.01, "prologue_error": None, "decode_error": 0.002, "step_cosine": [0.999, 0.99]}
    assert faults_of(good, bounds, 0.98) == []
    bad = {**good, "text_error": 1.4, "decode_error": float("nan"), "step_cosine": [0.999, 0.2, float("nan")]}
    assert [fault.partition(" (")[0] for fault in faults_of(bad, bounds, 0.98)] == [
        "text_error: 1.4",
        "decode_error: nan",
        "the velocity of step 1 has cosine 0.2 to the CPU's",
    ]


def test_targets_that_do_not_fit_are_named(bundle: Path) -> None:
    opened = open_bundle(bundle)
    device = MadeUpPlace().describe()
    reason = "the plans are for compute capability 12.0, this GPU is a H100 with 9.0"
    obstacles = {target.name: reason for target in opened.manifest.targets}
    device["gpus"] = [{**device["gpus"][0], "compute_capability": "9.0"}]
    checks = checks_for(opened, Inventory(device, {}, obstacles), REHEARSED, False)
    named = {check.name: check.skipped for check in checks}
    assert named["target:tensorrt_rtx"] == reason
    assert next(check for check in checks if check.name == "block-plans:tiny").settings["format"] == "fp8"


def test_little_shared_memory_is_named_before_ranks_hang(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "shared_memory", lambda: 64 << 20)
    subject = subject_of(bundle, tmp_path, MadeUpPlace())
    assert check_machine(subject).faults == []
    described = {**MadeUpPlace().describe(), "peers": [[True, False], [False, True]]}
    monkeypatch.setattr(MadeUpPlace, "describe", lambda self: described)
    assert "--shm-size=1g" in check_machine(subject).faults[0]


def test_a_damaged_bundle_is_refused_by_the_name_of_its_file(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    plan = copy / "engines" / "tensorrt_rtx" / "single.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    subject = replace(subject_of(bundle, tmp_path, MadeUpPlace()), bundle=str(copy))
    with pytest.raises(BundleError, match=r"altered: engines/tensorrt_rtx/single\.plan"):
        machine_module.check_bundle(subject)


def test_a_profilers_kernels_are_told_apart(bundle: Path) -> None:
    opened = open_bundle(bundle)
    plan = opened.target("tensorrt_rtx").engine.plans["double"]
    data = opened.path(str(plan.file)).read_bytes()
    expected = msgspec.convert(plan.expected, Expected)
    from fluxc.targets.tensorrt.audit import copying_kernels

    copying = sorted(copying_kernels(data, expected))
    assert copying
    found = profiled({copying[0]: 1.0, "a GEMM": 6.0, "FP4Quantize": 3.0}, data, expected)
    assert (found["kernels_ms"], found["copies_ms"], found["quantize_ms"]) == (10.0, 1.0, 3.0)
    assert "copies_ms" not in profiled({"a GEMM": 6.0}, data, expected)
    assert profiled({}, data, expected) == {"profiler": "says nothing"}


def test_a_real_machine_is_described_from_the_drivers_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a made-up cuda.bindings: two GPUs, of which the second cannot read the first's memory."""
    attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    answers: dict[str, Callable[..., Any]] = {
        "cuDeviceGet": lambda number: number,
        "cuDeviceGetName": lambda length, device: b"NVIDIA H100\0\0",
        "cuDeviceGetAttribute": lambda which, device: {"major": 9, "minor": 0}[which],
        "cuDeviceTotalMem": lambda device: 80 << 30,
        "cuDeviceGetUuid": lambda device: SimpleNamespace(bytes=bytes([device]) * 16),
        "cuDeviceCanAccessPeer": lambda one, other: int(one < other),
    }
    success = SimpleNamespace(name="CUDA_SUCCESS")
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=success),
        CUdevice_attribute=attribute,
        **{name: (lambda *a, answer=answer: (success, answer(*a))) for name, answer in answers.items()},
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr("fluxrt.cuda.count_gpus", lambda: 2)
    monkeypatch.setattr("fluxrt.cuda.first_gpu", lambda: SimpleNamespace(driver="13.0"))
    found = GpuPlace().describe()
    assert [(gpu["name"], gpu["compute_capability"]) for gpu in found["gpus"]] == [("NVIDIA H100", "9.0")] * 2
    assert found["gpus"][0]["id"] != found["gpus"][1]["id"]
    assert found["peers"] == [[True, True], [False, True]]
    assert found["cuda"] == "13.0"
    driver.cuDeviceTotalMem = lambda device: (SimpleNamespace(name="CUDA_ERROR_INVALID_DEVICE"), 0)
    with pytest.raises(BackendError, match="cuDeviceTotalMem failed: CUDA_ERROR_INVALID_DEVICE; check the driver"):
        GpuPlace().describe()


def test_figures_that_json_has_not_fail_a_check() -> None:
    outcome = outcome_of(Ended("returned", 1.0, Found({"a": {"b": (1.0, float("inf"))}, "c": np.inf.__float__()})))
    assert outcome.status == "failed"
    assert outcome.why == "a.b[1] came to inf; c came to inf"
    assert outcome.figures == {"a": {"b": [1.0, None]}, "c": None}


def test_a_plan_runner_gives_everything_back_and_says_what_is_refused(bundle: Path) -> None:
    """Eager, captured and profiled runs, each in a context of its own; a profiler that reports is read."""
    opened = open_bundle(bundle)
    target = opened.target("tensorrt_rtx")
    plan = target.engine.plans["single"]
    data = opened.path(str(plan.file)).read_bytes()
    sizes = sizes_of(2, (8, 8))
    driver = FakeDriver()
    library: Any = FakeLibrary(opened, target, driver)
    library.IProfiler = type("IProfiler", (), {"__init__": lambda self: None})
    with running(driver, library, "single", plan, data, sizes) as runner:
        assert timed(driver, runner, 1)["graph_ms"] > 0
        assert runner.kernels() == {}
        contexts = list(runner._contexts.values())
        assert len(contexts) == 3
        contexts[2].profiler.report_layer_time("a kernel", 0.5)
        contexts[2].profiler.report_layer_time("a kernel", 0.25)
        assert contexts[2].profiler.found == {"a kernel": 0.75}
    driver.close()
    library.not_capturable.add("single")
    with running(driver, library, "single", plan, data, sizes) as runner:
        found = timed(driver, runner, 1)
    assert (found["graph_ms"], found["not_captured"]) == (None, "TensorRT says that single cannot be captured")
    with pytest.raises(RequestError, match="batch 9, tokens 65 was not compiled"):
        PlanRunner(driver, library, "single", plan, data, {**sizes, "batch": 9, "tokens": 65})
