"""Commands that tell what a GPU does with a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from fluxc.base.errors import BuildError
from fluxc.cli.options import bundle_argument, reports_errors

NANO_GPU = Path("artifacts/flux2-nano-gpu")


@click.command("gpu-check")
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


@click.command("add-evidence")
@bundle_argument
@click.argument("file", type=click.Path(path_type=Path))
@reports_errors
def add_evidence(bundle: Path, file: Path) -> None:
    """Put what `gpu-check` wrote into FILE into BUNDLE's manifest and report, if it ran this very bundle."""
    from fluxc.gpu_check.evidence import add_evidence as run

    click.echo(run(bundle, file))
