"""A case in a forked child of its own: limits of memory and time, an audit of what it opens, and what it came to.

The process that forks must have one thread, so ONNX Runtime, which starts one when it is imported, is imported by the child.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATH_EVENTS = {
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.link": (0, 1),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "shutil.rmtree": (0,),
}
FORBIDDEN = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect", "socket.bind")
SYSTEM = ("/proc", "/sys", "/usr", "/lib", "/lib64", "/dev/null", "/dev/urandom", "/etc/localtime", "/etc/ld.so.cache")
UNEXPECTED = ": unexpected error, "
"""How both tools begin the sentence about what is no error of ours."""
GOOD = ("image", "done", "error", "skipped")


@dataclass(frozen=True)
class Outcome:
    """`what` is image, done, error (an error of our own family) or skipped, or a fault: exception, crash, hang, noise, outside,
    litter, memory.

    `said` is the error's sentence, or what was found.
    """

    what: str
    said: str = ""

    @property
    def is_good(self) -> bool:
        return self.what in GOOD


@dataclass(frozen=True)
class Limits:
    """Bytes of address space beyond what the process has, seconds, folders that may be read (None: any) and written."""

    reads: tuple[Path, ...] | None
    writes: tuple[Path, ...]
    memory: int = 2 << 30
    seconds: float = 30.0
    children: bool = False


class Workspace:
    """A folder in which cases run, put back after each: `pristine` is what it is a copy of."""

    def __init__(self, pristine: Path, root: Path) -> None:
        self.pristine, self.root = pristine, root
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(pristine, root, symlinks=True)
        self._clean = self.listing()

    def listing(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file."""
        found = {}
        for path in self.root.rglob("*"):
            stat = path.lstat()
            found[path.relative_to(self.root).as_posix()] = (0 if path.is_dir() else stat.st_size, stat.st_mtime_ns)
        return {name: entry for name, entry in found.items() if not (self.root / name).is_dir()}

    def differing(self, before: dict[str, tuple[int, int]]) -> list[str]:
        """Files that are other than `before`, a listing."""
        now = self.listing()
        return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))

    def restore(self) -> None:
        """Make it the copy that it was."""
        for name in self.differing(self._clean):
            target, source = self.root / name, self.pristine / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        for folder in sorted((p for p in self.root.rglob("*") if p.is_dir()), reverse=True):
            if not (self.pristine / folder.relative_to(self.root)).is_dir():
                shutil.rmtree(folder, ignore_errors=True)
        self._clean = self.listing()


