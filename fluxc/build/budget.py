"""The budget of a build: what every stage that is still to run needs of memory, disk and time, and what does not fit here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from fluxc.base.cache import beside
from fluxc.base.estimate import in_words
from fluxc.base.memory import bytes_in_words, chosen_memory, memory_limit
from fluxc.build.budget_rates import Rates
from fluxc.build.budget_stages import SMALL_DISK, Need, Needs
from fluxc.build.job import Job
from fluxc.build.runner import Step, up_to
from fluxc.build.stages import comparing, planned_stages, steps
from fluxc.checkpoint.fetch import cache_folder
from fluxc.checkpoint.source import WEIGHTED
from fluxrt import manifest as format
from fluxrt.cores import usable_cores

HASH, BUNDLE = "hash", "bundle"
"""The stages that are no steps: the checkpoint's files are hashed first, the bundle is put together last."""
DISK_MARGIN = 1.05
"""File systems take a little more than the bytes of files."""


@dataclass(frozen=True)
class Planned:
    """A stage, whether its result is there (`cached`, `to run`, `nothing to do`), and what it needs if it is to run."""

    name: str
    part: str
    result: str
    need: Need | None


@dataclass(frozen=True)
class Disk:
    """A file system that a build writes to: a `folder` there, what is written, and bytes that it needs and has."""

    folder: Path
    what: str
    needed: int
    free: int


@dataclass(frozen=True)
class Budget:
    """What a build needs, and `limit`, the bytes of memory it may take: as the user `chose`, or what is free."""

    stages: tuple[Planned, ...]
    limit: int
    chose: int | None
    disks: tuple[Disk, ...]

    @property
    def to_run(self) -> list[tuple[Planned, Need]]:
        """The stages that are to run."""
        return [(stage, stage.need) for stage in self.stages if stage.need is not None]

    @property
    def peak(self) -> tuple[str, int]:
        """The stage that takes the most memory, and how much; no bytes where nothing is to run."""
        return max(
            ((stage.name, need.memory) for stage, need in self.to_run), key=lambda pair: pair[1], default=("", 0)
        )

    @property
    def disk(self) -> int:
        """Bytes that the build adds, with the most that a stage takes while it runs."""
        needs = [need for _, need in self.to_run]
        return sum(need.disk for need in needs) + max((need.scratch for need in needs), default=0)

    def seconds(self, rates: Rates) -> float:
        """How long the stages that are to run take at these rates."""
        return sum(need.work.seconds(rates) for _, need in self.to_run)

    @property
    def memory_there(self) -> str:
        """The limit in words."""
        limit = bytes_in_words(self.limit)
        return f"--memory gives {limit}" if self._is_chosen else f"{limit} is free"

    @property
    def _is_chosen(self) -> bool:
        return self.chose is not None and self.chose <= self.limit

    def faults(self) -> Iterator[str]:
        """A sentence for each stage that needs more memory than there is, and for each file system that is too small."""
        plain: dict[int, list[str]] = {}
        for stage, need in self.to_run:
            if need.memory <= self.limit:
                continue
            if need.cures or need.how:
                yield self._too_much(f"stage {stage.name} needs", need)
            else:
                plain.setdefault(need.memory, []).append(stage.name)
        for memory, names in plain.items():
            told = f"stage {names[0]} needs" if len(names) == 1 else f"stages {', '.join(names)} need"
            yield self._too_much(told, Need(memory))
        for disk in self.disks:
            if disk.needed > disk.free:
                yield (
                    f"{disk.folder}: {bytes_in_words(disk.free)} of disk is free there, and {disk.what} needs "
                    f"{bytes_in_words(disk.needed)}; free some, or write elsewhere with --out, FLUXC_CACHE and TMPDIR"
                )

    def _too_much(self, who: str, need: Need) -> str:
        how = f", even {need.how}" if need.how == "layer by layer" else ""
        cures = [
            text if size == 0 else f"{text} ({bytes_in_words(size)})" for text, size in need.cures if size <= self.limit
        ]
        there = "a larger --memory, or a machine" if self._is_chosen else "a machine"
        way = f"{there} with {bytes_in_words(need.memory)} of free memory"
        return f"{who} {bytes_in_words(need.memory)} of memory{how}, and {self.memory_there}; use {', or '.join([*cures, way])}"


def budget_of(job: Job, out: Path, until: str | None = None) -> Budget:
    """The budget of building the bundle `out`, with `until` up to that part; what is in the cache needs nothing."""
    limit = memory_limit()
    needs = Needs(job, limit, usable_cores())
    wanted = [step.name for step in up_to([*steps(job, until), *comparing(job)], until)]
    found = [
        (step, result) for step, result in planned_stages(job, [*steps(job), *comparing(job)]) if step.name in wanted
    ]
    stages = [_planned(HASH, "", "to run" if job.digests is None else "cached", lambda: needs.hashing)]
    compared = {step.name for step in comparing(job)}
    before = [result for step, result in found if step.name not in compared]
    # What is compared is the bundle in the making, so whether that was done before is not known until it is made again.
    done = (out / format.MANIFEST).is_file() and stages[0].need is None and "to run" not in before
    for step, result in found:
        need = partial(needs.of, step.name, step.part)
        if done and step.name in compared:
            stages.append(Planned(step.name, step.part, result, None))
        else:
            stages.append(_planned(step.name, step.part, result, need))
    if until in (None, "bundle"):
        copies = job.root != beside(out)
        stages.append(_planned(BUNDLE, "bundle", "cached" if done else "to run", lambda: needs.bundle(copies)))
    return Budget(tuple(stages), limit, chosen_memory(), _disks(job, out, stages))


