"""A pipeline that serves: several threads, callbacks that fail, images kept as they are made, output that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

import fluxrt
from conftest import compile_into
from fluxrt import RequestError
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.bundle import open_bundle, sha256_file
from fluxrt.cli import main
from fluxrt.manifest import decode_manifest, encode_manifest
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.resolve import unused_guidance
from fluxrt.result import Result
from quick import QUICK

PROMPT = "a large red circle at the left on a white background"
OTHER = "a small green square at the top right on a black background"
TOO_LONG = "a red circle and " * 20


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Path:
    """The quick bundle at two sizes, for one process and for two."""
    changes = ("sizes=[[64, 64], [32, 96]]", "targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 2}]")
    return compile_into(workshop / "serving", *QUICK, *changes)


@pytest.fixture(scope="module", params=[1, 2])
def pipeline(request: pytest.FixtureRequest, bundle: Path) -> Any:
    """On one process, and on two ranks."""
    with fluxrt.load(bundle, gpus=request.param, threads=1) as loaded:
        yield loaded


def pixels(result: Result) -> list[np.ndarray]:
    return [np.asarray(image) for image in result.images]


def test_threads_get_their_own_images(pipeline: Any) -> None:
    """Prompts, seeds, sizes and guidance differ, so that buffers that mixed would show."""
    requests = [
        Request(
            (PROMPT, OTHER)[number % 2],
            seed=number,
            size=((64, 64), (32, 96))[number % 3 == 0],
            guidance=1.0 + number % 3,
        )
        for number in range(8)
    ]
    alone = [pixels(pipeline.generate(request)) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: pixels(pipeline.generate(request)), requests * 2))
    for ours, expected in zip(together, alone * 2, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_generating_from_on_step_is_refused_and_waits_for_nothing(pipeline: Any) -> None:
    expected = pixels(pipeline.generate(Request(PROMPT)))
    refused: list[RequestError] = []

    def on_step(done: int, total: int) -> None:
        for call in (lambda: pipeline.generate(Request(OTHER)), pipeline.close):
            with pytest.raises(RequestError, match="in the middle of a request") as error:
                call()
            refused.append(error.value)

    np.testing.assert_array_equal(pixels(pipeline.generate(Request(PROMPT), on_step)), expected)
    assert len(refused) == 2 * 3


class CallersError(Exception):
    pass


def test_what_a_callback_raises_ends_the_request_alone(pipeline: Any) -> None:
    expected = pixels(pipeline.generate(Request([PROMPT, OTHER])))

    def fail(*_: object) -> None:
        raise CallersError

    for callbacks in ({"on_step": fail}, {"on_image": fail}):
        with pytest.raises(CallersError):
            pipeline.generate(Request([OTHER, PROMPT], seed=9), **callbacks)
        np.testing.assert_array_equal(pixels(pipeline.generate(Request([PROMPT, OTHER]))), expected)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompt": [PROMPT, TOO_LONG]}, "tokens long"),
        ({"prompt": PROMPT, "size": (64, 65)}, "was not compiled"),
        ({"prompt": PROMPT, "size": (-64, -64)}, "was not compiled"),
        ({"prompt": PROMPT, "latents": np.zeros((1, 63, 32), np.float32)}, "latents have shape"),
        ({"prompt": PROMPT, "threshold": 0.1}, "no step cache"),
    ],
)
def test_what_the_bundle_cannot_do_is_refused_before_the_first_step(
    pipeline: Any, asked: dict[str, Any], words: str
) -> None:
    steps: list[int] = []
    with pytest.raises(RequestError, match=words):
        pipeline.generate(Request(**asked), lambda done, total: steps.append(done))
    assert steps == []
    assert len(pipeline.generate(Request(PROMPT)).images) == 1


def test_images_are_given_as_they_are_made(pipeline: Any) -> None:
    events: list[Any] = []
    result = pipeline.generate(
        Request([PROMPT, OTHER], seed=4),
        lambda done, total: events.append((done, total)),
        lambda number, image, skipped: events.append((number, np.asarray(image), skipped)),
    )
    assert result.target == pipeline.target.name
    assert [event[:2] for event in events if len(event) == 2] == [(n, 6) for n in range(1, 7)]
    assert [len(event) for event in events] == [2, 2, 2, 3, 2, 2, 2, 3]
    given = [event[1] for event in events if len(event) == 3]
    np.testing.assert_array_equal(given, pixels(result))


def test_a_bundle_opened_by_a_relative_path_is_found_from_another_folder(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    loaded = fluxrt.load(bundle.name)
    monkeypatch.chdir(tmp_path)
    with loaded:
        assert len(loaded.generate(Request(PROMPT, steps=1)).images) == 1


def test_a_number_of_threads_or_gpus_that_is_none_is_refused(bundle: Path) -> None:
    for given in ({"threads": 0}, {"threads": -1}, {"gpus": 0}, {"threads": 1.5}, {"gpus": True}):
        with pytest.raises(
            RequestError, match=r"(threads|gpus) must be (at least 1 and at most 1024|a whole number), got"
        ):
            fluxrt.load(bundle, **given)


def test_guidance_that_changes_nothing_is_said(bundle: Path) -> None:
    with fluxrt.load(bundle) as loaded:
        result = loaded.generate(Request(PROMPT, guidance=0.5))
        assert result.notes == ["guidance 0.5 is below 1, which turns classifier-free guidance off, as 1 does"]
        assert loaded.generate(Request(PROMPT, guidance=1.0)).notes == []
        sampling = loaded.bundle.manifest.sampling
    distilled = type(sampling)(
        **{name: getattr(sampling, name) for name in sampling.__struct_fields__} | {"cfg_batch": False}
    )
    assert unused_guidance(distilled, False, Request(PROMPT, guidance=7)) == (
        "guidance 7 changes nothing: this model is distilled and takes none"
    )
    assert unused_guidance(distilled, True, Request(PROMPT, guidance=7)) is None
    assert unused_guidance(distilled, False, Request(PROMPT)) is None


# The command line.


def generating(bundle: Path, *arguments: str, **how: Any) -> subprocess.Popen[str]:
    """`fluxrt generate` as a process of its own."""
    command = [sys.executable, "-m", "fluxrt", "generate", str(bundle), *arguments]
    return subprocess.Popen(command, text=True, **how)


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def generate(bundle: Path, out: Path | str, *more: str) -> int:
    return main(["generate", str(bundle), "--prompt", PROMPT, "--out", str(out), "--steps", "1", *more])


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("folder.png", 2, "it is a folder"),
        ("link.png", 2, "it is a link"),
        ("dangling.png", 2, "it is a link"),
        (f"{'n' * 300}.png", 2, "it cannot be written: File name too long"),
        ("nowhere/a.png", 2, "does not exist"),
        ("file/a.png", 2, "Not a directory"),
    ],
)
def test_output_that_cannot_be_written_is_refused_before_the_bundle_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, words: str, prompts: int
) -> None:
    for stem in ("", "-1"):
        (tmp_path / f"folder{stem}.png").mkdir()
        (tmp_path / f"link{stem}.png").symlink_to(tmp_path / "target.png")
        (tmp_path / f"dangling{stem}.png").symlink_to(tmp_path / "none")
    (tmp_path / "target.png").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    assert generate(tmp_path / "no-bundle", tmp_path / name, *["--prompt", OTHER] * (prompts - 1)) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_takes_no_files_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(Path("no-bundle"), "/proc/a.png") == 1
    assert "it cannot be written" in capsys.readouterr().err


def test_a_disk_that_is_full_keeps_the_images_before(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Path.write_bytes, []

    def full(self: Path, data: Any) -> int:
        calls.append(self)
        written = write(self, bytes(data)[:10] if len(calls) == 2 else data)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written

    monkeypatch.setattr(Path, "write_bytes", full)
    assert generate(bundle, tmp_path / "a.png", "--prompt", OTHER) == 1
    assert "a-1.png: it cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.png"]
    with Image.open(tmp_path / "a-0.png") as image:
        image.load()


@pytest.mark.parametrize("gpus", ["1", "2"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_ended_keeps_the_images_it_made(
    bundle: Path, tmp_path: Path, sent: signal.Signals, code: int, gpus: str
) -> None:
    how = ["--steps", "150", "--gpus", gpus, "--threads", "1", "--out", str(tmp_path / "a.png")]
    process = generating(
        bundle,
        *how,
        *["--prompt", PROMPT] * 8,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **PIPES,
    )
    try:
        assert process.stdout
        assert process.stdout.readline().strip() == str(tmp_path / "a-0.png")
        process.send_signal(sent)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} <= {f"a-{number}.png" for number in range(7)}
    with Image.open(tmp_path / "a-0.png") as image:
        image.load()


def test_closed_standard_streams_change_nothing(bundle: Path, tmp_path: Path) -> None:
    for name, closed in (("open", ()), ("closed", (0, 1, 2))):
        how = ["--prompt", PROMPT, "--steps", "1", "--out", str(tmp_path / f"{name}.png")]
        process = generating(bundle, *how, preexec_fn=lambda closed=closed: [os.close(fd) for fd in closed])
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "open.png").read_bytes() == (tmp_path / "closed.png").read_bytes()


def test_a_reader_that_goes_away_loses_lines_and_no_image(bundle: Path, tmp_path: Path) -> None:
    process = generating(bundle, "--steps", "1", "--out", str(tmp_path / "a.png"), *["--prompt", PROMPT] * 3, **PIPES)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    told = process.stderr.read().splitlines()
    assert [line for line in told if not line.startswith("fluxrt: ")] == []
    assert told[-1].startswith("fluxrt: 3 images in ")
    assert process.wait(timeout=60) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png"]


def test_a_turn_is_given_up_by_an_exception_and_taken_by_who_waits(bundle: Path) -> None:
    """A second thread waits, is served after the first, and never in between."""
    order: list[str] = []
    with fluxrt.load(bundle, threads=1) as loaded:
        started = threading.Event()

        def first_step(done: int, total: int) -> None:
            started.set()
            order.append(f"first {done}")
            time.sleep(0.05)

        def second() -> None:
            started.wait()
            loaded.generate(Request(OTHER), lambda done, total: order.append(f"second {done}"))

        thread = threading.Thread(target=second)
        thread.start()
        loaded.generate(Request(PROMPT), first_step)
        thread.join()
    assert order == [f"{who} {step}" for who in ("first", "second") for step in (1, 2, 3)]


def test_what_onnxruntime_throws_is_told_as_ours(bundle: Path) -> None:
    with fluxrt.load(bundle) as loaded:
        expected = pixels(loaded.generate(Request(PROMPT)))
        loaded.backend.put("latent_grid", np.zeros((1, 8, 8, 31), np.float32))
        with pytest.raises(fluxrt.BackendError, match=r"vae_decoder.onnx: ONNX Runtime failed while it ran"):
            loaded.backend.run(("vae_decoder",))
        np.testing.assert_array_equal(pixels(loaded.generate(Request(PROMPT))), expected)


def test_a_graph_that_gives_another_shape_is_refused(bundle: Path) -> None:
    """Its hash made right, or the manifest's shape damaged: numpy would have said it, in the middle of something else."""
    opened = open_bundle(bundle)
    target = opened.manifest.targets[0]
    epilogue = target.graphs["epilogue"]
    (port,) = (port for port in epilogue.outputs if port.name == "next_latents")
    wrong = tuple(msgspec.structs.replace(p, shape=(1, "tokens", 8)) if p is port else p for p in epilogue.outputs)
    graphs = target.graphs | {"epilogue": msgspec.structs.replace(epilogue, outputs=wrong)}
    damaged = msgspec.structs.replace(target, graphs=graphs)
    backend = OnnxRuntimeBackend(opened, damaged)
    with (
        Pipeline(opened, target=target.name, backend=backend) as loaded,
        pytest.raises(
            fluxrt.BundleError,
            match=r"epilogue.onnx: its result 'next_latents' has shape \[1, 64, 32\], the manifest says \[1, 'tokens', 8\]",
        ),
    ):
        loaded.generate(Request(PROMPT))


def test_onnxruntime_prints_nothing_of_its_own(bundle: Path, tmp_path: Path) -> None:
    """A graph that cannot be loaded, its hash made right: one sentence of ours on stderr, none of a logger before it."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    name = open_bundle(copy).manifest.targets[0].graphs["vae_decoder"].file
    model = onnx.load(copy / name, load_external_data=False)
    weight = next(w for w in model.graph.initializer if len(w.dims) == 4)
    weight.dims[0] = 1 << 62
    (copy / name).write_bytes(model.SerializeToString())
    plain = json.loads((copy / "bundle.json").read_text())
    plain["files"][name] = {"size": (copy / name).stat().st_size, "sha256": sha256_file(copy / name)}
    (copy / "bundle.json").write_bytes(encode_manifest(decode_manifest(json.dumps(plain).encode())))
    command = [
        sys.executable,
        "-m",
        "fluxrt",
        "generate",
        str(copy),
        "--prompt",
        PROMPT,
        "--out",
        str(tmp_path / "x.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("fluxrt: ")
    assert "vae_decoder.onnx: ONNX Runtime" in done.stderr