class Canaries:
    """Files outside of what a case may read; the kernel says whether any was opened, by whatever library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("secret.json", "secret.onnx", "secret.safetensors", "secret.txt"):
            (folder / name).write_bytes(b"{}" * 4096)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._watch = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        access, modify, opened, created, deleted = 0x1, 0x2, 0x20, 0x100, 0x200
        mask = access | modify | opened | created | deleted
        if self._watch < 0 or self._libc.inotify_add_watch(self._watch, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def touched(self) -> list[str]:
        """The files that were opened, made or removed since the last call."""
        found: dict[str, None] = {}
        try:
            data = os.read(self._watch, 1 << 16)
        except BlockingIOError:
            return []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            name = data[16 : 16 + length].rstrip(b"\0").decode()
            if name or not mask & 0x40000000:
                found[name] = None
            data = data[16 + length :]
        return list(found)


@dataclass
class Tally:
    """How many cases of a kind came to what, and those that failed."""

    kind: str
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, case: str, outcome: Outcome) -> None:
        """Count `outcome`; a fault is printed at once."""
        self.counts[outcome.what] = self.counts.get(outcome.what, 0) + 1
        if not outcome.is_good:
            self.failures.append(f"{case}: {outcome.what}: {outcome.said}")
            print(f"FAULT {self.failures[-1]}", flush=True)


def run(work: Callable[[], Any], limits: Limits, log: Path) -> Outcome:
    """What `work` came to in a child: it is a command line's main, whose exit code and stderr say what the user would see.

    stdout and stderr of the child go to `log`.
    """
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads cannot be forked safely"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _child(work, limits, log, writing)
    os.close(writing)
    until, data, hung = time.monotonic() + limits.seconds, b"", False
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        data += part
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if hung:
        return Outcome("hang", f"no end after {limits.seconds:g} s: {_tail(log)}")
    if not data:
        how = signal.Signals(-status).name if status < 0 else f"exit {status}"
        return Outcome("crash", f"{how}: {_tail(log)}")
    return Outcome(**json.loads(data))


def _tail(log: Path, size: int = 400) -> str:
    return log.read_bytes()[-size:].decode(errors="replace").strip() if log.exists() else ""


def _child(work: Callable[[], Any], limits: Limits, log: Path, report: int) -> None:
    """Never returns."""
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        outside: list[str] = []
        sys.addaudithook(_auditor(limits, log, outside))
        outcome = outcome_of(work, log)
        if outside:
            outcome = Outcome("outside", "; ".join(dict.fromkeys(outside[:3])) + f" ({outcome.what})")
        data = json.dumps(outcome.__dict__).encode()
    except BaseException:
        data = json.dumps({"what": "exception", "said": traceback.format_exc()[-600:]}).encode()
    os.write(report, data)
    os._exit(0)


def outcome_of(work: Callable[[], Any], log: Path | None = None) -> Outcome:
    """What a command line's main came to, called in this process, whose stderr is `log`."""
    from fluxrt.errors import FluxError

    try:
        code = work()
    except SystemExit as end:
        code = end.code
    except FluxError as error:
        return Outcome("error", str(error)[:300])
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "flux" in f.filename][-2:]
        return Outcome("exception", f"{type(error).__name__}: {str(error)[:200]} at {' < '.join(reversed(ours))}")
    sys.stdout.flush()
    sys.stderr.flush()
    said = log.read_bytes().decode(errors="replace") if log else ""
    if code in (0, None):
        return Outcome("done")
    # The last is the error; those before it say what was chosen.
    ours = next((line for line in reversed(said.splitlines()) if line.startswith(("fluxrt: ", "fluxc: "))), None)
    if ours is None:
        return Outcome("exception", f"exit {code} without a sentence of ours: {said[-200:]}")
    if UNEXPECTED in ours:
        return Outcome("exception", ours[:300])
    if not said.startswith(("fluxrt: ", "fluxc: ")):
        return Outcome("noise", f"before our sentence: {said[:200]!r}")
    return Outcome("error", ours[:300])


def _auditor(limits: Limits, log: Path, outside: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    reads = None
    if limits.reads is not None:
        code = (sys.prefix, sys.base_prefix, ROOT / "fluxc", ROOT / "runtime", ROOT / ".venv", ROOT / "tests", *SYSTEM)
        reads = tuple(os.path.realpath(path) for path in (*limits.reads, *limits.writes, log, *code))
    writes = tuple(os.path.realpath(path) for path in (*limits.writes, "/dev/null"))
    busy = [False]

    def check(event: str, path: Any, folders: Iterable[str] | None) -> None:
        if isinstance(path, int) or path is None or folders is None:
            return
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == folder or real.startswith(folder + os.sep) for folder in folders):
            outside.append(f"{event} {real}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if busy[0]:
            return
        busy[0] = True
        try:
            if event == "open":
                path, _, flags = args
                check("write" if flags & WRITING else "read", path, writes if flags & WRITING else reads)
            elif event in PATH_EVENTS:
                for at in PATH_EVENTS[event]:
                    check(event, args[at], writes)
            elif event in FORBIDDEN and not limits.children:
                outside.append(event)
        except (ValueError, OSError):
            pass
        finally:
            busy[0] = False

    return hook
