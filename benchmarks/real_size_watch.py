"""Runs a command in a memory limit and measures each of its stages, for `real_size.py`.

Memory is counted twice, because mapped files are in memory only as long as nobody needs the room:

- *held*: anonymous and shared memory of the command and its children (RssAnon + RssShmem), which cannot be taken back. Read
  every 20 ms and at the borders of stages.
- *resident*: held and mapped files (VmHWM, the kernel's own maximum, set back at the beginning of every stage).

The limit is a cgroup v2 of its own where one can be made (memory.max, no swap). Elsewhere the command is killed as soon as a
reading of what it holds exceeds the limit: an allocation that is gone within 20 ms may escape that.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
EVERY = 0.02
START = "start"
"""What is before the first stage: Python, imports, the checks before any work."""
BETWEEN = "between stages"


@dataclass
class StageUse:
    """What a stage took: seconds, most bytes held and resident, and how it ended (done, cached, failed, killed).

    `disk` is for who watches: bytes that the build's files took when it began.
    """

    title: str
    ended: str = ""
    seconds: float = 0.0
    held: int = 0
    resident: int = 0
    disk: int = 0


@dataclass
class Run:
    """How a command ended: its exit status, whether the limit ended it, its stages, and its lines on stderr and stdout."""

    status: int = 0
    over_limit: bool = False
    seconds: float = 0.0
    stages: list[StageUse] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    out: str = ""

    @property
    def held(self) -> int:
        """Most bytes held over all stages."""
        return max(stage.held for stage in self.stages)

    @property
    def resident(self) -> int:
        """Most bytes resident over all stages."""
        return max(stage.resident for stage in self.stages)

    @property
    def error(self) -> str:
        """The last line that was said: the error, where the command failed."""
        return self.said[-1] if self.said else ""


OnBegin = Callable[[int, StageUse, "subprocess.Popen[bytes]"], None]
"""Called when a stage begins, with its number (from 1, those found in the cache counted), the stage and the process."""


def watched(command: list[str], limit: int | None = None, on_begin: OnBegin | None = None, **environment: str) -> Run:
    """Run `command`, which writes its log as JSON to stderr, in `limit` bytes of memory."""
    run = Run(stages=[StageUse(START)])
    began = time.monotonic()
    group = Cgroup(limit) if limit and Cgroup.possible() else None
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | environment,
        preexec_fn=group.enter if group else None,
    )
    try:
        _follow(process, run, None if group else limit, on_begin)
    finally:
        kill_group(process)
        run.status = process.wait()
        run.seconds = time.monotonic() - began
        if group:
            run.over_limit = group.killed()
            group.close()
    last = run.stages[-1]
    if not last.ended:
        last.ended = "over the limit" if run.over_limit else "killed" if run.status < 0 else "done"
    return run


def _follow(process: subprocess.Popen[bytes], run: Run, limit: int | None, on_begin: OnBegin | None) -> None:
    """Read what the process says and uses until it ends."""
    lines: queue.Queue[tuple[str, bytes | None]] = queue.Queue()
    readers = {"said": process.stderr, "out": process.stdout}
    for name, stream in readers.items():
        threading.Thread(target=_read, args=(name, stream, lines), daemon=True).start()
    memory, open_streams, stage_began, number = Memory(process.pid), len(readers), time.monotonic(), 0
    while open_streams:
        memory.sample(run.stages[-1])
        if limit and run.stages[-1].held > limit:
            run.over_limit = True
            kill_group(process)
        try:
            name, line = lines.get(timeout=EVERY)
        except queue.Empty:
            continue
        if line is None:
            open_streams -= 1
            continue
        text = line.decode(errors="replace").rstrip("\n")
        if name == "out":
            run.out += text + "\n"
            continue
        event = _event(text)
        kind = event.get("event")
        if kind is None:
            run.said.append(f"{event['tool']}: {event['message']}" if event else text)
        elif kind in ("begins", "cached"):
            _close(run.stages[-1], memory, stage_began, "done")
            run.stages.append(StageUse(str(event["title"]), "cached" if kind == "cached" else ""))
            stage_began = time.monotonic()
            memory.reset()
            number += 1
            if on_begin and kind == "begins":
                on_begin(number, run.stages[-1], process)
        elif kind in ("done", "failed"):
            _close(run.stages[-1], memory, stage_began, kind)
            run.stages[-1].seconds = float(str(event["seconds"]))
            run.stages.append(StageUse(BETWEEN))
            stage_began = time.monotonic()
            memory.reset()
    _close(run.stages[-1], memory, stage_began, "")


def _close(stage: StageUse, memory: Memory, began: float, ended: str) -> None:
    if not stage.ended:
        memory.sample(stage, precisely=True)
        stage.seconds, stage.ended = time.monotonic() - began, ended


def _read(name: str, stream: IO[bytes], lines: queue.Queue[tuple[str, bytes | None]]) -> None:
    for line in stream:
        lines.put((name, line))
    lines.put((name, None))


def _event(text: str) -> dict[str, object]:
    if text.startswith("{"):
        with suppress(ValueError):
            found = json.loads(text)
            if isinstance(found, dict) and "tool" in found:
                return found
    return {}


class Memory:
    """What a process and its children use."""

    def __init__(self, pid: int) -> None:
        self._root, self._pids, self._looked = pid, [pid], 0.0

    def sample(self, stage: StageUse, precisely: bool = False) -> None:
        """Raise the maxima of `stage` to what is used now, `precisely` with the kernel's own maximum since `reset`."""
        if precisely or time.monotonic() > self._looked + 0.2:
            self._pids, self._looked = descendants(self._root), time.monotonic()
        uses = [status for pid in self._pids if (status := _status(pid))]
        if not uses:
            return
        stage.held = max(stage.held, sum(use["RssAnon"] + use["RssShmem"] for use in uses))
        most = uses[0]["VmHWM"] if precisely else 0
        stage.resident = max(stage.resident, sum(use["VmRSS"] for use in uses), most)

    def reset(self) -> None:
        """Set the kernel's maxima back."""
        for pid in self._pids:
            with suppress(OSError):
                (PROC / str(pid) / "clear_refs").write_text("5")


