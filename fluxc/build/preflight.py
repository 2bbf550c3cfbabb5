"""What `build` refuses before its first stage, and `plan` by the same call: nothing is written, nothing long runs.

A recipe is refused for what it says, for the files it names, for the checkpoint, and for what this machine lacks. A fault that
is found later depends on numbers that only a stage computes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fluxc.base.cache import StageCache, UnknownDigestError, beside, cache_root, locked
from fluxc.base.errors import BuildError, CheckpointError, RecipeError
from fluxc.base.measured import Measured, check_origin
from fluxc.base.output import check_output, check_writable, names_place
from fluxc.base.progress import StageProgress
from fluxc.build.budget import Budget, budget_of, measuring_budget
from fluxc.build.job import Job, check_prompts, fetch_missing, hash_checkpoint, open_job, template_of
from fluxc.build.requests import calibration_request, judges_of, trace_request, trace_size
from fluxc.build.runner import Step, folder_of
from fluxc.checkpoint.files import Digests, files_read
from fluxc.recipe.faults import Collected
from fluxc.recipe.load import LoadedRecipe
from fluxc.targets.registry import kind_of
from fluxrt import manifest as format

HASHED_AT_ONCE = 64 << 20
"""Bytes of a file whose hash may be computed here, where it is not remembered."""


@dataclass(frozen=True)
class Preflight:
    """A job that can be started, and what this machine lacks for it."""

    job: Job
    prompting: format.Prompting
    lacking: Collected
    budget: Budget

    def check_machine(self) -> None:
        """Raise BuildError naming everything that this machine lacks for a build; a plan can be shown without."""
        _raise_lacking(self.lacking)


def _raise_lacking(lacking: Collected) -> None:
    try:
        lacking.raise_all()
    except RecipeError as error:
        raise BuildError(str(error)) from error


def preflight(loaded: LoadedRecipe, out: Path, until: str | None = None, is_build: bool = False) -> Preflight:
    """The job of building `loaded` into the folder `out`, with `until` up to that part, after refusing all that can be refused
    before its first stage.

    Raises RecipeError for recipe and command line, CheckpointError for a damaged checkpoint, BuildError for a place that the
    system does not let be written. What this machine lacks is told by the result; where it is a build (`is_build`), it is a
    BuildError at once, before the chat template is rendered, which takes seconds of imports.
    """
    check_place(out)
    root = cache_root(out)
    job = open_job(loaded, root)
    lacking, budget = lacking_here(loaded), budget_of(job, out, until)
    for fault in budget.faults():
        with lacking.collecting():
            raise RecipeError(fault)
    if is_build:
        _raise_lacking(lacking)
    prompting = known_prompting(job)
    collected = Collected(loaded.places)
    with collected.collecting():
        check_prompts(job, prompting)
    with collected.collecting():
        _check_origins(job)
    with collected.collecting():
        _check_fit(job)
    collected.raise_all()
    return Preflight(job, prompting, lacking, budget)


def check_place(out: Path) -> None:
    """Refuse an output where no bundle can be written, or that is something else."""
    check_output(out, "a bundle", is_folder=True)
    if out.exists() and not (out / format.MANIFEST).is_file():
        raise RecipeError(f"{out}: exists and is not a bundle; give another --out, or move it away")
    check_workshop(out)


def check_workshop(out: Path) -> None:
    """Refuse an output beside which, or a cache in which, nothing can be written."""
    for folder in (beside(out), cache_root(out)):
        check_writable(folder)


def lacking_here(loaded: LoadedRecipe) -> Collected:
    """What this machine lacks for a build: libraries of targets, modelopt and its GPU, and networks that judge images."""
    collected = Collected(loaded.places)
    for at, target in enumerate(loaded.recipe.targets):
        with collected.collecting(), _of_recipe(f"targets[{at}]"):
            kind_of(target.kind).check_library(target)
    if loaded.recipe.calibration.engine == "modelopt":
        from fluxc.calibrate.modelopt import check_available

        with collected.collecting(), _of_recipe():
            check_available()
    judges = judges_of(loaded)
    if judges:
        from fluxc.fidelity.perceptual import Judges

        lpips, clip = judges.get("lpips"), judges.get("image_text")
        with collected.collecting(), _of_recipe():
            Judges(lpips[0] if lpips else None, clip[0].parent if clip else None)
    return collected


def known_prompting(job: Job) -> format.Prompting:
    """The manifest's `prompting`: as it is in the cache, or rendered, which takes transformers, into a folder that is gone
    afterwards."""
    cache = StageCache(job.root, StageProgress())
    stage = template_of(job, lambda file: _digest(cache, file) or "")
    found = cache.find(folder_of(cache, stage, cache.known_digest))
    if found is not None:
        return job.prompting(stage.load(found))
    with names_place(stage.title, Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as scratch:
        stage.run(stage.inputs, Path(scratch), lambda *_: None)
        return job.prompting(stage.load(Path(scratch)))


def _check_origins(job: Job) -> None:
    """Refuse given measurements that were made on another checkpoint, as far as its hashes are known or quickly computed."""
    given: list[tuple[str, Measured, dict[str, object]]] = []
    if job.calibration:
        given.append(("calibration.file", job.calibration, calibration_request(job.loaded, job.is_large)))
    if job.trace:
        given.append(("step_cache.trace", job.trace, trace_request(job.loaded)))
    if not given:
        return
    cache = StageCache(job.root, StageProgress())
    for field, file, request in given:
        with _of_recipe(field):
            check_origin(file, _digests(job, cache, file.origin.checkpoint), request)


def _digests(job: Job, cache: StageCache, recorded: Digests) -> Digests:
    """Hashes of the checkpoint's files; of a large one that is not known, and of one on the hub, the one that is recorded."""
    outlines = {entry.outline for entry in job.original.checkpoint.missing}
    return {
        part: {
            file.name: (None if file in outlines else _digest(cache, file)) or recorded.get(part, {}).get(file.name, "")
            for file in files
        }
        for part, files in files_read(job.original.checkpoint).items()
    }


