"""What a command shows while it works: the estimate, the lines, the bar on a terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from conftest import RECIPE, seed_cache
from fluxc.base.estimate import Estimate, as_clock, in_words
from fluxc.base.memory import bytes_in_words, memory_now, memory_peak
from fluxc.base.shown import Event, ShownProgress
from fluxc.base.terminal import bar_on, print_line
from quick import QUICK


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def said(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno >= level]


@pytest.fixture
def lines() -> Iterator[tuple[logging.Logger, Lines]]:
    logger, handler = logging.getLogger("fluxc.test"), Lines()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield logger, handler
    logger.removeHandler(handler)


def test_one_unit_is_enough_for_an_estimate_however_long_it_takes() -> None:
    estimate = Estimate(0.0)
    assert estimate.left(50.0) is None
    estimate.report(600.0, 1, 10)
    assert estimate.left(600.0) == 5400
    assert estimate.left(900.0) == 5100, "it counts down between reports"
    assert estimate.left(1e6) == 0


def test_what_was_there_already_does_not_count_as_pace() -> None:
    """An interrupted calibration goes on: five of eight prompts are there at once."""
    estimate = Estimate(0.0)
    for done in range(1, 6):
        estimate.report(0.01 * done, done, 8)
    estimate.report(40.0, 6, 8)
    assert estimate.left(40.0) == pytest.approx(80, rel=0.01)


def test_loading_the_model_does_not_count_as_pace() -> None:
    estimate = Estimate(0.0)
    estimate.report(20.0, 1, 100)
    assert estimate.left(20.0) is None
    estimate.report(21.0, 2, 100)
    assert estimate.left(21.0) == 98


def test_the_estimate_follows_a_pace_that_changes() -> None:
    estimate = Estimate(0.0)
    for at in range(1, 11):
        estimate.report(float(at), at, 100)
    for at in range(1, 21):
        estimate.report(10.0 + 10 * at, 10 + at, 100)
    assert estimate.left(210.0) == pytest.approx(700)


@pytest.mark.parametrize(
    ("seconds", "words", "clock"),
    [
        (0.04, "0.0 s", "0:00"),
        (9.94, "9.9 s", "0:09"),
        (59.4, "59 s", "0:59"),
        (59.9, "1 min 0 s", "0:59"),
        (3599.6, "1 h 0 min", "59:59"),
        (7830.0, "2 h 10 min", "2:10:30"),
    ],
)
def test_durations_as_people_read_them(seconds: float, words: str, clock: str) -> None:
    assert (in_words(seconds), as_clock(seconds)) == (words, clock)


def test_memory_is_that_of_this_process() -> None:
    now = memory_now()
    assert now is not None
    assert 10 * 2**20 < now <= memory_peak() * 1.1


def test_the_peak_is_not_that_of_the_process_that_started_it() -> None:
    held = np.ones(300 << 20, np.uint8)
    command = [sys.executable, "-c", "from fluxc.base.memory import memory_peak; print(memory_peak())"]
    # As a shell starts it: without preexec_fn, Python shares its memory with the new process until that runs.
    told = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=os.getpid).stdout
    assert 10 * 2**20 < int(told) < len(held) / 2
    assert [bytes_in_words(size) for size in (820 * 2**20, 1434 * 2**20)] == ["820 MiB", "1.4 GiB"]


def test_a_line_for_every_event(lines: tuple[logging.Logger, Lines]) -> None:
    logger, found = lines
    clock = Clock()
    progress = ShownProgress(logger, clock=clock)
    progress.expect(3)
    progress.cached("trace vae")
    with progress.stage("calibrate") as report:
        report(1, 8, "1/8 prompts")
        clock.now += 12
    with pytest.raises(ValueError), progress.stage("build"):
        raise ValueError
    progress.finish("built x", "generate: y")
    said = [re.sub(r", [\d.]+ [MG]iB$", "", line) for line in found.said(logging.INFO)]
    assert said[:5] == [
        "[1/3] trace vae: cached",
        "[2/3] calibrate: begins",
        "[2/3] calibrate: done in 12 s",
        "[3/3] build: begins",
        "[3/3] build: ended without a result after 0.0 s",
    ]
    assert said[5].startswith("built x in 12 s (3 stages, 1 of them cached; at most ")
    assert said[6] == "generate: y"
    fields = [record.fields for record in found.records[:3]]
    assert [(entry["event"], entry["stage"], entry["stages"], entry["seconds"]) for entry in fields] == [
        ("cached", 1, 3, 0),
        ("begins", 2, 3, 0),
        ("done", 2, 3, 12),
    ]


def test_more_stages_than_were_expected_are_counted(lines: tuple[logging.Logger, Lines]) -> None:
    progress = ShownProgress(lines[0])
    progress.cached("a")
    progress.expect(1)
    progress.cached("b")
    assert lines[1].said(logging.INFO) == ["[1] a: cached", "[2/2] b: cached"]


def test_a_long_stage_gives_signs_of_life(lines: tuple[logging.Logger, Lines]) -> None:
    logger, found = lines
    progress = ShownProgress(logger, life_seconds=0.01)
    with progress.stage("calibrate") as report:
        report(3, 8, "3/8 prompts")
        while not (alive := [line for line in found.said(logging.INFO) if "so far" in line]):
            pass
    assert re.fullmatch(r"\[1\] calibrate: 3/8 prompts, 0\.\d s so far, about 0\.\d s left, [\d.]+ [MG]iB", alive[0])


def shown(event: Event, width: int) -> list[str]:
    """What stands on a terminal while a stage runs, and, printed before it, a line of the log."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, markup=False, color_system=None)
    from fluxc.base.terminal import _Standing

    console.print(_Standing(event))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_bar_fits_the_terminal(width: int) -> None:
    title = "generate with 12 of 24 steps skipped"
    event = Event("runs", title, 13, 18, 3, 16, "3/16 images", 72.4, 312.0, memory=1500 * 2**20)
    first, second = shown(event, width)
    assert max(len(first), len(second)) <= width - 2, "room for ^C"
    assert first.startswith("[13/18] generate with 12")
    assert "18 %  1:12, about 5:12 left  1.5 GiB" in second
    assert ("━" in second) == (width > 40)
    assert first.endswith("3/16 images") == (width > 60)


