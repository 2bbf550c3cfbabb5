"""`fluxc calibrate`: the calibration of a recipe as a file of its own, so that it can be made on another machine."""

from __future__ import annotations

from pathlib import Path

from fluxc import stages
from fluxc.cache import PROGRESS, StageCache, locked
from fluxc.calibrate.file import CalibrationFile, read_calibration
from fluxc.errors import BuildError, FluxError
from fluxc.planned_source import read_source
from fluxc.progress import StageProgress
from fluxc.recipe import LoadedRecipe


def calibrate_to_file(loaded: LoadedRecipe, out: Path, device: str, progress: StageProgress) -> CalibrationFile:
    """Write the calibration of `loaded` to `out` and return it; prompts finished before an interruption are not run again.

    An older calibration file at `out` is replaced; BuildError if something else is there. Hashes of the checkpoint and
    finished prompts are kept in `.fluxc/` beside `out`.
    """
    if out.exists():
        try:
            read_calibration(out)
        except FluxError as error:
            raise BuildError(f"{out}: exists and is not a calibration file; give another --out") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = StageCache(out.resolve().parent / ".fluxc", progress)
    with locked(cache.root):
        source = read_source(loaded)
        with progress.stage("hash checkpoint") as report:
            digests = stages.checkpoint_digests(source.checkpoint, cache, report)
        prompting = stages.run_prompting(cache, loaded.recipe, source, digests)
        stages.check_prompts(loaded, source, prompting)
        with progress.stage("calibrate") as report:
            stages.make_calibration(loaded, source, digests, out, cache.root / PROGRESS / out.stem, device, report)
        cache.prune()
    return read_calibration(out)
