"""The command line of fluxrt and what it shares with fluxc's: every option's bad values, how commands end, logs, progress."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluxrt
from fluxrt import cli, progress
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.choose import pick
from fluxrt.commands import EXIT_CODES, CommandLine, Verb, logging_options
from fluxrt.cores import allowed_cores, quota, usable_cores
from fluxrt.cuda import Gpu
from fluxrt.errors import BackendError, FluxError, RequestError
from fluxrt.log import Logs
from fluxrt.machine import Machine
from fluxrt.progress import Progress, shown_time
from fluxrt.request import Request
from fluxrt.signals import Terminated

PROMPT = "a large red circle"
WHOLE = ["", " ", "x", "1.5", "1e3", "nan", "1_0", "0x10", "\u0663", "-1", "9" * 5000, "\x1b[31m", "\udc80"]
BAD = {
    "memory": ["", "none", "Staged", "8GiB", "0"],
    "bundle": ["", "none", "file", "empty", "n" * 300, "file/below", "a\nb", "\x1b[2J", "\udc80", "nul\0"],
    "prompts": ["", " \t\n", "\x00", "\x1b[2J", "half \udc80", "red " * 60],
    "out": [
        "",
        ".",
        "..",
        "/",
        ".png",
        "a.jpg",
        "folder.png",
        "file/x.png",
        "no/such/a.png",
        "/proc/a.png",
        "link.png",
    ],
    "seed": [*WHOLE, str(2**64)],
    "steps": [*WHOLE, "0", "-3", "5000000"],
    "threads": [*WHOLE, "0", "-3", "100000"],
    "gpus": [*WHOLE, "0", "-3", "3", "100000"],
    "guidance": ["", "x", "-1", "-2", "nan", "inf", "-inf", "1e400", "1001", "1_0", "\u0663"],
    "batch": [*WHOLE, "0", "-3", "2", "100000"],
    "threshold": ["", "x", "-0.1", "nan", "0.5"],
    "size": ["", "96", "x96", "96x", "96x64", "0x0", "-64x64", "64x64x64", "64\u00d764", "9" * 30 + "x64", "64.0x64"],
    "target": ["", "tpu", "gpu", "a\nb", "\x1b[31m", "\udc80"],
    "require": ["", "tpu", "gpu", "a\nb", "\x1b[31m", "\udc80"],
    "log_file": ["", "/proc/x.log", "folder.png", "no/such/x.log", "nul\0", "n" * 300],
    "log_format": ["", "xml", "JSON "],
}
BAD["out"] += ["nul\0.png", f"{'n' * 300}.png"]
VALUES = [(name, value) for name, values in BAD.items() for value in values]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with things that are in the way, and a folder for temporary files."""
    for name in ("folder.png", "empty", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link.png").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def contents(folder: Path) -> list[tuple[str, bytes | None]]:
    return sorted((str(path), path.read_bytes() if path.is_file() else None) for path in folder.rglob("*"))


def command_line(verb: str, bundle: Path, name: str, value: str) -> list[str]:
    """`fluxrt` with `verb` on `bundle`, one of its parameters given as `value`."""
    parameters = {param.name: param for param in cli.commands.commands[verb].params}
    words = {"bundle": str(bundle), "prompts": PROMPT, "out": "a.png"} | {name: value}
    options = [
        word for key in words if key in parameters and key != "bundle" for word in (parameters[key].opts[0], words[key])
    ]
    return [verb, "-q", *options, "--", words["bundle"]]


def valued(verb: str) -> set[str]:
    """The parameters of `verb` that take a value."""
    params = cli.commands.commands[verb].params
    return {str(param.name) for param in params if not getattr(param, "is_flag", False)} - {"help", "version"}


def test_every_option_that_takes_a_value_has_bad_ones_here() -> None:
    assert set().union(*map(valued, cli.commands.commands)) == set(BAD)


VERBS = [(verb, name, value) for verb in cli.commands.commands for name, value in VALUES if name in valued(verb)]


@pytest.mark.parametrize(("verb", "name", "value"), VERBS, ids=[f"{v}-{n}-{ascii(x)[:20]}" for v, n, x in VERBS])
def test_a_bad_value_is_one_paragraph_and_nothing_is_written(
    verb: str, name: str, value: str, quick_bundle: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place)
    code = cli.main(command_line(verb, quick_bundle, name, value))
    out, error = capsys.readouterr()
    of_the_system = value.startswith("/proc") or name in ("bundle", "log_file")
    assert code == 2 or (of_the_system and code == 1), error
    assert out == ""
    assert error.startswith("fluxrt: ")
    assert "unexpected error" not in error
    assert "\n" not in error.strip() or "\n" in value
    assert all(character.isprintable() or character == "\n" for character in error)
    assert contents(place) == before


TEXT = st.text(st.characters(), max_size=8)
NUMBERS = st.one_of(st.integers().map(str), st.floats().map(str), TEXT, st.sampled_from([str(2**64 - 1), "1", "64x64"]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.lists(st.tuples(st.sampled_from(sorted(set(BAD) - {"bundle", "log_file", "out"})), NUMBERS), max_size=4),
    words=st.lists(TEXT, max_size=3),
)
def test_whatever_is_typed_the_command_says_why_it_fails(
    options: list[tuple[str, str]], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place)
    opts = {param.name: param.opts[0] for param in cli.commands.commands["generate"].params}
    given_words = [word for name, value in options for word in (opts[name], value)]
    code = cli.main(["generate", "none", "--prompt", PROMPT, "--out", "a.png", *given_words, *words])
    out, error = capsys.readouterr()
    assert code in (0, 1, 2)
    assert code or out.startswith("Usage: ")
    assert "Traceback" not in error
    assert "unexpected error" not in error
    assert contents(place) == before


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.sampled_from(
        [np.int8(3), np.uint64(2**64 - 1), np.float32(2), np.bool_(True), 10**5000, object(), (64, 64), Path()]
    ),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none(), st.floats()), max_size=3),
)
FIELDS = [name for name in Request.__struct_fields__ if name != "prompt"]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.just(PROMPT), ODD), st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=3))
def test_a_request_of_anything_is_made_or_refused(prompt: Any, fields: dict[str, Any]) -> None:
    try:
        request = Request(prompt, **fields)
    except RequestError:
        return
    assert all(isinstance(words, str) and words.strip() for words in request.prompts)
    assert all(type(seed) is int and 0 <= seed < 2**64 for seed in request.seeds)
    assert request.steps is None or type(request.steps) is int
    assert request.guidance is None or 0 <= request.guidance <= 1000


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=st.dictionaries(st.sampled_from(["target", "threads", "gpus", "require"]), ODD, min_size=1), path=ODD)
def test_load_takes_anything_and_raises_a_typed_error(options: dict[str, Any], path: Any, quick_bundle: Path) -> None:
    with pytest.raises(FluxError):
        fluxrt.load(path)
    if not {"target", "require"} & {name for name, value in options.items() if value is not None}:
        options |= {"target": "none"}
    with pytest.raises(RequestError):
        fluxrt.load(quick_bundle, **options)