def test_the_bar_without_units_shows_the_time() -> None:
    first, second = shown(Event("runs", "build x", 2, 9, seconds=3.2, memory=None), 80)
    assert first == "[2/9] build x"
    assert second.endswith("━  0:03")


def test_a_terminal_keeps_what_is_done_above_the_bar(lines: tuple[logging.Logger, Lines]) -> None:
    logger, found = lines
    console = Console(file=io.StringIO(), width=80, force_terminal=True, markup=False, color_system=None)
    found.emit = lambda record: print_line(console, f"fluxc: {record.getMessage()}")
    logger.setLevel(logging.INFO)
    progress = ShownProgress(logger, bar_on(console))
    with progress.stage("build [/]? :smile:") as report:
        report(1, 2, "[qkv]\x1b[2J")
        progress.say("found [x]")
    progress.cached("build [/]")
    output = console.file.getvalue()
    assert "[1] build [/]? :smile:: [qkv]\\x1b[2J" in output
    assert "fluxc: found [x]\n" in output
    assert "[2] build [/]: cached\n" in output


def run_fluxc(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fluxc", *map(str, arguments)]
    variables = {name: value for name, value in os.environ.items() if name != "FLUXC_CACHE"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder, env=variables)


@pytest.fixture(scope="module")
def again(quick_bundle: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """`fluxc build` of the quick bundle, all of whose stages are cached but those that own the weights."""
    folder = tmp_path_factory.mktemp("again")
    seed_cache(shared_cache, quick_bundle, folder)
    changes = [part for change in QUICK for part in ("--set", change)]

    def build(*options: object) -> subprocess.CompletedProcess[str]:
        return run_fluxc(folder, "build", RECIPE, *changes, "--out", folder / "bundle", *options)

    return build


def test_a_build_that_is_piped_says_what_it_does_line_by_line(again: Callable[..., object]) -> None:
    done: subprocess.CompletedProcess[str] = again("--log-file", "log.txt")
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stderr), "control characters"
    numbers = [re.match(r"fluxc: \[ ?(\d+)/(\d+)\] .*: (begins|cached|done in .* s, .*)$", line) for line in said]
    counted = [(int(found[1]), int(found[2])) for found in numbers if found]
    assert counted[0][0] == 1
    assert counted[-1][0] == counted[-1][1], "the number of stages was known from the start"
    assert {total for _, total in counted} == {counted[-1][1]}
    assert re.match(
        r"fluxc: built .*/bundle in .* s \(\d+ stages, \d+ of them cached; at most [\d.]+ [MG]iB of memory\)", said[-3]
    )
    assert said[-2].endswith("bundle/report/index.html")
    assert re.match(r"fluxc: generate: fluxrt generate \S+ --prompt '.*' --out image.png", said[-1])
    assert done.stdout.endswith("/bundle\n")
    assert done.stdout.count("\n") == 1
    quiet: subprocess.CompletedProcess[str] = again("-q")
    assert (quiet.returncode, quiet.stderr, quiet.stdout) == (0, "", done.stdout)


def test_progress_as_json(again: Callable[..., object]) -> None:
    done: subprocess.CompletedProcess[str] = again("--log-format", "json")
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    stages = [entry for entry in entries if entry.get("event") in ("cached", "done")]
    assert [entry["stage"] for entry in stages] == list(range(1, len(stages) + 1))
    assert {entry["stages"] for entry in stages} == {len(stages)}
    finished = next(entry for entry in entries if entry.get("event") == "finished")
    assert finished["seconds"] > 0
    assert finished["peak_memory_bytes"] > 2**20
