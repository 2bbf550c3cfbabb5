"""What becomes a CUDA graph, and when: fluxrt's TensorRT backend on fakes that refuse what a GPU refuses (fluxc/rehearsal).

Nothing here ran on a GPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxrt.backends import upload as uploading
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle
from fluxrt.cuda import OutOfMemoryError
from fluxrt.errors import BundleError
from fluxrt.group import Group
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.sharding import sizes_of
from fluxrt.weights import component_weights
from ranks import on_every_rank
from test_cuda_runtime import PROMPT, pipeline_of
from test_cuda_runtime import bundle as one_gpu  # noqa: F401
from test_tensorrt import rtx_bundle  # noqa: F401
from test_ulysses_gpu import CAPSULE, kernel_cache  # noqa: F401
from test_ulysses_gpu import bundle as ranked  # noqa: F401

STEPS = "prologue, body, epilogue: not captured as a CUDA graph, every call is launched: "


def ran_eagerly(log: list[str]) -> set[str]:
    return {entry for entry in log if entry.startswith("run ")}


def test_what_was_captured_is_kept(one_gpu: Bundle) -> None:  # noqa: F811
    """The second image captures text encoder and VAE, whose working memory is the largest; the third launches alone."""
    driver = FakeDriver()
    pipeline = pipeline_of(one_gpu, driver)
    pipeline.generate(Request(PROMPT, steps=3))
    assert driver.captures == 1
    before = len(driver.log)
    pipeline.generate(Request(PROMPT, steps=3))
    assert driver.captures == 3
    assert not {"run double", "run single"} & ran_eagerly(driver.log[before:])
    before = len(driver.log)
    pipeline.generate(Request(PROMPT, steps=3))
    assert (driver.captures, ran_eagerly(driver.log[before:])) == (3, set())
    assert pipeline.notes == []
    assert pipeline.backend.held()["working memory"] == max(pipeline.backend._trt.scratch.values())


def test_a_backend_that_captures_nothing(one_gpu: Bundle) -> None:  # noqa: F811
    driver, target = FakeDriver(), one_gpu.target("tensorrt_rtx")
    backend = TensorRTBackend(one_gpu, target, driver, FakeLibrary(one_gpu, target, driver), captures=False)
    pipeline = Pipeline(one_gpu, target="onnxruntime-nvfp4", backend=backend)
    image = pipeline.generate(Request(PROMPT, steps=3)).images[0]
    assert (driver.captures, pipeline.notes) == (0, [])
    other = pipeline_of(one_gpu, FakeDriver()).generate(Request(PROMPT, steps=3)).images[0]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(other))


def test_a_graph_that_computes_something_else_is_not_used(one_gpu: Bundle) -> None:  # noqa: F811
    """A context whose addresses are looked up when a graph is launched: every block would get the last one's weights."""
    expected = pipeline_of(one_gpu, FakeDriver()).generate(Request(PROMPT, steps=4)).images[0]
    driver = FakeDriver()
    pipeline = pipeline_of(one_gpu, driver)
    pipeline.backend._trt.late_addresses = True
    image = pipeline.generate(Request(PROMPT, steps=4)).images[0]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    (note,) = pipeline.notes
    assert note.startswith(STEPS + "it left another ")
    assert driver.graphs == {}
    assert driver.log.count("launch") == 1


