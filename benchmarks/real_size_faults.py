"""What ends a build at a real size, for `real_size.py`: SIGKILL, a full disk, and limits that are too small from the start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_size_place import GIB, Place, checked, compared, disk_of, ended, fluxc, hashes, in_words, takes_budget, tell
from real_size_watch import BETWEEN, START, Run, StageUse, kill_group, watched

FILLER = "filler"
SMALL = 1 << 20
"""A stage that writes less is given a disk without any room."""


def kills(place: Place) -> None:
    """Kill one build after the other, each in the next stage, in the middle of the time that it takes; then let one end."""
    limit = place.options.memory
    _, stages, expected = place.undisturbed(limit)
    listed, recipe = real_stages(stages), place.recipe(place.checkpoint())
    out = place.work / "kills" / "bundle"
    shutil.rmtree(out.parent, ignore_errors=True)
    print(f"### SIGKILL in each stage of {place.name}, in {in_words(limit)}\n")
    print("| stage | killed after, s | of, s | left half made | results that the build found | bundle |")
    print("|---|---|---|---|---|---|", flush=True)
    for number, stage in enumerate(listed, 1):
        if place.options.stages and place.options.stages not in stage.title:
            continue
        timers: list[threading.Timer] = []

        def on_begin(
            at: int,
            _stage: StageUse,
            process: subprocess.Popen[bytes],
            number: int = number,
            after: float = stage.seconds / 2,
            timers: list[threading.Timer] = timers,
        ) -> None:
            for timer in timers:
                timer.cancel()
            if at == number:
                timers.append(threading.Timer(after, kill_group, [process]))
                timers[-1].start()
            elif at > number:
                # It was quicker than before: its result is there, and no later stage's work shall be.
                kill_group(process)

        try:
            run = place.build(recipe, out, limit, on_begin)
        finally:
            for timer in timers:
                timer.cancel()
        if run.status not in (0, -signal.SIGKILL) or run.over_limit:
            raise SystemExit(ended(run))
        was_in_it = run.status and real_stages(run.stages)[-1].title == stage.title
        how = f"{stage.seconds / 2:.2f}" if was_in_it else "when it was over"
        print(
            f"| {stage.title} | {how} | {stage.seconds:.2f} | {half_made(out)} | {found_by(run)} | {state(out)} |",
            flush=True,
        )
    resumed(place.build(recipe, out, limit), out, expected)


def disk(place: Place) -> None:
    """Fill the disk in one build after the other, each in the next stage, to half of what it writes; then let one end."""
    limit = place.options.memory
    bundle, stages, expected = place.undisturbed(limit)
    listed, recipe = real_stages(stages), place.recipe(place.checkpoint())
    whole = disk_of(bundle.parent)
    after = [stage.disk for stage in listed[1:]] + [whole]
    print(f"### A full disk in each stage of {place.name}, in {in_words(limit)}\n")
    with small_disk(place.work, int(1.05 * whole) + GIB) as folder:
        out = folder / "made" / "bundle"
        print(
            "| stage | writes, MiB | room, MiB | how the build ended | left half made | results that it found | bundle |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        for number, (stage, then) in enumerate(zip(listed, after, strict=True), 1):
            if place.options.stages and place.options.stages not in stage.title:
                continue
            writes = max(0, then - stage.disk)
            room = writes // 2 if writes > SMALL else 0

            def on_begin(
                at: int,
                _stage: StageUse,
                process: subprocess.Popen[bytes],
                number: int = number,
                room: int = room,
            ) -> None:
                if at == number:
                    # It must not write while the disk is filled.
                    kill_group(process, signal.SIGSTOP)
                    fill(folder, room)
                    kill_group(process, signal.SIGCONT)

            run = place.build(recipe, out, limit, on_begin)
            (folder / FILLER).unlink(missing_ok=True)
            how = f"exit {run.status}: {run.error}" if run.status else "it needed no more room"
            if run.status < 0 or "Traceback" in " ".join(run.said):
                raise SystemExit(ended(run))
            cells = [stage.title, f"{writes / 2**20:.1f}", f"{room / 2**20:.1f}", shown(how, folder)]
            print(f"| {' | '.join(cells)} | {half_made(out)} | {found_by(run)} | {state(out)} |", flush=True)
        resumed(place.build(recipe, out, limit), out, expected)


def refuse(place: Place) -> None:
    """Limits of memory and a disk that are too small from the start: seconds until that is said, and what is left."""
    recipe = place.recipe(place.checkpoint())
    began = time.monotonic()
    checked([*fluxc(), "--version"])
    print(f"### Limits below what {place.name} needs\n")
    print(f"`fluxc --version` alone takes {time.monotonic() - began:.2f} s.\n")
    print("| command | limit | s | exit | files left |\n|---|---|---|---|---|")
    said: list[str] = []
    out = place.work / "refused" / "bundle"
    for limit in place.options.limits.split(",") if takes_budget() else []:
        for verb in ("plan", "build"):
            command = [
                *fluxc(),
                verb,
                str(recipe),
                "--memory",
                limit,
                *(["--out", str(out)] if verb == "build" else []),
            ]
            shutil.rmtree(out.parent, ignore_errors=True)
            out.parent.mkdir(parents=True)
            run = watched(command)
            print(
                f"| {verb} | --memory {limit} | {run.seconds:.2f} | {run.status} | {files_in(out.parent)} |", flush=True
            )
            said.append(f"`{verb} --memory {limit}`:\n\n```\n" + "\n".join(run.said) + "\n```")
    shutil.rmtree(out.parent, ignore_errors=True)
    if not takes_budget():
        print("| build | this fluxc has no --memory | | | |")
    with small_disk(place.work, GIB) as folder:
        out = folder / "made" / "bundle"
        out.parent.mkdir()
        run = place.build(recipe, out, None)
        print(f"| build | 1 GiB of disk | {run.seconds:.2f} | {run.status} | {files_in(out.parent)} |", flush=True)
        said.append("`build` on a disk of 1 GiB:\n\n```\n" + shown("\n".join(run.said), folder) + "\n```")
    print("\n" + "\n\n".join(said) + "\n", flush=True)


def real_stages(stages: list[StageUse]) -> list[StageUse]:
    """The stages that fluxc names."""
    return [stage for stage in stages if stage.title not in (START, BETWEEN)]


def resumed(run: Run, out: Path, expected: dict[str, str]) -> None:
    """Say whether the build that nothing disturbed any more came to the bytes that it should."""
    if run.status:
        raise SystemExit(ended(run))
    made = [stage for stage in real_stages(run.stages) if stage.ended == "done"]
    what = ", ".join(f"{stage.title} {stage.seconds:.1f} s" for stage in made)
    print(f"\nThe build after that found {found_by(run)} results and ran: {what}.")
    print(f"{compared(hashes(out), expected)}\n", flush=True)
    left = half_made(out)
    if left != "nothing":
        print(f"**Left behind**: {left}\n")


def half_made(out: Path) -> str:
    """Hidden folders beside the bundle and in its cache: what was being made."""
    folders = [path for path in out.parent.rglob(".*") if path.is_dir() and path.name != ".fluxc"]
    names = sorted(path.name.lstrip(".").rpartition("-")[0] or path.name for path in folders)
    return ", ".join(names) or "nothing"


def found_by(run: Run) -> int:
    """How many results of stages were in the cache."""
    return sum(stage.ended == "cached" for stage in run.stages)


def state(out: Path) -> str:
    """Whether there is a bundle."""
    return "there" if (out / "bundle.json").is_file() else "**half there**" if out.exists() else "not there"


def files_in(folder: Path) -> int:
    """How many files there are, but for locks, which are empty."""
    return sum(path.is_file() and path.stat().st_size > 0 for path in folder.rglob("*"))


def shown(text: str, folder: Path) -> str:
    """A message for a cell of a table, without the place where the disk was mounted."""
    return text.replace(str(folder), "DISK").replace("|", "\\|")


def fill(folder: Path, room: int) -> None:
    """Leave so many bytes on the disk of `folder`; with 0 not a block."""
    with (folder / FILLER).open("wb") as file:
        while (free := _free(folder) - room) > 4096:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), min(free, 64 << 20) // 4096 * 4096)
            except OSError:
                # What is free and what can be had differ by the file system's own blocks.
                break
            file.seek(0, os.SEEK_END)
        if room == 0:
            block = bytes(4096)
            try:
                while True:
                    os.write(file.fileno(), block)
            except OSError:
                pass
        os.fsync(file.fileno())


def _free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


@contextmanager
def small_disk(work: Path, size: int) -> Iterator[Path]:
    """An ext4 file system of `size` bytes in a sparse file, mounted; SystemExit where that is not allowed."""
    image, folder = work / "disk.img", work / "disk"
    folder.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        image.unlink()
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise SystemExit(f"a small disk needs root, mkfs.ext4 and loop devices: {said.decode().strip()}") from error
    try:
        yield folder
    finally:
        for _ in range(50):
            if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode == 0:
                break
            tell(f"{folder} is still in use")
            time.sleep(0.2)
        folder.rmdir()
        image.unlink()
