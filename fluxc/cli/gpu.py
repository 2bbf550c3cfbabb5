"""Commands that tell what a GPU does with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxc.base.errors import BuildError
from fluxc.cli.options import BUNDLE, PLACE, SOURCE, bundle_argument, shows_progress, threads_option, verb

if TYPE_CHECKING:
    from fluxc.base.shown import ShownProgress

NANO_GPU = Path("artifacts/flux2-nano-gpu")


@verb(
    "gpu-check",
    short_help="Check a bundle on this machine's GPU.",
    arguments={"BUNDLE": f"{BUNDLE['BUNDLE']} (default: {NANO_GPU}, of recipes/flux2-nano-gpu.yaml)"},
    example="fluxc gpu-check artifacts/flux2-nano-gpu --out gpu-check.json",
)
@click.argument("bundle", type=SOURCE, default=NANO_GPU)
@click.option("--out", type=PLACE, required=True, help="The JSON file to write; a page goes beside it.")
@click.option(
    "--dry-run", is_flag=True, help="Rehearse on a made-up GPU, on this machine's CPU; no figure means anything."
)
@click.option(
    "--again",
    multiple=True,
    metavar="NAME",
    help="Repeat a check that the file holds already (a name or pattern); may be repeated.",
)
@threads_option
@shows_progress
def gpu_check(bundle: Path, out: Path, dry_run: bool, again: tuple[str, ...], progress: ShownProgress) -> None:
    """Check BUNDLE on this machine's GPU: images, bits, stages, memory, times. Checks that the file of --out holds are kept."""
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
    for line in run(bundle, out, place, REHEARSED if dry_run else Amount(), again, progress):
        click.echo(line)
    failed = read_record(out).failed
    if failed:
        raise BuildError(
            f"{len(failed)} checks did not pass: {', '.join(failed)}; docs/first-gpu-day.md says what each means"
        )


@verb(
    "add-evidence",
    short_help="Put what gpu-check found into the bundle's manifest and report.",
    arguments={**BUNDLE, "FILE": "the JSON file of `fluxc gpu-check --out`"},
    example="fluxc add-evidence artifacts/flux2-nano-gpu gpu-check.json",
)
@bundle_argument
@click.argument("file", type=SOURCE)
def add_evidence(bundle: Path, file: Path) -> None:
    """Put what `gpu-check` wrote into FILE into BUNDLE's manifest and report, if it ran this very bundle."""
    from fluxc.gpu_check.evidence import add_evidence as run

    click.echo(run(bundle, file))
