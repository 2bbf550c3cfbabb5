"""What a machine may lack: disk, memory, files, folders, cores, time, a locale, standard streams."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from campaign.cases import UNEXPECTED, Outcome, Tally
from campaign.damage import PROMPT
from campaign.part import RECIPE, SETTINGS
from quick import contents

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, PRIVATE, RECURSIVE, BIND, REMOUNT, READ_ONLY = 0x20000, 1 << 18, 1 << 14, 1 << 12, 32, 1
MEMORY = """\
import resource, sys
from pathlib import Path
import fluxrt
from fluxrt.cli import main
# A generation first: a library that cannot be loaded for want of memory is Python's error, not ours.
fluxrt.load(sys.argv[2], threads=1).generate(fluxrt.Request('a dot', steps=1)).images[0].save('/dev/null', format='PNG')
most = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + {extra}
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.exit(main(sys.argv[1:]))
"""
CLOCK = """\
import itertools, sys, time
from {module} import main
before, counted = time.time(), itertools.count()
time.time = lambda: before - 3600 * next(counted)
sys.exit(main(sys.argv[1:]))
"""


def read_only(folder: str, *but: Path) -> Callable[[], None]:
    """In the child alone: `folder` read-only, except for what is listed; OSError where that needs a right it lacks."""

    def mount(source: bytes | None, target: bytes, flags: int) -> None:
        if LIBC.mount(source, target, None, flags, None):
            raise OSError(ctypes.get_errno(), f"mount {target!r}")

    def cover() -> None:
        if LIBC.unshare(NEW_MOUNTS):
            raise OSError(ctypes.get_errno(), "unshare")
        mount(b"none", b"/", PRIVATE | RECURSIVE)
        whole = os.fsencode(folder)
        mount(whole, whole, BIND | RECURSIVE)
        for path in map(os.fsencode, but):
            mount(path, path, BIND)
        mount(None, whole, REMOUNT | BIND | READ_ONLY)

    return cover


def campaign(bundle: Path, work: Path, sizes: int, seed: int, with_builds: bool) -> list[Tally]:
    """Every lack with a generation in one process, in two, and with a build whose stages are in the cache; `sizes` random
    sizes of a full disk and of memory. Without builds, one generation for each."""
    runner = _Runner(bundle, work)
    ours = [path for path in (work, Path(os.environ["FLUXC_CACHE"])) if path.is_relative_to("/tmp")]
    conditions: dict[str, dict[str, object]] = {
        "64 open files": {"before": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))},
        "HOME=/proc/none": {"environment": {"HOME": "/proc/none", "XDG_CACHE_HOME": ""}},
        "read-only HOME": {"environment": {"HOME": "/proc"}},
        "TMPDIR missing": {"environment": {"TMPDIR": "/nonexistent"}},
        "read-only /tmp": {"before": read_only("/tmp", *ours), "environment": {"TMPDIR": "/tmp"}},
        "read-only /dev/shm": {"before": read_only("/dev/shm")},
        "one core": {"before": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})},
        "locale C": {"environment": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}},
        "clock going back": {"code": CLOCK},
        "stdin closed": {"closed": (0,)},
        "stdout closed": {"closed": (1,)},
        "stderr closed": {"closed": (2,)},
        "all three closed": {"closed": (0, 1, 2)},
    }
    rng, tallies = random.Random(f"{seed}/resources"), []
    for at, (name, condition) in enumerate(conditions.items()):
        tally = Tally(name)
        for gpus in ("1", "2") if with_builds else "12"[at % 2]:
            tally.add(f"{name}, generate --gpus {gpus}", runner.generate(gpus, **condition))
        if with_builds:
            tally.add(f"{name}, build", runner.build(**condition))
        tallies.append(tally)
    memory, disk = Tally("little memory"), Tally("full disk")
    for _ in range(sizes):
        extra = int(2 ** rng.uniform(20, 30))
        code = MEMORY.format(extra=extra)
        memory.add(f"{extra} bytes of memory more (seed {seed})", runner.generate("1", code=code))
        pages = rng.randrange(1, 8)
        with _Disk(work / "disk", 4096 * pages) as folder:
            disk.add(f"image on {pages} pages of {_Disk.how} (seed {seed})", runner.generate("1", folder=folder))
        if with_builds:
            size = rng.randrange(4096, int(1.2 * runner.size))
            with _Disk(work / "disk", size) as folder:
                disk.add(f"bundle on {size} bytes of {_Disk.how} (seed {seed})", runner.build(folder=folder))
    return [*tallies, memory, disk]


class _Disk:
    """A small file system; where none can be mounted, a folder, and a limit for the size of each file."""

    how = "tmpfs"

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> Path:
        self.folder.mkdir(exist_ok=True)
        options = f"size={self.size}".encode()
        if LIBC.mount(b"none", os.fsencode(self.folder), b"tmpfs", 0, options):
            _Disk.how = "RLIMIT_FSIZE"
            self._old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self._old[1]))
        return self.folder

    def __exit__(self, *_: object) -> None:
        if _Disk.how == "tmpfs":
            LIBC.umount2(os.fsencode(self.folder), 0)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._old)
            shutil.rmtree(self.folder)


class _Runner:
    def __init__(self, bundle: Path, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)
        (work / "out").mkdir(parents=True)
        self._bundle, self._work, self._expected = bundle, work, contents(bundle)
        self.size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        self._images: dict[str, bytes] = {}
        for gpus in ("1", "2"):
            outcome = self.generate(gpus)
            if outcome.what != "image":
                raise SystemExit(f"an undisturbed generation came to {outcome}")

    def generate(self, gpus: str, folder: Path | None = None, code: str = "", **condition: object) -> Outcome:
        """An image into `folder`, which must be as without the condition, or an error of ours and nothing left."""
        folder = folder or self._work / "out"
        arguments = [
            "generate",
            str(self._bundle),
            "--prompt",
            f"{PROMPT} é猫",
            "--threads",
            "1",
            "--gpus",
            gpus,
            "--out",
        ]
        start = ["-c", code.format(module="fluxrt.cli")] if code else ["-m", "fluxrt"]
        outcome = self._run([sys.executable, *start, *arguments, str(folder / "image.png")], "fluxrt: ", **condition)
        files = sorted(path.name for path in folder.iterdir())
        image = (folder / "image.png").read_bytes() if "image.png" in files else None
        for name in files:
            (folder / name).unlink()
        if outcome.what == "done" and image is not None:
            if self._images.setdefault(gpus, image) != image:
                return Outcome("exception", "another image")
            outcome = Outcome("image")
        elif outcome.what == "done":
            outcome = Outcome("exception", "exit 0 and no image")
        rest = [name for name in files if name != "image.png" or outcome.what != "image"]
        return Outcome("litter", f"{', '.join(rest)} ({outcome})") if rest and outcome.is_good else outcome

    def build(self, folder: Path | None = None, code: str = "", **condition: object) -> Outcome:
        """The bundle into `folder`, from the cache."""
        folder = folder or self._work / "out"
        out = folder / "campaign"
        arguments = ["build", str(RECIPE), *(a for c in SETTINGS for a in ("--set", c)), "--out", str(out)]
        start = ["-c", code.format(module="fluxc.cli.main")] if code else ["-m", "fluxc"]
        outcome = self._run([sys.executable, *start, *arguments], "fluxc: ", **condition)
        if outcome.what == "done" and (not out.exists() or contents(out) != self._expected):
            outcome = Outcome("exception", "another bundle, or none")
        beside = [p.name for p in (folder / ".fluxc").glob("*")] if (folder / ".fluxc").exists() else []
        rest = [name for name in beside if not name.startswith(".lock-")]
        rest += [p.name for p in folder.iterdir() if p.name not in (".fluxc", "campaign") or outcome.what == "error"]
        rest = [name for name in rest if name != ".fluxc"]
        for path in folder.iterdir():
            shutil.rmtree(path)
        return Outcome("litter", f"{', '.join(rest)} ({outcome})") if rest and outcome.is_good else outcome

    def _run(
        self,
        command: list[str],
        ours: str,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        closed: tuple[int, ...] = (),
    ) -> Outcome:
        def prepare() -> None:
            if before:
                before()
            for descriptor in closed:
                os.close(descriptor)

        log = self._work / "said.txt"
        with log.open("wb") as said, Path(os.devnull).open() as nothing:
            try:
                ended = subprocess.run(
                    command,
                    stdin=nothing,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env=os.environ | (environment or {}),
                    preexec_fn=prepare if before or closed else None,
                    timeout=300,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return Outcome("hang", "no end after 300 s")
            except subprocess.SubprocessError as error:
                return Outcome("skipped", str(error))
        text = log.read_text(errors="replace")
        if ended.returncode == 0:
            return Outcome("done")
        if ended.returncode < 0:
            return Outcome("crash", f"signal {-ended.returncode}: {text[-300:]}")
        if 2 in closed and not text:
            return Outcome("error", f"exit {ended.returncode}")
        lines = [line for line in text.splitlines() if line.startswith(ours)]
        if "Traceback" in text or UNEXPECTED in text or not lines:
            return Outcome("exception", text[-300:].strip())
        return Outcome("error", lines[-1][:300])
