"""The command line: parse, call, print. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

import fluxc
from fluxc.base.errors import BuildError, FluxError
from fluxc.models.published import MODELS
from fluxc.predict.gpus import GPUS
from fluxrt.signals import INTERRUPTED, ended_by_signal, ended_by_sigterm

BUILD_PARTS = ("graphs", "calibrate", "step-cache", "weights", "targets", "fidelity", "bundle")
NANO_GPU = Path("artifacts/flux2-nano-gpu")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a FluxError into one paragraph on stderr and its exit code; SIGTERM removes what is half written."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with ended_by_sigterm():
                command(*args, **kwargs)
        except BaseException as error:
            code = ended_by_signal(error)
            if code == INTERRUPTED:
                click.echo("fluxc: interrupted; finished stages are kept, run the command again to go on", err=True)
            if code is None and isinstance(error, FluxError):
                click.echo(f"fluxc: {error}", err=True)
                code = error.exit_code
            if code is None:
                raise
            sys.exit(code)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fluxc.__version__, prog_name="fluxc")
def main() -> None:
    """Compile FLUX.2 checkpoints into bundles that a thin runtime generates with."""


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a recipe field.")
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@main.command()
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


@main.command()
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


@main.command()
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


@main.command("merge-traces")
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The trace file to write.")
@reports_errors
def merge_traces(traces: tuple[Path, ...], out: Path) -> None:
    """Put parts of a trace, made on several machines, together."""
    from fluxc.build.measure import merge_to_file
    from fluxc.stepcache.summary import print_trace

    print_trace(merge_to_file(list(traces), out))
    click.echo(f"{out}")


def counts_of(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """Numbers of GPUs, separated by commas, in rising order."""
    try:
        counts = sorted({int(word) for word in value.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise click.BadParameter(f"{value!r} is not a list of numbers of GPUs, for example 1,2,4,8")
    return tuple(counts)


def size_of(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH in pixels."""
    if value is None:
        return None
    height, _, width = value.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise click.BadParameter(f"{value!r} is not a size HEIGHTxWIDTH, for example 1024x1024")
    return int(height), int(width)


@main.command()
@recipe_argument
@set_option
@click.option("--layers/--no-layers", default=True, help="List every layer, or the summary alone.")
@click.option("--presets", is_flag=True, help="Compare the presets on this checkpoint instead.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The bundle folder a build would write (default: artifacts/NAME)."
)
@json_option
@reports_errors
def plan(recipe: Path, changes: tuple[str, ...], layers: bool, presets: bool, out: Path | None, as_json: bool) -> None:
    """Show what building RECIPE would do: precision of every layer and why, sizes, memory, targets, stages. Writes nothing."""
    from fluxc.cli.describe import print_plan, print_plan_json, print_presets
    from fluxc.recipe.load import load_recipe

    loaded = load_recipe(recipe, changes)
    if as_json:
        print_plan_json(loaded, presets)
    elif presets:
        print_presets(loaded)
    else:
        print_plan(loaded, layers, out or Path("artifacts") / loaded.recipe.name)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@set_option
@click.option("--on", required=True, type=click.Choice(tuple(GPUS), case_sensitive=False), help="The kind of GPU.")
@click.option("--gpus", metavar="N,...", callback=counts_of, default="1,2,4,8", show_default=True, help="How many.")
@click.option("--model", type=click.Choice(tuple(MODELS)), help="Without RECIPE: a published model (default: dev).")
@click.option("--size", metavar="HEIGHTxWIDTH", callback=size_of, help="Without RECIPE: pixels (default: 1024x1024).")
@json_option
@reports_errors
def predict(
    recipe: Path | None,
    changes: tuple[str, ...],
    on: str,
    gpus: tuple[int, ...],
    model: str | None,
    size: tuple[int, int] | None,
    as_json: bool,
) -> None:
    """Predict time and memory of RECIPE's model on GPUs that are not here, or of a published model without one."""
    from fluxc.cli.describe import print_prediction
    from fluxc.recipe.load import load_recipe

    if recipe is None and changes:
        raise click.UsageError("--set goes with a RECIPE")
    if recipe and model:
        raise click.UsageError("--model goes without a RECIPE, which names its own model")
    if recipe and size:
        raise click.UsageError("--size goes without a RECIPE, which names its own sizes; change those with --set")
    loaded = load_recipe(recipe, changes) if recipe else None
    print_prediction(loaded, model or "dev", size or (1024, 1024), GPUS[on], gpus, as_json)


