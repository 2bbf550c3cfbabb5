"""Commands that compile, and those that measure a checkpoint for a build elsewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxc.cli.options import (
    PLACE,
    RECIPE,
    SOURCE,
    memory_option,
    recipe_argument,
    set_option,
    shows_progress,
    threads_option,
    verb,
)

if TYPE_CHECKING:
    from fluxc.base.shown import ShownProgress

BUILD_PARTS = ("graphs", "calibrate", "step-cache", "weights", "targets", "fidelity", "bundle")
device_option = click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", help="Where the model runs."
)


@verb(
    short_help="Compile a recipe into a bundle.",
    arguments=RECIPE,
    example="fluxc build recipes/flux2-nano.yaml --set sampling.steps=12 --out artifacts/nano-12",
)
@recipe_argument
@set_option
@click.option("--out", type=PLACE, help="Bundle folder.", show_default="artifacts/NAME")
@click.option("--until", type=click.Choice(BUILD_PARTS), help="Stop after this part; results are kept for later.")
@memory_option
@threads_option
@shows_progress
def build(recipe: Path, changes: tuple[str, ...], out: Path | None, until: str | None, progress: ShownProgress) -> None:
    """Compile RECIPE into a bundle.

    Results of stages are kept in .fluxc beside the bundle, so a build that was interrupted goes on where it stopped, and one
    that is repeated runs only what changed.
    """
    from fluxc.build.build import build as run
    from fluxc.recipe.load import load_recipe

    loaded = load_recipe(recipe, changes)
    folder = out or Path("artifacts") / loaded.recipe.name
    built = run(loaded, folder, progress, until)
    if built:
        progress.finish(f"built {built}", *_next_steps(built))
        click.echo(click.format_filename(built))
    else:
        progress.finish(f"built up to {until}")
        click.echo(f"done up to {until}; run without --until to make the bundle")


def _next_steps(bundle: Path) -> list[str]:
    """What can be done with a bundle that was just built."""
    from fluxrt.bundle import open_bundle
    from fluxrt.manifest import TensorRTTarget

    targets = open_bundle(bundle).manifest.targets
    unfinished = [t.name for t in targets if isinstance(t, TensorRTTarget) and t.engine.unfinished]
    place = shlex.quote(click.format_filename(bundle))
    steps = [f"report: {click.format_filename(bundle)}/report/index.html"]
    if unfinished:
        steps.append(f"on the GPU it is for: fluxc finish {place}  (builds the plans of {', '.join(unfinished)})")
    return [*steps, f"generate: fluxrt generate {place} --prompt 'a large red circle' --out image.png"]


@verb(
    short_help="Measure the inputs of a recipe's layers, for a build elsewhere.",
    arguments=RECIPE,
    example="fluxc calibrate recipes/flux2-klein-4b.yaml --device cuda --out klein-4b.calibration",
)
@recipe_argument
@set_option
@click.option("--out", type=PLACE, required=True, help="The calibration file to write.")
@device_option
@memory_option
@threads_option
@shows_progress
def calibrate(recipe: Path, changes: tuple[str, ...], out: Path, device: str, progress: ShownProgress) -> None:
    """Run RECIPE's model over its calibration prompts; a build elsewhere takes the file as `calibration.file`."""
    from fluxc.build.measure import calibrate_to_file
    from fluxc.calibrate.summary import print_calibration
    from fluxc.recipe.load import load_recipe

    measured = calibrate_to_file(load_recipe(recipe, changes), out, device, progress)
    progress.finish(f"calibrated {out}", f"in the recipe of the build: calibration: {{file: {out.name}}}")
    print_calibration(measured)
    click.echo(click.format_filename(out))


@verb(
    short_help="Record how much every denoising step changes, for a build elsewhere.",
    arguments=RECIPE,
    example="fluxc trace recipes/flux2-nano-50-steps.yaml --part 1/2 --out steps-1.trace",
)
@recipe_argument
@set_option
@click.option("--out", type=PLACE, required=True, help="The trace file to write.")
@device_option
@click.option("--part", metavar="I/N", default="1/1", help="Trace the I-th of N parts of the prompts alone.")
@memory_option
@threads_option
@shows_progress
def trace(recipe: Path, changes: tuple[str, ...], out: Path, device: str, part: str, progress: ShownProgress) -> None:
    """Record how much every denoising step of RECIPE's model changes, as it quantizes it; a build elsewhere takes the file as
    `step_cache.trace`."""
    from fluxc.build.measure import trace_to_file
    from fluxc.recipe.load import load_recipe
    from fluxc.stepcache.summary import print_trace

    written = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    number, parts = (int(written[1]), int(written[2])) if written else (0, 0)
    if not 1 <= number <= parts:
        raise click.BadParameter(f"{part!r} is not I/N with I from 1 to N, for example 2/4", param_hint="--part")
    traced = trace_to_file(load_recipe(recipe, changes), out, device, (number, parts), progress)
    rest = [] if parts == 1 else ["when all parts are there: fluxc merge-traces PARTS --out FILE"]
    progress.finish(f"traced {out}", *(rest or [f"in the recipe of the build: step_cache: {{trace: {out.name}}}"]))
    print_trace(traced)
    click.echo(click.format_filename(out))


@verb(
    "merge-traces",
    short_help="Put parts of a trace together.",
    arguments={"TRACES": "the files of `fluxc trace --part`, one or more"},
    example="fluxc merge-traces steps-1.trace steps-2.trace --out steps.trace",
)
@click.argument("traces", nargs=-1, required=True, type=SOURCE)
@click.option("--out", type=PLACE, required=True, help="The trace file to write.")
def merge_traces(traces: tuple[Path, ...], out: Path) -> None:
    """Put parts of a trace, made on several machines, together."""
    from fluxc.build.measure import merge_to_file
    from fluxc.stepcache.summary import print_trace

    print_trace(merge_to_file(list(traces), out))
    click.echo(click.format_filename(out))