def _digest(cache: StageCache, file: Path) -> str | None:
    """SHA-256 of a file, if it is known or quickly computed; it is not remembered, since nothing is written here."""
    try:
        return cache.known_digest(file)
    except UnknownDigestError:
        if file.stat().st_size > HASHED_AT_ONCE:
            return None
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_fit(job: Job) -> None:
    """Refuse a given trace that no step cache of the recipe can be fitted to."""
    settings = job.loaded.recipe.step_cache
    if settings is None or job.trace is None:
        return
    from fluxc.stepcache.choose import make_step_cache
    from fluxc.stepcache.file import read_trace

    with _of_recipe("step_cache.trace"):
        make_step_cache(settings, read_trace(job.trace.path).trace, trace_size(job.loaded.recipe))


@contextmanager
def _of_recipe(field: str = "") -> Iterator[None]:
    """Turn an error about what the recipe asks for into one of the recipe, naming `field`."""
    try:
        yield
    except (BuildError, CheckpointError) as error:
        raise RecipeError(f"{field}: {error}" if field else str(error)) from error


@contextmanager
def measuring(
    loaded: LoadedRecipe,
    out: Path,
    progress: StageProgress,
    stage: str,
    given: tuple[str, ...] = (),
    before: Callable[[Job], Iterable[Step]] = lambda _: (),
) -> Iterator[tuple[StageCache, Job]]:
    """The cache and the job for a command that measures the checkpoint into the file `out`, as the build's stage `stage` does
    after the steps `before`; prompts and what it needs are checked first. It takes the recipe's files that are `given`.
    """
    check_workshop(out)
    job = open_job(loaded, cache_root(out), given)
    check_prompts(job, known_prompting(job))
    for fault in measuring_budget(job, stage, before(job)).faults():
        raise BuildError(fault)
    if fetch_missing(job, progress):
        job = open_job(loaded, cache_root(out), given)
    with names_place("measure", out), locked(out), StageCache(job.root, progress) as cache:
        hash_checkpoint(cache, job)
        yield cache, job
        cache.remember(str(out.resolve()))
        cache.prune()