@main.command()
@bundle_argument
@reports_errors
def inspect(bundle: Path) -> None:
    """Show what BUNDLE holds, from its manifest."""
    from fluxc.cli.describe_bundle import print_bundle
    from fluxrt.bundle import open_bundle

    print_bundle(open_bundle(bundle))


@main.command()
@bundle_argument
@click.option("--target", help="Generate with this target alone (default: with every one).")
@reports_errors
def verify(bundle: Path, target: str | None) -> None:
    """Check every file's size and SHA-256, then generate a recorded image again and compare."""
    from fluxc.fidelity.verify import verify_bundle

    for line in verify_bundle(bundle, target):
        click.echo(line)


@main.command()
@bundle_argument
@click.option("--target", help="Build this target's plans alone (default: all that are left).")
@reports_errors
def finish(bundle: Path, target: str | None) -> None:
    """Build the plans of BUNDLE that need this machine's GPU, audit them, and seal the bundle again."""
    from fluxc.targets.tensorrt.finish import finish_bundle

    for line in finish_bundle(bundle, target):
        click.echo(line)


@main.command("gpu-check")
@click.argument("bundle", type=click.Path(path_type=Path), default=NANO_GPU)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The JSON file to write; a page goes beside it."
)
@click.option(
    "--dry-run", is_flag=True, help="Rehearse on a made-up GPU, on this machine's CPU; no figure means anything."
)
@click.option(
    "--again", multiple=True, metavar="NAME", help="Repeat a check that FILE holds already (a name or pattern)."
)
@reports_errors
def gpu_check(bundle: Path, out: Path, dry_run: bool, again: tuple[str, ...]) -> None:
    """Check BUNDLE on this machine's GPU: images, bits, stages, memory, times; each check on its own, resumed from FILE.

    BUNDLE is artifacts/flux2-nano-gpu if none is given (recipes/flux2-nano-gpu.yaml).
    """
    from fluxc.gpu_check.place import GpuPlace, Place
    from fluxc.gpu_check.record import read_record
    from fluxc.gpu_check.runner import gpu_check as run
    from fluxc.gpu_check.subject import REHEARSED, Amount

    if out.suffix != ".json":
        raise click.BadParameter(
            f"{out}: give a name that ends in .json; the page beside it ends in .html", param_hint="--out"
        )
    place: Place = GpuPlace()
    if bundle == NANO_GPU and not bundle.exists():
        raise BuildError(f"{bundle}: not built yet; `fluxc build recipes/{bundle.name}.yaml` makes it, without a GPU")
    if dry_run:
        from fluxc.rehearsal.place import MadeUpPlace

        place = MadeUpPlace()
    for line in run(bundle, out, place, REHEARSED if dry_run else Amount(), again):
        click.echo(line)
    failed = read_record(out).failed
    if failed:
        raise BuildError(
            f"{len(failed)} checks did not pass: {', '.join(failed)}; docs/first-gpu-day.md says what each means"
        )


@main.command("add-evidence")
@bundle_argument
@click.argument("file", type=click.Path(path_type=Path))
@reports_errors
def add_evidence(bundle: Path, file: Path) -> None:
    """Put what `gpu-check` wrote into FILE into BUNDLE's manifest and report, if it ran this very bundle."""
    from fluxc.gpu_check.evidence import add_evidence as run

    click.echo(run(bundle, file))


@main.command("export-onnx")
@bundle_argument
@click.option("--for", "consumer", type=click.Choice(("tensorrt",)), default="tensorrt", help="Whose operators to use.")
@click.option("--target", help="Which TensorRT target's graphs (default: the first).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write; it must not exist.")
@reports_errors
def export_onnx(bundle: Path, consumer: str, target: str | None, out: Path) -> None:
    """Write BUNDLE's stages as whole ONNX graphs with their weights, for trtexec and Triton; print the commands."""
    from fluxc.targets.tensorrt.export_onnx import export_onnx as run
    from fluxrt.bundle import open_bundle

    for command in run(open_bundle(bundle), target, out):
        click.echo(command)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@reports_errors
def doctor(bundle: Path | None) -> None:
    """Show what this machine can build and run, and what to install for the rest; of BUNDLE, which target it would choose."""
    from fluxc.cli.describe_bundle import print_doctor, print_targets
    from fluxrt.bundle import open_bundle

    opened = open_bundle(bundle) if bundle else None
    print_doctor()
    if opened:
        print_targets(opened)
