"""`fluxc calibrate`: the calibration of a recipe as a file of its own, so that it can be made on another machine."""

from __future__ import annotations

from pathlib import Path

from fluxc.base.cache import PROGRESS
from fluxc.base.errors import BuildError, FluxError
from fluxc.base.progress import StageProgress
from fluxc.build import stages
from fluxc.calibrate.file import CalibrationFile, read_calibration
from fluxc.recipe.load import LoadedRecipe


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
    with stages.measuring(loaded, out, progress) as (cache, source, digests), progress.stage("calibrate") as report:
        stages.make_calibration(loaded, source, digests, out, cache.root / PROGRESS / out.stem, device, report)
    return read_calibration(out)
