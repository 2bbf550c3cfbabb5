"""The step cache in the GPU targets: its plans through fakes of CUDA and TensorRT, its 16-bit graphs in ONNX's evaluator.

Nothing here ran on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from conftest import compile_into
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxc.targets.tensorrt.export_onnx import export_onnx
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from quick import QUICK
from test_tensorrt import RTX as RTX_RECIPE

PROMPT = "a small white ring at the top on a red background"
STEPS = 10
CPU = "onnxruntime-nvfp4"


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Bundle:
    """Four of ten steps skipped, for TensorRT-RTX, ONNX Runtime on CUDA in both types, and the CPU."""
    targets = (
        "targets=[{kind: tensorrt_rtx}, {kind: onnxruntime, activations: nvfp4}, "
        "{kind: onnxruntime, device: cuda}, {kind: onnxruntime, device: cuda, dtype: float16}]"
    )
    cache = "step_cache={skip: 4, traced: reference, prompts: prompts/flux2-nano-calibration.txt, frontier: []}"
    steps = ("sampling.steps=10", "calibration.steps=3")
    return open_bundle(compile_into(workshop / "rtx-cached", *QUICK, *steps, cache, targets, recipe=RTX_RECIPE))


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def on_fake_gpu(bundle: Bundle, driver: FakeDriver) -> Pipeline:
    target = bundle.target("tensorrt_rtx")
    backend = TensorRTBackend(bundle, target, driver, FakeLibrary(bundle, target, driver, None))
    return Pipeline(bundle, target=target.name, backend=backend)


@pytest.mark.usefixtures("kernel_cache")
def test_skipped_steps_run_no_block(bundle: Bundle) -> None:
    """A fixed schedule is two CUDA graphs, and nothing between the host and the GPU but two numbers a step."""
    driver = FakeDriver()
    pipeline = on_fake_gpu(bundle, driver)
    result = pipeline.generate(Request(PROMPT))
    assert result.skipped == [bundle.manifest.step_cache.schedule]
    assert len(result.skipped[0]) == 4
    assert not any("signal" in entry for entry in driver.log)
    before = len(driver.log)
    pipeline.generate(Request(PROMPT, seed=1))
    again = driver.log[before:]
    launches = [entry for entry in again if entry == "launch"]
    assert len(launches) >= STEPS
    assert not any(entry.startswith(("run double", "run single")) for entry in again)
    full = FakeDriver()
    on_fake_gpu(bundle, full).generate(Request(PROMPT, step_cache=False))
    # Blocks run eagerly in the first two computed steps: after that they are in a CUDA graph.
    assert driver.log.count("run single") == full.log.count("run single") == 2 * 6


@pytest.mark.usefixtures("kernel_cache")
def test_the_rule_decides_on_the_gpu_as_on_the_cpu(bundle: Bundle) -> None:
    """The change from bf16 plans leads to the CPU target's decisions, under thresholds that no sum grazes."""
    images, skipped = [], []
    for refuses in (False, True):
        driver = FakeDriver(refuses_capture=refuses)
        result = on_fake_gpu(bundle, driver).generate(Request(PROMPT, threshold=0.225))
        images.append(np.asarray(result.images[0]))
        skipped.append(result.skipped[0])
        assert any("run signal_change" in entry for entry in driver.log)
    np.testing.assert_array_equal(*images)
    assert skipped[0] == skipped[1]
    assert Pipeline(bundle, target=CPU).generate(Request(PROMPT, threshold=0.225)).skipped[0] == skipped[0]
    assert len(skipped[0]) == 5
    for threshold in (0.12, 0.5):
        gpu = on_fake_gpu(bundle, FakeDriver()).generate(Request(PROMPT, threshold=threshold)).skipped[0]
        assert Pipeline(bundle, target=CPU).generate(Request(PROMPT, threshold=threshold)).skipped[0] == gpu


@pytest.mark.parametrize("target", ["tensorrt_rtx", "onnxruntime-cuda", "onnxruntime-cuda-float16"])
def test_the_change_in_16_bits_is_the_change(bundle: Bundle, target: str) -> None:
    """The signal graph of each GPU target on the CPU target's tokens, rounded to its type: within that rounding."""
    cpu = Pipeline(bundle, target=CPU)
    entry = bundle.target(target)
    dtype = np.float16 if target.endswith("float16") else ml_dtypes.bfloat16
    graphs = {}
    if entry.kind == "tensorrt_rtx":
        for name in ("signal_signal", "signal_change"):
            graphs[name] = ReferenceEvaluator(onnx.load(bundle.path(entry.engine.plans[name].source)))
    else:
        graphs["signal"] = ReferenceEvaluator(onnx.load(bundle.path(entry.graphs["signal"].file)))
    grid = cpu.grid(None)
    cpu.begin(
        np.random.default_rng(0).standard_normal((1, 64, 32)).astype(np.float32), grid, 1.5, cpu.tokenize([PROMPT, ""])
    )
    previous = {"cpu": np.zeros((1, 64, 128), np.float32), "gpu": np.zeros((1, 64, 128), np.float32)}
    for number, sigma in enumerate((1.0, 0.97, 0.8, 0.3)):
        cpu.backend.put("sigma", np.array(sigma, np.float32))
        cpu.backend.put("previous_signal", previous["cpu"])
        cpu.backend.run(("prologue", "signal"))
        expected = cpu.backend.get("change")
        state = {name: cpu.backend.get(name).astype(dtype) for name in ("hidden", "modulation_img")}
        state["previous_signal"] = previous["gpu"]
        for graph in graphs.values():
            names = [value.name for value in graph.proto_.graph.input]
            given = {name: state[name] for name in names}
            state |= dict(zip(graph.output_names, graph.run(None, given), strict=True))
        assert state["signal"].dtype == state["change"].dtype == np.float32
        if number:
            ours, theirs = state["change"][0] / state["change"][1], expected[0] / expected[1]
            assert ours == pytest.approx(theirs, rel=0.03)
        previous = {"cpu": cpu.backend.get("signal"), "gpu": state["signal"]}


def test_bound_buffers_carry_the_signal(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's CUDA backend on the CPU's provider: same decisions, same images as the plain one, both with weights as
    they are stored. Unfolded ones differ by roundings, which decide some codes of inputs."""
    monkeypatch.setattr(OnnxRuntimeBackend, "_unfolds_once", lambda self: frozenset())
    expected = Pipeline(bundle, target=CPU).generate(Request([PROMPT, "a large red circle"], threshold=0.2))
    pipeline = Pipeline(bundle, target=CPU)
    pipeline.backend = OnnxRuntimeCudaBackend(bundle, bundle.target(CPU), "cpu", ("CPUExecutionProvider",))
    found = pipeline.generate(Request([PROMPT, "a large red circle"], threshold=0.2))
    assert found.skipped == expected.skipped
    for ours, theirs in zip(found.images, expected.images, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_the_signal_is_exported_too(bundle: Bundle, tmp_path: Path) -> None:
    commands = export_onnx(bundle, "tensorrt_rtx", tmp_path / "onnx")
    assert any("signal.onnx" in command for command in commands)
    model = onnx.load(tmp_path / "onnx" / "signal.onnx", load_external_data=False)
    assert {value.name for value in model.graph.input} == {"hidden", "modulation_img", "previous_signal"}
    assert {value.name for value in model.graph.output} == {"signal", "change"}
    assert not msgspec.to_builtins(bundle.target("tensorrt_rtx"))["engine"]["audit"]["signal_change"]["faults"]