def descendants(pid: int) -> list[int]:
    """The process and all that it started, itself first."""
    parents: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def _status(pid: int) -> dict[str, int]:
    """Bytes by name, of /proc/PID/status; empty for a process that is gone."""
    found = {"RssAnon": 0, "RssShmem": 0, "VmRSS": 0, "VmHWM": 0}
    with suppress(OSError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = 1024 * int(value.split()[0])
        return found if found["VmRSS"] else {}
    return {}


def kill_group(process: subprocess.Popen[bytes], sent: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the process, which leads a session of its own and was not waited for yet, and to all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, sent)


class Cgroup:
    """A cgroup v2 with a limit of memory and without swap."""

    def __init__(self, limit: int) -> None:
        self._folder = CGROUP / f"real-size-{os.getpid()}"
        self._folder.mkdir()
        (self._folder / "memory.max").write_text(str(limit))
        with suppress(OSError):
            (self._folder / "memory.swap.max").write_text("0")

    @staticmethod
    def possible() -> bool:
        """Whether this process may make one."""
        with suppress(OSError):
            given = (CGROUP / "cgroup.subtree_control").read_text().split()
            return "memory" in given and os.access(CGROUP, os.W_OK)
        return False

    def enter(self) -> None:
        """Called in the child."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def killed(self) -> bool:
        """Whether the kernel killed a process in it for want of memory."""
        events = dict(line.split() for line in (self._folder / "memory.events").read_text().splitlines())
        return int(events.get("oom_kill", 0)) > 0

    def close(self) -> None:
        """Remove it; all its processes must be gone."""
        for _ in range(100):
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.05)


def limited_by() -> str:
    """How `watched` limits memory here, in words."""
    if Cgroup.possible():
        return "cgroup v2, memory.max, no swap"
    return f"read every {EVERY * 1000:.0f} ms, killed above the limit (no cgroup v2 can be made here)"