def test_generate_takes_a_request_alone(quick_bundle: Path) -> None:
    with fluxrt.load(quick_bundle) as pipeline:
        for given_value in ("a circle", ["a circle"], None, {"prompt": "a"}):
            with pytest.raises(RequestError, match=r"generate takes a fluxrt\.Request, got"):
                pipeline.generate(given_value)


# How commands end.


def tool_that(run: Any, **more: Any) -> CommandLine:
    """A command line whose verb `go` does `run`."""
    tool = CommandLine("fluxrt", **more)
    tool.add_command(Verb("go", params=[], callback=run))
    logging_options(tool.commands["go"])
    return tool


def raises(error: BaseException) -> Any:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (FluxError("the disk\nis full"), 1, "fluxrt: the disk\nis full\n"),
        (RequestError("no"), 2, "fluxrt: no\n"),
        (RequestError("no \x1b[2J"), 2, "fluxrt: no \\x1b[2J\n"),
        (KeyboardInterrupt(), 130, "fluxrt: stopped; go on later\n"),
        (Terminated(), 143, ""),
        (SystemExit(3), 3, ""),
        (BrokenPipeError(), 1, ""),
        (click.UsageError("Bad thing."), 2, "fluxrt: bad thing; see `fluxrt go --help`\n"),
    ],
)
def test_a_command_ends_with_a_sentence_and_its_code(
    error: BaseException, code: int, told: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert tool_that(raises(error), on_interrupt="stopped; go on later").run(["go"]) == code
    assert capfd.readouterr().err == told


@pytest.mark.parametrize("extra", [[], ["--log-file", "mine.log"], ["-v"]])
def test_what_nobody_expected_is_one_paragraph_with_the_place_of_a_log(
    extra: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        logging.getLogger("fluxrt").debug("opened \x1b[2J")
        raise ZeroDivisionError("one\nby none")

    assert tool_that(run).run(["go", *extra]) == 1
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("fluxrt: unexpected error, ZeroDivisionError: one by none; the full log is ")
    assert ("Traceback" in error) == (extra == ["-v"])
    (log,) = place.glob("mine.log") if "--log-file" in extra else (place / "tmp").iterdir()
    text = log.read_text()
    for expected in ("opened \\x1b[2J", "Traceback", "ZeroDivisionError", "Python 3"):
        assert expected in text
    assert str(log.name) in last


def test_a_package_that_is_missing_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool_that(raises(ModuleNotFoundError("No module named 'msgspec'"))).run(["go"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fluxrt: No module named 'msgspec', in {sys.executable}; install fluxrt again there")


def test_a_log_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    assert tool_that(raises(ValueError())).run(["go"]) == 1
    assert "unexpected error, ValueError; its log could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "none", "--prompt", "a", "--out", "a.png"]])
def test_a_full_disk_behind_stdout_or_stderr_is_no_fault_of_the_program(arguments: list[str], place: Path) -> None:
    for full, code in (("stdout", 1), ("stderr", int("generate" in arguments))):
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with Path("/dev/full").open("w") as broken:
            command = [sys.executable, "-m", "fluxrt", *arguments]
            done = subprocess.run(command, text=True, check=False, **(streams | {full: broken}))
        assert done.returncode == code
        assert "unexpected error" not in (done.stderr or "")


def test_help_shows_exit_codes_arguments_defaults_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for code, _ in EXIT_CODES:
        assert f"\n  {code} " in shown
    assert cli.main([]) == 2
    assert capsys.readouterr().out == shown
    assert cli.main(["generate", "-h"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "BUNDLE  the bundle's folder",
        "Example:\n  fluxrt generate ",
        "[default: text]",
        "may be repeated",
    ):
        assert expected in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_completed(shell: str) -> None:
    def asked(instruction: str, **words: str) -> str:
        environment = {**os.environ, "_FLUXRT_COMPLETE": f"{shell}_{instruction}", **words}
        command = [sys.executable, "-m", "fluxrt"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    if shell != "bash":  # click asks bash itself for its version
        assert "_FLUXRT_COMPLETE" in asked("source")
    words = "fluxrt generate --thr"
    found = asked("complete", COMP_WORDS=words, COMP_CWORD="--thr" if shell == "fish" else "2")
    assert "--threads" in found
    assert "--threshold" in found


# What is said, and what generates.


@pytest.fixture
def generate(quick_bundle: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*options: str, code: int = 0) -> tuple[list[str], list[str]]:
        arguments = ["generate", str(quick_bundle), "--prompt", PROMPT, "--out", "a.png", "--steps", "2", *options]
        assert cli.main(arguments) == code
        out, error = capsys.readouterr()
        return out.splitlines(), error.splitlines()

    return run


def test_piped_there_is_a_line_a_stage(generate: Any) -> None:
    out, told = generate("--prompt", "a blue ring")
    assert out == ["a-0.png", "a-1.png"]
    starts = ("target onnxruntime: onnxruntime on the CPU, in int8", "1/3 load, ")
    starts += ("2 images of 64x64 (height x width), 2 steps, guidance 1.5, seeds 0, 1",)
    starts += ("memory: resident, ",)
    starts += ("2/3 image 1 of 2: a-0.png, ", "3/3 image 2 of 2: a-1.png, ", "2 images in ")
    assert len(told) == len(starts)
    for line, start in zip(told, starts, strict=True):
        assert line.startswith(f"fluxrt: {start}")
    assert generate("-q") == (["a.png"], [])


def test_a_long_stage_says_that_it_goes_on(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK", 0.01)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    _, told = generate("--steps", "40")
    assert any(re.match(r"fluxrt: image 1 of 1, step \d+ of 40, \d:\d\d, \d:\d\d left$", line) for line in told)


def test_the_name_of_an_image_is_printed_in_any_encoding(quick_bundle: Path, place: Path) -> None:
    name = "\u00e9\udcff.png"
    command = [
        sys.executable,
        "-m",
        "fluxrt",
        "generate",
        str(quick_bundle),
        "--prompt",
        PROMPT,
        "--steps",
        "1",
        "--out",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([*command, name], env=environment, capture_output=True, check=True)
    assert done.stdout == os.fsencode(name) + b"\n"
    assert Path(name).is_file()


def test_json_and_the_log_say_the_same_to_scripts(generate: Any) -> None:
    out, told = generate("--json", "--log-format", "json", "--log-file", "x.log", "--guidance", "0.5", "--seed", "7")
    plain = json.loads("".join(out))
    assert set(plain) == {"target", "images", "seconds", "memory_bytes", "notes"}
    assert plain["target"] == "onnxruntime"
    assert plain["images"] == [{"path": "a.png", "seed": 7, "size": [64, 64], "skipped_steps": []}]
    assert set(plain["seconds"]) == {"load", "text", "steps", "decode"}
    assert plain["memory_bytes"] > 1 << 20
    assert plain["notes"] == ["guidance 0.5 is below 1, which turns classifier-free guidance off, as 1 does"]
    lines = [json.loads(line) for line in told]
    # What is worth knowing of a request is said before it is served.
    assert lines[3]["message"] == plain["notes"][0]
    assert lines[4]["memory"] == "resident"
    assert {"stage": "image", "number": 2, "count": 2}.items() <= lines[5].items()
    assert all({"time", "level", "tool", "message"} <= set(line) for line in lines)
    kept = [json.loads(line) for line in Path("x.log").read_text().splitlines()]
    assert [line for line in kept if line["level"] != "debug"] == lines
    assert any(line["message"].startswith("graph body: weights made of those stored in ") for line in kept)


def test_result_names_its_target_and_a_required_one_is_not_replaced(quick_bundle: Path, generate: Any) -> None:
    with fluxrt.load(quick_bundle, require="onnxruntime-nvfp4") as pipeline:
        assert pipeline.generate(Request(PROMPT, steps=1)).target == "onnxruntime-nvfp4"
    for options, message in (
        ({"require": "gpu"}, "a GPU is required, and no target of this bundle is for one"),
        (
            {"require": "gpu", "target": "onnxruntime"},
            "a GPU is required, and target 'onnxruntime' generates on the CPU",
        ),
        ({"require": "onnxruntime", "target": "onnxruntime-nvfp4"}, "give one of them"),
    ):
        with pytest.raises(RequestError, match=message):
            fluxrt.load(quick_bundle, **options)
    assert "a GPU is required" in generate("--require", "gpu", code=2)[1][-1]
    assert not Path("a.png").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_bar_with_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, generate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    out, _ = generate("--prompt", "a ring", "--log-file", "x.log")
    shown = sys.stderr.getvalue().split("\r")
    assert out == ["a-0.png", "a-1.png"]
    assert all(len(line.removesuffix("\x1b[K")) < 100 for line in shown if line.startswith("["))
    assert any(line.startswith("[#####---------------] image 1 of 2, step 1 of 4, 0:") for line in shown)
    assert any("image 2 of 2, step 3 of 4, 0:" in line and " left" in line for line in shown)
    assert not any("2/3 image" in line for line in shown)
    assert "2/3 image 1 of 2: a-0.png, " in Path("x.log").read_text()


def test_time_left_counts_from_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of forty seconds, after a minute of loading."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = Progress(Logs("fluxrt"), 1)
    now[0] += 60
    shown.on_step(1, 10)
    assert shown.seconds_left() is None
    for done in (2, 3, 4):
        now[0] += 40
        shown.on_step(done, 10)
        assert shown.seconds_left() == 40 * (10 - done)


def test_times_are_shown_in_units_that_fit() -> None:
    shown = [shown_time(seconds) for seconds in (0.123, 4.56, 42.4, 59.7, 425, 3723)]
    assert shown == ["0.12 s", "4.6 s", "42 s", "1:00", "7:05", "1:02:03"]


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", None), ("150000 100000", 2), ("1000 100000", 1), ("nonsense", None), (None, None)],
)
def test_the_quota_of_a_container_limits_the_threads(limit: str | None, cores: int | None, tmp_path: Path) -> None:
    if limit:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{limit}\n")
    assert quota(tmp_path) == cores
    assert usable_cores(tmp_path) == min(allowed_cores(), cores or allowed_cores())


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What the logger `fluxrt` is given."""
    got: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = got.append
    logger = logging.getLogger("fluxrt")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield got
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_threads_that_change_nothing_are_told(
    quick_bundle: Path, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxrt.backends.registry import KINDS, Kind
    from toys.pipeline_toy import PlainPipeline

    opened = open_bundle(quick_bundle)
    target = msgspec.structs.replace(opened.manifest.targets[0], device="cuda")
    on_gpu = Bundle(opened.root, msgspec.structs.replace(opened.manifest, targets=(target,)))
    kind = Kind(type(target), "cuda", 20, lambda *_: None, pipeline=PlainPipeline)
    monkeypatch.setitem(KINDS, (target.kind, "cuda"), kind)
    monkeypatch.setattr("fluxrt.bundle.open_bundle", lambda path: on_gpu)
    fluxrt.load(quick_bundle, threads=2)
    assert [(line.levelname, line.getMessage()) for line in lines] == [
        ("INFO", "target onnxruntime: onnxruntime on the GPU"),
        ("WARNING", "threads 2 changes nothing: target onnxruntime computes on the GPU"),
    ]


def test_each_better_target_that_does_not_run_is_told_with_its_reason(
    quick_bundle: Path, lines: list[logging.LogRecord]
) -> None:
    opened = open_bundle(quick_bundle)
    cpu = opened.manifest.targets[0]
    cuda = msgspec.structs.replace(cpu, name="onnxruntime-cuda", device="cuda")
    both = Bundle(opened.root, msgspec.structs.replace(opened.manifest, targets=(cpu, cuda)))
    for machine, level in (
        (Machine(None, "no GPU here"), "INFO"),
        (Machine(Gpu("RTX 5090", "12.0", "13.0")), "WARNING"),
    ):
        lines.clear()
        assert pick(both, machine=machine) is cpu
        first, second = lines
        assert first.levelname == level
        assert first.getMessage().startswith("better target onnxruntime-cuda does not run here: ")
        assert second.getMessage() == "target onnxruntime: onnxruntime on the CPU, in int8"
        with pytest.raises(BackendError, match=r"a GPU is required, and no target for one runs on this machine\. onnx"):
            pick(both, require="gpu", machine=machine)
        with pytest.raises(BackendError, match=r"target 'onnxruntime-cuda' is required and does not run here: "):
            pick(both, require="onnxruntime-cuda", machine=machine)
    able = Machine(Gpu("RTX 5090", "12.0", "13.0"), providers=("CUDAExecutionProvider",))
    assert pick(both, require="gpu", machine=able) is cuda
