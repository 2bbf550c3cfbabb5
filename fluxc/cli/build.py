"""Commands that compile, and those that measure a checkpoint for a build elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click

from fluxc.cli.options import recipe_argument, reports_errors, set_option

BUILD_PARTS = ("graphs", "calibrate", "step-cache", "weights", "targets", "fidelity", "bundle")


@click.command()
@recipe_argument
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="Bundle folder (default: artifacts/NAME).")
@click.option("--until", type=click.Choice(BUILD_PARTS), help="Stop after this part; results are kept for later.")
@reports_errors
def build(recipe: Path, changes: tuple[str, ...], out: Path | None, until: str | None) -> None:
    """Compile RECIPE into a bundle."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build as run
    from fluxc.recipe.load import load_recipe

    loaded = load_recipe(recipe, changes)
    folder = out or Path("artifacts") / loaded.recipe.name
    built = run(loaded, folder, StageProgress(), until)
    click.echo(f"{built}" if built else f"done up to {until}; run without --until to make the bundle")


@click.command()
@recipe_argument
@set_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The calibration file to write.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", help="Where the model runs.")
@reports_errors
def calibrate(recipe: Path, changes: tuple[str, ...], out: Path, device: str) -> None:
    """Run RECIPE's model over its calibration prompts; a build elsewhere takes the file as `calibration.file`."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.measure import calibrate_to_file
    from fluxc.calibrate.summary import print_calibration
    from fluxc.recipe.load import load_recipe

    print_calibration(calibrate_to_file(load_recipe(recipe, changes), out, device, StageProgress()))
    click.echo(f"{out}")


@click.command()
@recipe_argument
@set_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The trace file to write.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", help="Where the model runs.")
@click.option("--part", metavar="I/N", default="1/1", help="Trace the I-th of N parts of the prompts alone.")
@reports_errors
def trace(recipe: Path, changes: tuple[str, ...], out: Path, device: str, part: str) -> None:
    """Record how much every denoising step changes; a build elsewhere takes the file as `step_cache.trace`."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.measure import trace_to_file
    from fluxc.recipe.load import load_recipe
    from fluxc.stepcache.summary import print_trace

    written = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    number, parts = (int(written[1]), int(written[2])) if written else (0, 0)
    if not 1 <= number <= parts:
        raise click.BadParameter(f"{part!r} is not I/N with I from 1 to N, for example 2/4", param_hint="--part")
    print_trace(trace_to_file(load_recipe(recipe, changes), out, device, (number, parts), StageProgress()))
    click.echo(f"{out}")


@click.command("merge-traces")
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The trace file to write.")
@reports_errors
def merge_traces(traces: tuple[Path, ...], out: Path) -> None:
    """Put parts of a trace, made on several machines, together."""
    from fluxc.build.measure import merge_to_file
    from fluxc.stepcache.summary import print_trace

    print_trace(merge_to_file(list(traces), out))
    click.echo(f"{out}")
