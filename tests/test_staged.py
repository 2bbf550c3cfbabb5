"""Components that take turns, and prompts that are encoded once: the same images in less memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fluxrt
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxrt.backends import onnxruntime as cpu_backend
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle
from fluxrt.cuda import OutOfMemoryError
from fluxrt.group import Group
from fluxrt.memory import DECODE, DENOISE, ENCODE, Need, choose
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.result import Result
from fluxrt.sharding import sizes_of
from fluxrt.texts import Texts
from fluxrt.tiles import BLEND
from ranks import on_every_rank
from test_ulysses import bundle  # noqa: F401
from test_ulysses_gpu import CAPSULE, kernel_cache  # noqa: F401
from test_ulysses_gpu import bundle as gpus  # noqa: F401

RED, RING = "a large red circle at the left", "a small white ring at the top on a red background"
PROMPTS = [RED, RING, RED]
SIZES = sizes_of(2, (8, 8))


def pixels(result: Result) -> list[bytes]:
    return [image.tobytes() for image in result.images]


class Opened(OnnxRuntimeBackend):
    """Notes the graphs that sessions are made of, in order."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.opened: list[str] = []
        self.ran: list[str] = []

    def _open(self, graph: str, path: str, constants: Mapping[str, np.ndarray]) -> Any:
        self.opened.append(graph)
        return super()._open(graph, path, constants)

    def _run_one(self, graph: str) -> None:
        self.ran.append(graph)
        super()._run_one(graph)


def opened(bundle: Bundle, **how: Any) -> tuple[Pipeline, Opened]:  # noqa: F811
    backend = Opened(bundle, bundle.target("onnxruntime-exact"), 1)
    return Pipeline(bundle, target="onnxruntime-exact", backend=backend, **how), backend


@pytest.mark.parametrize(
    "asked", [{}, {"step_cache": False}, {"guidance": 1.0}], ids=["step cache", "every step", "no guidance"]
)
def test_images_are_those_of_a_model_that_stays(bundle: Bundle, asked: dict[str, Any]) -> None:  # noqa: F811
    """To the bit, in one process and in two."""
    request = Request(PROMPTS, seed=3, steps=6, **asked)
    for ranks in (1, 2):
        made = []
        for memory in ("resident", "staged"):
            with fluxrt.load(bundle.root, gpus=ranks, threads=1, memory=memory) as pipeline:
                told: list[tuple[int, int]] = []
                result = pipeline.generate(request, lambda done, total, told=told: told.append((done, total)))
                made.append((pixels(result), result.skipped, told))
        assert made[0] == made[1]
        assert made[0][2] == [(step, 18) for step in range(1, 19)]
    assert ("step_cache" not in asked) == any(made[0][1])


def test_each_component_is_loaded_once_and_alone(bundle: Bundle) -> None:  # noqa: F811
    pipeline, backend = opened(bundle, memory="staged")
    there: list[set[str]] = []
    given: list[set[str]] = []
    pipeline.generate(
        Request(PROMPTS, steps=3),
        lambda *_: there.append(set(backend._sessions)),
        lambda *_: given.append(set(backend._sessions)),
    )
    assert sorted(backend.opened) == sorted({*ENCODE, *DENOISE, *DECODE} - {BLEND})
    assert backend.opened[0] == "text_encoder"
    assert backend.opened[-1] == "vae_decoder"
    assert backend.ran.count("text_encoder") == 2
    assert all(found <= set(DENOISE) for found in there)
    assert given == [{"vae_decoder"}] * 3


@pytest.mark.parametrize("memory", ["staged", "resident"])
def test_a_prompt_that_was_encoded_is_not_encoded_again(bundle: Bundle, memory: Any) -> None:  # noqa: F811
    """Nor is the text encoder loaded for it; another guidance has other branches."""
    pipeline, backend = opened(bundle, memory=memory)
    first = pipeline.generate(Request(RED, steps=2))
    backend.opened.clear()
    again = pipeline.generate(Request(RED, steps=2))
    assert pixels(first) == pixels(again)
    assert "text_encoder" not in backend.opened
    assert backend.ran.count("text_encoder") == 1
    pipeline.generate(Request(RED, steps=2, guidance=1.0))
    assert backend.ran.count("text_encoder") == 2
    fresh, without = opened(bundle, memory=memory, text_cache=0)
    assert [pixels(fresh.generate(Request(RED, steps=2))) for _ in range(2)] == [pixels(first)] * 2
    assert without.ran.count("text_encoder") == 2