def test_seconds_and_on_step_wait_for_the_gpu(one_gpu: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    driver = FakeDriver()
    pipeline = pipeline_of(one_gpu, driver)
    pipeline.generate(Request([PROMPT, PROMPT], steps=2))
    idle: list[bool] = []
    clock = time.perf_counter

    def counted() -> float:
        idle.append(driver.is_idle)
        return clock()

    monkeypatch.setattr("fluxrt.pipeline.time.perf_counter", counted)
    pipeline.generate(Request(PROMPT, steps=2), lambda done, total: idle.append(driver.is_idle))
    # The clock at the beginning, after the text, after the steps, before and after the decoder; on_step twice.
    assert idle == [True] * 7


def test_another_library_of_the_thread_may_use_the_gpu(one_gpu: Bundle) -> None:  # noqa: F811
    driver = FakeDriver()
    pipeline = pipeline_of(one_gpu, driver)
    pipeline.generate(Request(PROMPT, steps=1), lambda done, total: driver.make_another_current())
    driver.make_another_current()
    pipeline.generate(Request(PROMPT, steps=1))
    driver.make_another_current()
    pipeline.close()
    assert driver.closed


def test_memory_that_is_refused_at_any_moment_is_given_back(one_gpu: Bundle) -> None:  # noqa: F811
    """Each allocation in turn finds no room: an error that frees everything; where memory cannot be locked, a slower way."""
    driver = FakeDriver()
    pipeline = pipeline_of(one_gpu, driver)
    image = np.asarray(pipeline.generate(Request(PROMPT, steps=1)).images[0])
    count = driver.allocations
    assert count > 10
    outcomes = []
    for number in range(count):
        driver = FakeDriver(fails_at=frozenset({number}))
        pipeline = pipeline_of(one_gpu, driver)
        try:
            np.testing.assert_array_equal(np.asarray(pipeline.generate(Request(PROMPT, steps=1)).images[0]), image)
            outcomes.append("generated")
        except OutOfMemoryError:
            assert driver.blocks == driver.pinned == driver.graphs == {}
            outcomes.append("refused")
    assert outcomes[:2] == ["refused", "refused"]
    assert outcomes.count("generated") == 2 * (outcomes.count("refused") - 2)


def test_a_part_is_read_while_the_gpu_copies_the_one_before(
    one_gpu: Bundle,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several parts each: when one is read from its file, the copy of the last one was asked for and is not done."""
    monkeypatch.setattr(uploading, "PART", 4096)
    driver = FakeDriver()
    backend = pipeline_of(one_gpu, driver).backend
    backend.prepare(sizes_of(1, (8, 8)))
    parts: dict[int, bool] = {}
    read = uploading._Files.read

    def watched(files: uploading._Files, path: Path, offset: int, into: np.ndarray) -> None:
        parts.setdefault(sum(entry.startswith("upload") for entry in driver.log), not driver.is_idle)
        read(files, path, offset, into)

    monkeypatch.setattr(uploading._Files, "read", watched)
    arena = backend._upload("epilogue").arena
    assert list(parts) == list(range(-(-arena.nbytes // 4096)))
    assert len(parts) > 3
    assert list(parts.values()) == [False] + [True] * (len(parts) - 1)


@pytest.mark.parametrize("part", [256, 4096 + 7, 1 << 20])
def test_weights_arrive_in_parts(one_gpu: Bundle, part: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Tensors cut by the end of a part, several in one part: nothing is written over before the GPU has copied it."""
    monkeypatch.setattr(uploading, "PART", part)
    driver = FakeDriver()
    pipeline = pipeline_of(one_gpu, driver)
    backend = pipeline.backend
    backend.prepare(sizes_of(1, (8, 8)))
    program = backend._engine.programs["epilogue"]
    loaded = backend._upload("epilogue")
    stored = component_weights(one_gpu, program.weights)
    assert len(loaded.arena.pieces) > 1
    for piece in loaded.arena.pieces:
        tensor = stored[piece.name]
        np.testing.assert_array_equal(driver.at(loaded.address + piece.offset, tensor.nbytes), tensor.read())
    assert driver.pinned == {}


def test_a_weights_file_that_ends_early_is_named(one_gpu: Bundle, tmp_path: Path) -> None:  # noqa: F811
    driver = FakeDriver()
    backend = pipeline_of(one_gpu, driver).backend
    backend.prepare(sizes_of(1, (8, 8)))
    program = backend._engine.programs["epilogue"]
    arena = backend._upload("epilogue").arena
    stored = component_weights(one_gpu, program.weights)
    short = tmp_path / "short.safetensors"
    last = max((stored[piece.name] for piece in arena.pieces), key=lambda tensor: tensor.offset)
    short.write_bytes(last.file.read_bytes()[: last.offset + last.nbytes - 1])
    moved = {name: dataclasses.replace(tensor, file=short) for name, tensor in stored.items()}
    with pytest.raises(BundleError, match=r"short\.safetensors: ends before its tensors do"):
        uploading.upload(driver, driver.allocate(arena.nbytes), arena, moved)
    assert driver.pinned == {}


# Ranks.


def on_ranks(
    bundle: Bundle,
    images: int,
    prepare: Callable[[int, FakeDriver, FakeLibrary], None] = lambda rank, driver, library: None,
    **request: Any,
) -> list[tuple[FakeDriver, list[str], np.ndarray]]:
    """Of both ranks: driver, notes, and the last image's latents; `prepare` may change what a rank runs on."""
    target = bundle.target("tensorrt_rtx-2gpus")

    def work(group: Group) -> tuple[FakeDriver, list[str], np.ndarray]:
        driver = FakeDriver()
        library = FakeLibrary(bundle, target, driver, None, group)
        prepare(group.rank, driver, library)
        backend = TensorRTBackend(bundle, target, driver, library, group, CAPSULE)
        pipeline = Pipeline(bundle, target=target.name, group=group, backend=backend, text_cache=0)
        for seed in range(images):
            pipeline.generate(Request(PROMPT, seed=seed, **request))
        return driver, pipeline.notes, pipeline.latents()

    return on_every_rank(2, work)


def test_ranks_capture_together_and_keep_it(ranked: Bundle) -> None:  # noqa: F811
    """Rank 0 alone has the VAE, which wants the most working memory: its graphs outlive the first image all the same."""
    (first, notes, latents), (second, _, same) = on_ranks(ranked, 3, steps=3, step_cache=False)
    np.testing.assert_array_equal(latents, same)
    assert notes == []
    assert (first.captures, second.captures) == (3, 1)
    for driver in (first, second):
        # Blocks run eagerly in the first step, and in the second, which captures.
        assert driver.log.count("run double") == 2 * 2
    assert sum(len(block) for block in second.blocks.values()) < sum(len(block) for block in first.blocks.values())


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("not capturable", "rank 1: TensorRT says that double cannot be"),
        ("capture fails", "rank 1: cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
        # What rank 1 computes with other weights reaches rank 0 through the collectives.
        ("other values", "rank 0: it left another "),
    ],
)
def test_one_rank_that_cannot_capture_makes_all_run_eagerly(ranked: Bundle, trouble: str, said: str) -> None:  # noqa: F811
    def prepare(rank: int, driver: FakeDriver, library: FakeLibrary) -> None:
        if rank == 1:
            library.not_capturable |= {"double"} if trouble == "not capturable" else set()
            driver.refuses_capture = trouble == "capture fails"
            library.late_addresses = trouble == "other values"

    found = on_ranks(ranked, 1, prepare, steps=3, step_cache=False)
    for driver, notes, _ in found:
        assert driver.graphs == {}
        assert [note for note in notes if note.startswith(STEPS + said)]
    expected = on_ranks(ranked, 1, steps=3, step_cache=False)
    np.testing.assert_array_equal(found[0][2], expected[0][2])


def test_joining_a_communicator_is_announced(ranked: Bundle) -> None:  # noqa: F811
    """set_communicator waits for all ranks and lets no other thread run: who watches for signs of life is told."""
    told: list[list[tuple[str, float]]] = [[], []]
    target = ranked.target("tensorrt_rtx-2gpus")

    def work(group: Group) -> None:
        group._announce = lambda what, seconds: told[group.rank].append((what, seconds))
        driver = FakeDriver()
        backend = TensorRTBackend(
            ranked, target, driver, FakeLibrary(ranked, target, driver, None, group), group, CAPSULE
        )
        Pipeline(ranked, target=target.name, group=group, backend=backend).generate(Request(PROMPT, steps=1))

    on_every_rank(2, work)
    assert told[0] == told[1]
    joins = [
        (f"plan {plan} to join NCCL's communicator", seconds)
        for plan in ("double", "single")
        for seconds in (120.0, 0.0)
    ]
    assert told[0] == joins
