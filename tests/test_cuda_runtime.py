"""fluxrt's GPU backend against fakes of the CUDA driver and of TensorRT (fluxc/rehearsal): what it does and in which order.

Nothing here ran on a GPU. What CUDA and TensorRT do with these calls has not been seen.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from conftest import compile_into, copy_checkpoint
from fluxc.rehearsal.gpu import RTX, FakeDriver, FakeLibrary
from fluxrt.backends.buffers import Buffer, plan_arena, plan_buffers, profile_for, resolve
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.choose import Machine, choose, this_machine
from fluxrt.cuda import CudaDriver, Gpu, OutOfMemoryError, first_gpu
from fluxrt.errors import BackendError, BundleError, RequestError
from fluxrt.install import update
from fluxrt.manifest import Call, Engine, Plan, Port, Program, Target, WeightPort, read_target
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.sharding import sizes_of
from fluxrt.system import has_nvidia_gpu, installed_driver, pairs_apart
from fluxrt.weights import StoredTensor, component_weights, read_weights
from quick import QUICK
from test_tensorrt import RTX as RTX_RECIPE
from test_tensorrt import rtx_bundle  # noqa: F401

PROMPT = "a small white ring at the top on a red background"


@pytest.fixture
def bundle(rtx_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_bundle(rtx_bundle)


def backend_of(bundle: Bundle, driver: FakeDriver, version: str | None = None) -> TensorRTBackend:
    target = bundle.target("tensorrt_rtx")
    return TensorRTBackend(bundle, target, driver, FakeLibrary(bundle, target, driver, version))


def pipeline_of(bundle: Bundle, driver: FakeDriver) -> Pipeline:
    """Everything stays on the GPU, and every text is encoded (test_staged.py has the rest)."""
    pipeline = Pipeline(bundle, target="onnxruntime-nvfp4", memory="resident", text_cache=0)
    pipeline.target = bundle.target("tensorrt_rtx")
    pipeline.backend = backend_of(bundle, driver)
    return pipeline


def test_an_image_goes_through_buffers_capture_and_replay(bundle: Bundle) -> None:
    """Eager, captured, launched: every step of an image, and of the next one, gives what the CPU target gives."""
    driver = FakeDriver()
    pipeline = pipeline_of(bundle, driver)
    expected = (
        Pipeline(bundle, target="onnxruntime-nvfp4").generate(Request([PROMPT, "a large red circle"], steps=4)).images
    )
    generated = pipeline.generate(Request([PROMPT, "a large red circle"], steps=4)).images
    for ours, theirs in zip(generated, expected, strict=True):
        difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
        assert 10 * np.log10(255**2 / np.mean(difference**2)) > 25
    log = [entry for entry in driver.log if not entry.startswith("upload")]
    # Two images of text encoding and decoding each: eager, then captured. Eight steps: one eager, one both ways, and on.
    assert log.count("begin capture") == 3
    steps = log[: log.index("run vae_decoder")]
    assert steps.count("run double") == 2 * 2
    assert steps.count("run single") == 2 * 6
    # The text of the image to where steps read it, then a step's latents to where the next one does.
    assert steps.count("copy") == 1 + 2 * 1
    assert steps.count("launch") == 3
    assert f"captured {8 + 9 + 1 + 1}" in log
    pipeline.backend.close()
    assert driver.closed
    assert driver.blocks == {}


def test_launched_steps_equal_eager_ones(bundle: Bundle) -> None:
    results = []
    for refuses in (False, True):
        driver = FakeDriver(refuses_capture=refuses)
        pipeline = pipeline_of(bundle, driver)
        results.append(np.asarray(pipeline.generate(Request(PROMPT, steps=4)).images[0]))
        notes = pipeline.backend.notes
        assert len(notes) == (1 if refuses else 0)
        assert not refuses or "not captured as a CUDA graph" in notes[0]
    np.testing.assert_array_equal(*results)


def test_a_plan_that_cannot_be_captured_is_launched_and_named(bundle: Bundle) -> None:
    driver = FakeDriver()
    pipeline = pipeline_of(bundle, driver)
    pipeline.backend._trt.not_capturable.add("single")
    pipeline.generate(Request(PROMPT, steps=4))
    assert pipeline.backend.notes == [
        "prologue, body, epilogue: not captured as a CUDA graph, every call is launched: TensorRT says that single cannot be"
    ]
    assert "begin capture" not in driver.log
    assert driver.log.count("run single") == 4 * 6


def test_weights_are_uploaded_once_and_scalars_before_each_launch(bundle: Bundle) -> None:
    driver = FakeDriver()
    pipeline = pipeline_of(bundle, driver)
    pipeline.generate(Request(PROMPT, steps=3))
    first = len(driver.log)
    uploaded = sum(int(entry.split()[1]) for entry in driver.log if entry.startswith("upload"))
    pipeline.generate(Request(PROMPT, steps=3))
    again = driver.log[first:]
    # tokens, mask, latents, columns, guidance; two sigmas a step; the decoder's input.
    assert sum(entry.startswith("upload") for entry in again) == 5 + 3 * 2 + 1
    assert uploaded >= pipeline.backend.held()["weights"] > 500_000
    assert not any(entry.startswith("run") for entry in again if "vae" not in entry and "text" not in entry)


def test_other_sizes_are_captured_anew(bundle: Bundle) -> None:
    """Guidance off is one branch: other buffers, other optimization profile, nothing stale."""
    driver = FakeDriver()
    pipeline = pipeline_of(bundle, driver)
    both = np.asarray(pipeline.generate(Request(PROMPT, steps=3, guidance=1.5)).images[0])
    blocks = len(driver.blocks)
    one = np.asarray(pipeline.generate(Request(PROMPT, steps=3, guidance=1.0)).images[0])
    np.testing.assert_array_equal(np.asarray(pipeline.generate(Request(PROMPT, steps=3, guidance=1.5)).images[0]), both)
    assert len(driver.blocks) == blocks
    assert len(driver.graphs) == 1
    reference = Pipeline(bundle, target="onnxruntime-nvfp4").generate(Request(PROMPT, steps=3, guidance=1.0)).images[0]
    difference = one.astype(np.float64) - np.asarray(reference, np.float64)
    assert 10 * np.log10(255**2 / np.mean(difference**2)) > 25


def test_a_range_of_sizes_generates_what_lies_between(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that no one listed, on a profile that spans it; one token more than the greatest is refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    targets = "targets=[{kind: tensorrt_rtx, shapes: range}, {kind: onnxruntime, activations: nvfp4}]"
    sizes = "sizes=[[64, 64], [32, 96], [96, 96]]"
    ranged = open_bundle(compile_into(workshop / "rtx-ranged", *QUICK, sizes, targets, recipe=RTX_RECIPE))
    pipeline = pipeline_of(ranged, FakeDriver())
    generated = pipeline.generate(Request(PROMPT, steps=2, size=(48, 80)))
    assert generated.images[0].size == (80, 48)
    with pytest.raises(
        RequestError, match=r"size 96x104 .* not compiled; this bundle has .* sizes of 48 to 144 tokens of 8x8"
    ):
        pipeline.generate(Request(PROMPT, steps=2, size=(96, 104)))
    with pytest.raises(RequestError, match=r"size 50x80 .* was not compiled"):
        pipeline.generate(Request(PROMPT, steps=2, size=(50, 80)))
    listed = Pipeline(ranged, target="onnxruntime-nvfp4")
    with pytest.raises(
        RequestError, match=r"size 48x80 .* was not compiled; this bundle has 64x64, 32x96, 96x96; choose"
    ):
        listed.generate(Request(PROMPT, steps=1, size=(48, 80)))


def test_a_model_without_guidance_generates_too(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distilled: one branch, so every shape is fixed and no graph reads a guidance."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = copy_checkpoint(tmp_path / "distilled")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    changes = (f"model.source={source}", "sampling.guidance=1.0")
    distilled = open_bundle(compile_into(workshop / "rtx-distilled", *QUICK, *changes, recipe=RTX_RECIPE))
    assert all(plan.profiles == () for plan in distilled.target("tensorrt_rtx").engine.plans.values())
    assert not distilled.target("tensorrt_rtx").reads("guidance")
    generated = pipeline_of(distilled, FakeDriver()).generate(Request(PROMPT, steps=3)).images[0]
    expected = Pipeline(distilled, target="onnxruntime-nvfp4").generate(Request(PROMPT, steps=3)).images[0]
    difference = np.asarray(generated, np.float64) - np.asarray(expected, np.float64)
    assert 10 * np.log10(255**2 / np.mean(difference**2)) > 25


def test_a_step_without_a_beginning_is_refused(bundle: Bundle) -> None:
    backend = backend_of(bundle, FakeDriver())
    backend.prepare(sizes_of(1, (8, 8)))
    with pytest.raises(BackendError, match=r"graph 'prologue' needs \w+, which nothing has produced"):
        backend.run(("prologue", "body", "epilogue"))
    with pytest.raises(BackendError, match="nothing has produced 'latents'"):
        backend.get("latents")


def test_an_interrupt_in_a_capture_ends_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    pipeline = pipeline_of(bundle, driver)
    pipeline.generate(Request(PROMPT, steps=1))

    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "end_capture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(Request(PROMPT, steps=1))
    assert driver.recording is None


def test_the_weights_on_the_gpu_are_the_files_bytes(bundle: Bundle) -> None:
    """The fused q, k and v of every block lie end to end, and each tensor is there once."""
    engine = bundle.target("tensorrt_rtx").engine
    assert engine is not None
    program = engine.programs["body"]
    stored = component_weights(bundle, program.weights)
    arena = plan_arena(program, engine, stored)
    at = {piece.name: piece.offset for piece in arena.pieces}
    assert len(at) == len(arena.pieces)
    block = "transformer_blocks.1.attn"
    assert at[f"{block}.to_k.weight"] == at[f"{block}.to_q.weight"] + stored[f"{block}.to_q.weight"].nbytes
    assert at[f"{block}.to_v.weight"] == at[f"{block}.to_k.weight"] + stored[f"{block}.to_k.weight"].nbytes
    assert all(offset % 256 == 0 for offset in arena.offsets.values())
    assert {call.prefix for call in program.calls} >= {"transformer_blocks.0.", "single_transformer_blocks.5."}
    driver = FakeDriver()
    pipeline = pipeline_of(bundle, driver)
    pipeline.generate(Request(PROMPT, steps=1))
    address = pipeline.backend._programs["body"].address
    for name, offset in at.items():
        np.testing.assert_array_equal(driver.at(address + offset, stored[name].nbytes), stored[name].read())


def test_compiled_kernels_are_kept_and_found_again(bundle: Bundle, tmp_path: Path) -> None:
    pipeline_of(bundle, FakeDriver()).generate(Request(PROMPT, steps=1))
    kept = sorted((tmp_path / "cache").rglob("*.bin"))
    assert len(kept) == 17
    driver = FakeDriver()
    pipeline = pipeline_of(bundle, driver)
    library = pipeline.backend._trt
    pipeline.generate(Request(PROMPT, steps=1))
    assert library.found == library.compiled
    assert len(library.found) == 17
    kept[0].write_bytes(b"damaged")
    pipeline = pipeline_of(bundle, FakeDriver())
    pipeline.generate(Request(PROMPT, steps=1))
    assert [note for note in pipeline.backend.notes if str(kept[0]) in note]
    assert kept[0].read_bytes() != b"damaged"


# Plans of memory, by hand.


def small_engine(**changes) -> Engine:
    plan = Plan(
        source="a.onnx",
        file="a.plan",
        inputs=(Port("x", "bfloat16", ("branches", "tokens + 4", 8)),),
        outputs=(Port("y", "float32", ("branches", 3)),),
        weights=(WeightPort("q+2", "float4_e2m1", (48, 32), ("q", "k", "v")), WeightPort("s", "float32", (), ("s",))),
        profiles=({"branches": (1, 1, 2), "tokens": (4, 8, 16)},),
    )
    plan = msgspec.structs.replace(plan, **changes)
    calls = (Call("a", "one.", {"y": "z"}), Call("a", "two.", {"x": "w", "y": "z"}))
    return Engine("tensorrt_rtx", "1.0", ("12.0",), {"a": plan}, {"body": Program("w.safetensors", calls, ("z",))})


def stored(**changes: StoredTensor) -> dict[str, StoredTensor]:
    tensors = {}
    for prefix in ("one.", "two."):
        tensors |= {f"{prefix}{name}": StoredTensor("U8", Path("w"), 0, 16 * 16) for name in "qkv"}
        tensors[f"{prefix}s"] = StoredTensor("F32", Path("w"), 0, 4)
    return tensors | changes


def test_buffers_are_counted_from_shapes() -> None:
    sizes = {"branches": 2, "tokens": 6}
    assert resolve((3, "tokens", "tokens + 512", "16*tokens"), sizes) == (3, 6, 518, 96)
    with pytest.raises(BundleError, match="'tokens - 1' is not one of branches, tokens"):
        resolve(("tokens - 1",), sizes)
    assert plan_buffers(small_engine(), sizes) == {
        "x": Buffer("bfloat16", (2, 10, 8)),
        "z": Buffer("float32", (2, 3)),
        "w": Buffer("bfloat16", (2, 10, 8)),
    }
    assert Buffer("bfloat16", (2, 10, 8)).nbytes == 320
    assert Buffer("float4_e2m1", (3, 10)).nbytes == 15


def test_one_buffer_cannot_be_two_tensors() -> None:
    engine = small_engine()
    calls = (Call("a", "one.", {"y": "x"}),)
    engine = msgspec.structs.replace(engine, programs={"body": Program("w.safetensors", calls, ("x",))})
    with pytest.raises(BundleError, match=r"body: plan a wants buffer 'x' as float32 \[2, 3\], another as bfloat16"):
        plan_buffers(engine, {"branches": 2, "tokens": 6})


def test_weights_are_laid_out_aligned_and_together() -> None:
    engine = small_engine()
    arena = plan_arena(engine.programs["body"], engine, stored())
    assert [(piece.name, piece.offset) for piece in arena.pieces] == [
        ("one.q", 0), ("one.k", 256), ("one.v", 512), ("one.s", 768),
        ("two.q", 1024), ("two.k", 1280), ("two.v", 1536), ("two.s", 1792),
    ]  # fmt: skip
    assert arena.offsets == {(0, "q+2"): 0, (0, "s"): 768, (1, "q+2"): 1024, (1, "s"): 1792}
    assert arena.nbytes == 1796


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"two.k": StoredTensor("U8", Path("w"), 0, 100)},
            r"two\.q, two\.k, two\.v come to 612 bytes, a plan takes float4",
        ),
        ({"one.s": StoredTensor("BF16", Path("w"), 0, 4)}, r"'one\.s' is BF16, a plan takes F32"),
    ],
)
def test_weights_of_another_size_or_type_are_refused(changes: dict[str, StoredTensor], says: str) -> None:
    engine = small_engine()
    with pytest.raises(BundleError, match=says):
        plan_arena(engine.programs["body"], engine, stored(**changes))
    lacking = stored()
    del lacking["one.v"]
    with pytest.raises(BundleError, match=r"no tensor 'one\.v'"):
        plan_arena(engine.programs["body"], engine, lacking)


def test_sizes_outside_every_profile_are_refused() -> None:
    plan = small_engine().plans["a"]
    assert profile_for("a", plan, {"branches": 1, "tokens": 16}) == 0
    with pytest.raises(RequestError, match=r"tokens 17 was not compiled: plan a has branches 1 to 2, tokens 4 to 16"):
        profile_for("a", plan, {"branches": 1, "tokens": 17})


# Bad input.


def test_a_plan_altered_by_one_byte_is_not_run(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.root, copy)
    plan = copy / "engines" / "tensorrt_rtx" / "single.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    pipeline = pipeline_of(open_bundle(copy), FakeDriver())
    with pytest.raises(BundleError, match=r"single\.plan: its SHA-256 is not the one"):
        pipeline.generate(Request(PROMPT, steps=1))


def test_a_plan_for_another_gpu_is_refused(bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"for compute capability 12\.0, 12\.1, this GPU is a H100 with 9\.0; choose another"
    ):
        backend_of(bundle, FakeDriver(Gpu("H100", "9.0", "13.0")))


def test_another_version_of_the_library_is_refused(bundle: Bundle) -> None:
    with pytest.raises(
        BackendError,
        match=r"built with tensorrt_rtx 1\.\S+, installed is 2\.0\.0; run `.* install tensorrt-rtx-cu13==1\.\d+\.\d+\.\d+`,",
    ):
        backend_of(bundle, FakeDriver(), version="2.0.0")


def test_unfinished_plans_are_refused(bundle: Bundle) -> None:
    target = bundle.target("tensorrt_rtx")
    plans = {name: msgspec.structs.replace(plan, file=None) for name, plan in target.engine.plans.items()}
    unfinished = msgspec.structs.replace(target, engine=msgspec.structs.replace(target.engine, plans=plans))
    with pytest.raises(BackendError, match=r"built on the GPU itself .* run `fluxc finish"):
        TensorRTBackend(bundle, unfinished, FakeDriver())


def test_without_a_driver_the_way_out_is_named() -> None:
    """The real cuda-bindings, on a machine without libcuda."""
    pytest.importorskip("cuda.bindings")
    with pytest.raises(BackendError, match=r"no NVIDIA driver \(libcuda\) was found .* runs on the CPU with --target"):
        CudaDriver()


def test_without_cuda_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr("fluxrt.cuda.has_nvidia_gpu", lambda: True)
    with pytest.raises(BackendError, match=r"not installed .*; run `.* install 'cuda-bindings>=13'`, or choose"):
        first_gpu()


def test_without_an_nvidia_gpu_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr("fluxrt.cuda.has_nvidia_gpu", lambda: False)
    with pytest.raises(BackendError, match=r"^no NVIDIA GPU was found on this machine") as raised:
        first_gpu()
    assert "install" not in str(raised.value)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, False),
        ({"proc/driver/nvidia/version": "NVRM"}, True),
        ({"dev/dxg": ""}, True),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x030200\n"}, True),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x020000\n"}, False),
        ({"sys/bus/pci/devices/0/vendor": "0x8086\n", "sys/bus/pci/devices/0/class": "0x030000\n"}, False),
    ],
)
def test_an_nvidia_gpu_is_seen_without_its_driver(files: dict[str, str], found: bool, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert has_nvidia_gpu(tmp_path) is found


@pytest.mark.parametrize("capacity", [1000, 500_000, 1_500_000])
def test_out_of_memory_frees_everything_and_says_so(bundle: Bundle, capacity: int) -> None:
    """For the buffers, for the text encoder's weights, for the transformer's."""
    driver = FakeDriver(capacity=capacity)
    pipeline = pipeline_of(bundle, driver)
    with pytest.raises(OutOfMemoryError, match=r"a made-up RTX has no room for .*free again; ask for a smaller size"):
        pipeline.generate(Request(PROMPT, steps=2))
    assert driver.blocks == {}
    assert driver.graphs == {}
    driver.capacity = 1 << 34
    pipeline.generate(Request(PROMPT, steps=2))


def test_an_array_of_another_shape_is_refused(bundle: Bundle) -> None:
    backend = backend_of(bundle, FakeDriver())
    backend.prepare(sizes_of(1, (8, 8)))
    with pytest.raises(RequestError, match=r"text has shape \[2, 32, 96\], the plans were compiled for \[1, 32, 96\]"):
        backend.put("text", np.zeros((2, 32, 96), np.float32))
    with pytest.raises(RequestError, match=r"tokens 65 was not compiled"):
        backend.prepare(sizes_of(1, (5, 13)))


def test_bf16_is_rounded_to_nearest_even(bundle: Bundle) -> None:
    import ml_dtypes

    backend = backend_of(bundle, FakeDriver())
    backend.prepare(sizes_of(1, (8, 8)))
    values = np.random.default_rng(0).standard_normal((1, 32, 96)).astype(np.float32)
    values[0, 0, :4] = (1 + 2**-8, 1 + 3 * 2**-8, np.inf, np.nan)
    backend.put("text", values)
    np.testing.assert_array_equal(backend.get("text"), values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 100, (16).to_bytes(8, "little") + b'{"a": {"dtype":1}', (2).to_bytes(8, "little") + b"[]"],
)
def test_a_damaged_weights_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"w\.safetensors: "):
        read_weights(tmp_path / "w.safetensors")


# Choosing.


def with_targets(bundle: Bundle, *targets: Target) -> Bundle:
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, targets=targets))


def test_the_best_target_of_bundle_and_machine_is_chosen(bundle: Bundle) -> None:
    rtx, cpu = bundle.target("tensorrt_rtx"), bundle.target("onnxruntime-nvfp4")
    version = str(rtx.engine.version)
    machine = Machine(RTX, versions={"tensorrt_rtx": version})
    assert choose(with_targets(bundle, cpu, rtx), machine)[0] is rtx
    chosen, obstacles = choose(with_targets(bundle, rtx, cpu), Machine(None, "no driver"))
    assert chosen is cpu
    assert obstacles == {"tensorrt_rtx": "no driver", "onnxruntime-nvfp4": None}
    _, obstacles = choose(with_targets(bundle, rtx, cpu), Machine(RTX))
    exact = f"pip install 'cuda-bindings>=13' tensorrt-rtx-cu13=={version}`"
    assert str(obstacles["tensorrt_rtx"]).startswith("tensorrt_rtx is not installed; run `")
    assert str(obstacles["tensorrt_rtx"]).endswith(exact)
    newer = read_target({"kind": "newer", "name": "newer", "sharding": "unheard of"})
    _, obstacles = choose(with_targets(bundle, newer, cpu), Machine(None))
    assert obstacles["newer"] == f"this fluxrt cannot run targets of kind 'newer'; {update('fluxrt')}"
    with pytest.raises(BackendError, match=r"no target of this bundle runs on this machine. tensorrt_rtx: .*H100"):
        choose(with_targets(bundle, rtx), Machine(Gpu("H100", "9.0", "13"), versions={"tensorrt_rtx": version}))


def test_a_driver_that_is_too_old_is_named_before_anything_else(bundle: Bundle) -> None:
    """Also for a target whose library is missing: another driver may mean another machine."""
    rtx, cpu = bundle.target("tensorrt_rtx"), bundle.target("onnxruntime-nvfp4")
    cuda = msgspec.structs.replace(cpu, name="onnxruntime-cuda", device="cuda")
    old = Machine(Gpu("RTX 5090", "12.0", "12.8"))
    chosen, obstacles = choose(with_targets(bundle, rtx, cuda, cpu), old)
    assert chosen is cpu
    for name in ("tensorrt_rtx", "onnxruntime-cuda"):
        assert "RTX 5090 supports CUDA 12.8, the libraries need CUDA 13; install NVIDIA's driver 580" in str(
            obstacles[name]
        )


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs)", "580.95.05"),
        ("something else", None),
    ],
)
def test_the_installed_driver_is_read(line: str, version: str | None, tmp_path: Path) -> None:
    assert installed_driver(tmp_path) is None
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert installed_driver(tmp_path) == version


def test_where_cuda_does_not_start_an_old_driver_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxrt.machine.installed_driver", lambda: "570.86.15")
    found = this_machine()
    assert found.gpu is None
    assert found.no_gpu.startswith(
        "NVIDIA's driver 570.86.15 is too old for CUDA 13; install NVIDIA's driver 580 or later"
    )


def test_pairs_of_gpus_are_apart_where_one_way_is_missing() -> None:
    ways = {(0, 1), (1, 0), (0, 2)}
    assert pairs_apart(3, lambda a, b: (a, b) in ways) == ((0, 2), (1, 2))
    assert pairs_apart(1, lambda a, b: False) == ()


def test_of_equal_targets_the_first_is_taken(nano_bundle: Path) -> None:
    assert Pipeline(open_bundle(nano_bundle)).target.name == "onnxruntime"


def test_on_this_machine_a_bundle_generates_with_what_it_can(bundle: Bundle) -> None:
    assert Pipeline(bundle).target.name == "onnxruntime-nvfp4"