def test_the_least_recent_texts_are_forgotten_first() -> None:
    def words(number: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((1, 4), number), np.ones((1, 4), np.int64)

    texts = Texts(250)
    for number in range(2):
        texts.keep(words(number), np.full(100, number, np.uint8))
    assert texts.find(words(0)) is not None
    texts.keep(words(2), np.full(100, 2, np.uint8))
    assert texts.find(words(1)) is None
    assert [int(kept[0]) for number in (0, 2) if (kept := texts.find(words(number))) is not None] == [0, 2]
    texts.keep(words(3), np.zeros(251, np.uint8))
    assert (texts.find(words(3)), texts.nbytes) == (None, 200)
    # Tokens are told apart from their mask, and one prompt of eight from two of four.
    ids = np.zeros((2, 4), np.int64)
    texts.keep((ids, ids), np.zeros(1, np.uint8))
    assert texts.find((ids.reshape(1, 8), ids.reshape(1, 8))) is None
    assert texts.find((ids, ids + 1)) is None


# What ends a request.


@pytest.mark.parametrize("ranks", [1, 2])
def test_finished_images_outlive_an_interrupt(bundle: Bundle, ranks: int) -> None:  # noqa: F811
    """In the second step of the second image: the first is decoded and given, then the interrupt goes on."""
    with fluxrt.load(bundle.root, gpus=ranks, threads=1, memory="staged") as pipeline:
        expected = pixels(pipeline.generate(Request([RED, RING], steps=3)))
        given: dict[int, bytes] = {}

        def interrupted(done: int, total: int) -> None:
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pipeline.generate(
                Request([RED, RING, RED], steps=3),
                interrupted,
                lambda number, image, _: given.setdefault(number, image.tobytes()),
            )
        assert given[0] == expected[0]
        # Ranks make the image they had begun.
        assert list(given) == [0] if ranks == 1 else [0, 1]
        assert pixels(pipeline.generate(Request([RED, RING], steps=3))) == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_that_nobody_takes_are_counted(bundle: Bundle, ranks: int, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """on_image refuses the first of three: it is not called again, and the loss of the others is said."""

    def full(number: int, *_: object) -> None:
        raise OSError(28, f"no room for image {number}")

    with fluxrt.load(bundle.root, gpus=ranks, threads=1, memory="staged") as pipeline:
        with pytest.raises(OSError, match="no room for image 0"):
            pipeline.generate(Request(PROMPTS, steps=2), None, full)
        assert "2 images that had made all their steps are lost" in caplog.text
        assert len(pipeline.generate(Request(PROMPTS, steps=2)).images) == 3


# Which way.


def test_what_does_not_fit_takes_turns() -> None:
    assert choose(Need(90, 100, "memory")) == (
        False,
        "everything at once takes 0.0 GiB of memory, and 0.0 GiB are free",
    )
    assert choose(Need(91, 100, "memory"))[0]
    assert choose(Need(1 << 40, None, "GPU memory")) == (False, "how much GPU memory is free is not known here")


def test_auto_says_what_it_chose(
    bundle: Bundle,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fluxrt")
    pipeline, backend = opened(bundle)
    need = backend.need(SIZES)
    assert need is not None
    files = sum(path.stat().st_size for path in bundle.root.rglob("*.safetensors"))
    assert need.resident > files > 1_000_000
    pipeline.generate(Request(RED, steps=1))
    pipeline.generate(Request(RED, steps=1))
    (line,) = [text for text in caplog.messages if text.startswith("memory:")]
    assert line.startswith("memory: resident, all components stay: everything at once takes 0.0 GiB of memory")
    caplog.clear()
    # What is taken by others meanwhile changes nothing until a larger image is asked for.
    monkeypatch.setattr(cpu_backend, "available_memory", lambda: need.resident)
    pipeline.generate(Request(RED, steps=1))
    assert not [text for text in caplog.messages if text.startswith("memory:")]
    tight, backend = opened(bundle)
    tight.generate(Request(RED, steps=1))
    assert [text for text in caplog.messages if text.startswith("memory: staged, components take turns: everything")]
    assert set(backend._sessions) == {"vae_decoder"}


# On a GPU that is not there.


def on_gpu(bundle: Bundle, memory: Any = "auto", capacity: int = 1 << 34) -> tuple[Pipeline, FakeDriver]:  # noqa: F811
    driver, target = FakeDriver(capacity=capacity), bundle.target("tensorrt_rtx")
    backend = TensorRTBackend(bundle, target, driver, FakeLibrary(bundle, target, driver))
    return Pipeline(bundle, target=target.name, backend=backend, memory=memory), driver


def largest_stage(pipeline: Pipeline) -> int:
    """Bytes that the hungriest stage takes: its weights, all buffers, the working memory of its own plans."""
    backend: Any = pipeline.backend
    buffers = backend._memory[backend._buffer_memory]
    scratch = backend._trt.scratch
    return buffers + max(
        sum(backend._arena(graph).nbytes for graph in stage if graph in backend._engine.programs)
        + max(scratch[name] for name in backend._plans_in([g for g in stage if g in backend._engine.programs]))
        for stage in (ENCODE, DENOISE, DECODE)
    )


def test_components_take_turns_on_a_gpu(gpus: Bundle) -> None:  # noqa: F811
    """Weights, working memory and CUDA graphs of one stage at a time, at addresses of their own: the images are the same."""
    request = Request(PROMPTS, steps=4, step_cache=False)
    stays, driver = on_gpu(gpus, "resident")
    expected = pixels(stays.generate(request))
    turns, other = on_gpu(gpus, "staged")
    for _ in range(2):
        assert pixels(turns.generate(request)) == expected
        assert turns.notes == []
    assert other.most == largest_stage(turns)
    assert other.most < driver.most
    # Per request: text once eagerly and once captured, then known; steps and decoder eagerly, captured, launched.
    assert other.log.count("launch") == 2 * (1 + 12 - 1 + 2) - 1
    turns.close()
    assert other.blocks == {}
    assert other.closed


def test_auto_takes_turns_where_everything_does_not_fit(gpus: Bundle, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    caplog.set_level(logging.INFO, "fluxrt")
    roomy, driver = on_gpu(gpus)
    expected = pixels(roomy.generate(Request(PROMPTS, steps=2)))
    need = roomy.backend.need(SIZES)
    assert need is not None
    assert (need.resident, need.free) == (driver.most, driver.capacity)
    assert "memory: resident" in caplog.text
    capacity = driver.most - 1
    refusing, _ = on_gpu(gpus, "resident", capacity)
    with pytest.raises(OutOfMemoryError, match="load it with --memory staged"):
        refusing.generate(Request(PROMPTS, steps=2))
    tight, other = on_gpu(gpus, "auto", capacity)
    assert pixels(tight.generate(Request(PROMPTS, steps=2))) == expected
    assert other.most < capacity
    assert "memory: staged" in caplog.text


def test_a_capture_that_was_refused_is_not_tried_at_every_turn(gpus: Bundle) -> None:  # noqa: F811
    pipeline, _ = on_gpu(gpus, "staged")
    backend: Any = pipeline.backend
    backend._trt.not_capturable.add("single")
    for _ in range(3):
        pipeline.generate(Request(RED, steps=3, step_cache=False))
    assert len(pipeline.notes) == 1


def test_ranks_agree_on_taking_turns(gpus: Bundle) -> None:  # noqa: F811
    """Rank 1 has too little memory for its part of everything; rank 0 has enough, and takes turns with it."""
    target = gpus.target("tensorrt_rtx-2gpus")

    def work(capacities: tuple[int, int]) -> Callable[[Group], Any]:
        def of_rank(group: Group) -> Any:
            driver = FakeDriver(capacity=capacities[group.rank])
            backend = TensorRTBackend(
                gpus, target, driver, FakeLibrary(gpus, target, driver, None, group), group, CAPSULE
            )
            pipeline = Pipeline(gpus, target=target.name, group=group, backend=backend)
            result = pipeline.generate(Request(PROMPTS, steps=3))
            return SimpleNamespace(
                driver=driver, staged=pipeline._is_staged, images=pixels(result), notes=pipeline.notes
            )

        return of_rank

    roomy = on_every_rank(2, work((1 << 34, 1 << 34)))
    tight = on_every_rank(2, work((1 << 34, int(roomy[1].driver.most * 1.05))))
    assert [rank.staged for rank in roomy + tight] == [False, False, True, True]
    assert tight[0].images == roomy[0].images
    assert len(tight[0].images) == 3
    assert tight[0].driver.most < roomy[0].driver.most
    assert tight[0].notes == tight[1].notes == []


def test_text_is_kept_on_the_host_by_onnxruntime_on_cuda(
    bundle: Bundle,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend for CUDA as it is, on the CPU's provider and graphs."""
    request = Request(PROMPTS, steps=2)
    # On a GPU weights lie as they are stored.
    monkeypatch.setattr(OnnxRuntimeBackend, "_unfolds_once", lambda self: frozenset())
    expected = pixels(Pipeline(bundle, target="onnxruntime-exact").generate(request))
    for memory in ("resident", "staged"):
        backend = OnnxRuntimeCudaBackend(bundle, bundle.target("onnxruntime-exact"), "cpu", ("CPUExecutionProvider",))
        pipeline = Pipeline(bundle, target="onnxruntime-exact", backend=backend, memory=memory)
        assert [pixels(pipeline.generate(request)) for _ in range(2)] == [expected] * 2
        assert set(backend._sessions) == (
            {"vae_decoder"} if memory == "staged" else {*ENCODE, *DENOISE, *DECODE} - {BLEND}
        )