def _planned(name: str, part: str, result: str, need: Callable[[], Need]) -> Planned:
    return Planned(name, part, result, need() if result == "to run" else None)


def measuring_budget(job: Job, name: str, before: Iterable[Step] = ()) -> Budget:
    """The budget of a command that hashes the checkpoint and measures it in the stage `name`, after the steps `before`."""
    limit = memory_limit()
    needs = Needs(job, limit, usable_cores())
    shown = name.rstrip("-0123456789")
    first = [
        _planned(step.name, step.part, result, partial(needs.of, step.name, step.part))
        for step, result in planned_stages(job, before)
    ]
    stages = (Planned(HASH, "", "to run", needs.hashing), *first, Planned(shown, "", "to run", needs.of(name, "")))
    return Budget(stages, limit, chosen_memory(), _disks(job, None, stages))


def rates_for(job: Job) -> Rates:
    """The rates of this machine, measured once; reading is measured on the largest file of the checkpoint that is here."""
    checkpoint = job.original.checkpoint
    outlines = {entry.outline for entry in checkpoint.missing}
    files = [file for part in WEIGHTED for file in checkpoint.components[part].weight_files if file not in outlines]
    return _rates(max(files, key=lambda file: file.stat().st_size, default=None))


_rates = cache(Rates)


def predicted_seconds(budget: Budget, rates: Rates) -> list[float]:
    """Of every stage that a build shows, in order: the chat template, then those that have something to do or are cached."""
    shown = [stage for stage in budget.stages if stage.result != "nothing to do"]
    return [0.0, *(stage.need.work.seconds(rates) if stage.need else 0.0 for stage in shown)]


def budget_line(budget: Budget, rates: Rates) -> str | None:
    """The budget in a line; None where nothing is to run."""
    if not budget.to_run:
        return None
    name, peak = budget.peak
    how = next(need.how for stage, need in budget.to_run if stage.name == name)
    most = f"{bytes_in_words(peak)} of memory at most ({name}{f', {how}' if how else ''}; {budget.memory_there})"
    return f"predicted: {predicted_time(budget.seconds(rates))}, {most}, {bytes_in_words(budget.disk)} of disk"


def budget_lines(budget: Budget, rates: Rates) -> list[str]:
    """Every stage that is to run, in a line: memory, disk, time."""
    return [
        f"predicted, {stage.name}: {bytes_in_words(need.memory)} of memory, {bytes_in_words(need.disk)} of disk, "
        f"{predicted_time(need.work.seconds(rates))}{f', {need.how}' if need.how else ''}"
        for stage, need in budget.to_run
    ]


def predicted_time(seconds: float) -> str:
    """A predicted time with the digits that mean something: tens of minutes of hours, minutes of minutes, tens of seconds."""
    for unit, least in ((600, 3600.0), (60, 120.0), (10, 20.0)):
        if seconds >= least:
            return f"about {in_words(unit * round(seconds / unit))}".removesuffix(" 0 min").removesuffix(" 0 s")
    return f"about {round(seconds)} s" if seconds >= 1 else "under 1 s"


def budget_as_json(budget: Budget, rates: Rates) -> dict[str, Any]:
    """The budget for scripts."""
    name, peak = budget.peak
    return {
        "stages": [
            {
                "name": stage.name,
                "result": stage.result,
                "memory_bytes": stage.need.memory if stage.need else 0,
                "disk_bytes": stage.need.disk if stage.need else 0,
                "scratch_bytes": stage.need.scratch if stage.need else 0,
                "seconds": round(stage.need.work.seconds(rates), 1) if stage.need else 0.0,
                "runs": stage.need.how or None if stage.need else None,
            }
            for stage in budget.stages
        ],
        "memory_bytes": peak,
        "memory_stage": name or None,
        "memory_limit_bytes": budget.limit,
        "memory_chosen_bytes": budget.chose,
        "disk_bytes": budget.disk,
        "disks": [
            {"folder": str(disk.folder), "needed_bytes": disk.needed, "free_bytes": disk.free} for disk in budget.disks
        ],
        "seconds": round(budget.seconds(rates), 1),
    }


def _disks(job: Job, out: Path | None, stages: Iterable[Planned]) -> tuple[Disk, ...]:
    """The file systems of cache, output and temporary files, each once, with all that is written there."""
    needs = {stage.name: stage.need for stage in stages if stage.need is not None}
    in_cache = [need for name, need in needs.items() if name != BUNDLE]
    cached = sum(need.disk for need in in_cache) + max((need.scratch for need in in_cache), default=0)
    places = [(job.root, "the cache", cached)]
    missing = job.original.checkpoint.missing
    if missing:
        places.append((cache_folder().absolute(), "the download (HF_HUB_CACHE)", sum(entry.size for entry in missing)))
    if out is not None and BUNDLE in needs:
        places.append((beside(out), "the bundle", needs[BUNDLE].disk))
    if needs:
        places.append((Path(tempfile.gettempdir()), "temporary files", SMALL_DISK))
    found: dict[int, Disk] = {}
    for folder, what, size in places:
        folder = _existing(folder)
        device, needed = folder.stat().st_dev, int(DISK_MARGIN * size)
        if device in found:
            before = found[device]
            found[device] = Disk(before.folder, f"{before.what} with {what}", before.needed + needed, before.free)
        else:
            found[device] = Disk(folder, what, needed, shutil.disk_usage(folder).free)
    return tuple(found.values())


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
