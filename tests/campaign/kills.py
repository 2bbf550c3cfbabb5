"""Signals at random moments of a build and of `fluxrt generate`: what is left is nothing or a whole result, and the next run
makes the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from campaign.cases import Outcome, Tally
from campaign.damage import PROMPT
from campaign.part import RECIPE, SETTINGS
from quick import contents, results_of

MARK = "FLUXC_CAMPAIGN"
REPEATED = ("target-", "compare-", "weights-transformer-")
"""Results that a killed build makes anew; the rest it finds."""
STARTING = 0.1
"""Seconds in which Python itself starts: what an interrupt does there is its own."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def campaign(bundle: Path, work: Path, kills: int, seed: int, with_builds: bool) -> list[Tally]:
    """`kills` with each signal, of a generation in one process, of one in two, and of a build."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rng, tallies = random.Random(f"{seed}/kills"), []
    killed: dict[str, _Generation | _Build] = {
        "generate": _Generation(bundle, work / "generate-1", "1"),
        "generate, 2 processes": _Generation(bundle, work / "generate-2", "2"),
    }
    if with_builds:
        killed["a build"] = _Build(bundle, work / "build")
    for what, killing in killed.items():
        for sent in SIGNALS:
            tally = Tally(f"{sent.name} in {what}")
            for number in range(kills):
                moment = rng.uniform(0, killing.seconds)
                tally.add(f"{tally.kind}, {number} at {moment:.3f} s (seed {seed})", killing.killed(sent, moment))
            tallies.append(tally)
        killing.close()
    return tallies


def _take_sigint() -> None:
    """A command that was started in the background of a script inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Generation:
    def __init__(self, bundle: Path, out: Path, gpus: str) -> None:
        arguments = ["generate", str(bundle), "--prompt", PROMPT, "--threads", "1", "--gpus", gpus, "--out"]
        self._command = [sys.executable, "-m", "fluxrt", *arguments]
        self._out = out
        out.mkdir()
        began = time.monotonic()
        self._run(out / "first.png")
        self.seconds = time.monotonic() - began
        self._bytes = (out / "first.png").read_bytes()
        (out / "first.png").unlink()

    def killed(self, sent: signal.Signals, moment: float) -> Outcome:
        mark, image = f"{os.getpid()}-{time.monotonic_ns()}", self._out / "image.png"
        command = [*self._command, str(image)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=os.environ | {MARK: mark}, preexec_fn=_take_sigint, **quiet) as process:
            time.sleep(moment)
            process.send_signal(sent)
            try:
                status = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                return Outcome("hang", "30 s after the signal")
        left = _waited_for(mark)
        if left:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return Outcome("litter", f"processes {left} live on")
        files = sorted(path.name for path in self._out.iterdir())
        made = image.exists() and image.read_bytes() == self._bytes
        partial = [name for name in files if name != "image.png"]
        for path in self._out.iterdir():
            path.unlink()
        if "image.png" in files and not made:
            return Outcome("exception", "an image that is not whole")
        if partial and sent != signal.SIGKILL:
            return Outcome("litter", ", ".join(partial))
        if sent != signal.SIGKILL and not made and status not in (128 + sent, -sent) and moment > STARTING:
            return Outcome("exception", f"exit {status}")
        if sent == signal.SIGKILL:
            self._run(image)
            again = image.read_bytes()
            image.unlink()
            if again != self._bytes:
                return Outcome("exception", "the next run made other bytes")
        return Outcome("image" if made else "error")

    def close(self) -> None:
        pass

    def _run(self, image: Path) -> None:
        subprocess.run([*self._command, str(image)], check=True, capture_output=True, timeout=120)


class _Build:
    """Each a fork of a process that has imported the libraries (killed_in.py), so that a moment falls into work of fluxc."""

    def __init__(self, bundle: Path, work: Path) -> None:
        cache = Path(os.environ["FLUXC_CACHE"])
        self._work = work
        self._warm = [path for path in results_of(cache, bundle) if not path.name.startswith(REPEATED)]
        self._expected = contents(bundle)
        work.mkdir()
        self._said = work.with_suffix(".txt")
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "killed_in.py")],
            env=os.environ | {"FLUXC_CACHE": str(work / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said.open("ab"),
            text=True,
            preexec_fn=_take_sigint,
        )
        self._fresh()
        self._ends(None)
        self._fresh()
        began = time.monotonic()
        status = self._ends(None)
        self.seconds = time.monotonic() - began
        if status or contents(self._out) != self._expected:
            raise SystemExit(f"an undisturbed build ended with {status}: {self._said.read_text()[-500:]}")

    @property
    def _out(self) -> Path:
        return self._work / "made" / "campaign"

    def killed(self, sent: signal.Signals, moment: float) -> Outcome:
        self._fresh()
        status = self._ends([sent, moment])
        whole = self._out.exists() and contents(self._out) == self._expected
        if self._out.exists() and not whole:
            return Outcome("exception", "a bundle that is not whole")
        litter = self._half_made()
        if sent != signal.SIGKILL:
            if litter:
                return Outcome("litter", f"{', '.join(litter)} (exit {status})")
            if not whole and status not in (128 + sent, -sent):
                return Outcome("exception", f"exit {status}")
            return Outcome("done" if whole else "error")
        status = self._ends(None)
        if status or contents(self._out) != self._expected:
            return Outcome("exception", f"the next build ended with {status}, or other bytes")
        if self._half_made():
            return Outcome("litter", f"after the next build: {', '.join(self._half_made())}")
        return Outcome("done" if whole else "error")

    def _half_made(self) -> list[str]:
        folders = [path for path in self._work.rglob(".*") if path.is_dir() and path.name != ".fluxc"]
        return sorted(path.relative_to(self._work).as_posix() for path in folders)

    def _fresh(self) -> None:
        shutil.rmtree(self._work)
        for result in self._warm:
            shutil.copytree(result, self._work / "cache" / result.name)
        self._out.parent.mkdir(parents=True)

    def _ends(self, when: list[float] | None) -> int:
        """The exit status of a build that gets the signal when[0] after when[1] seconds."""
        assert self._server.stdin
        assert self._server.stdout
        arguments = ["build", str(RECIPE), *(a for c in SETTINGS for a in ("--set", c)), "--out", str(self._out)]
        print(json.dumps([when, arguments]), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()


def _waited_for(mark: str, seconds: float = 10.0) -> list[int]:
    """Processes with this mark in their environment that are still there after some seconds."""
    until, found = time.monotonic() + seconds, [0]
    while found and time.monotonic() < until:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        time.sleep(0.05 if found else 0)
    return found
