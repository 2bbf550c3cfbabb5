"""Commands about recipes themselves: start one, and the schema that editors check them with."""

from __future__ import annotations

from pathlib import Path

import click

from fluxc.cli.options import reports_errors
from fluxc.predict.gpus import GPUS


@click.command()
@click.argument("model", required=False)
@click.option(
    "--for",
    "on",
    type=click.Choice(("cpu", *GPUS), case_sensitive=False),
    default="cpu",
    show_default=True,
    help="What the bundle is to run on.",
)
@click.option(
    "--gpus",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Also for so many GPUs together (on the CPU: processes).",
)
@click.option("--out", type=click.Path(path_type=Path), help="The recipe to write (default: NAME.yaml here).")
@reports_errors
def init(model: str | None, on: str, gpus: int, out: Path | None) -> None:
    """Write a commented recipe for MODEL, with prompt files, and say what to do next.

    MODEL is klein-4b, klein-9b, flux2-nano (the small model of the repository, the default), a diffusers folder, or a hub id.
    Nothing is overwritten.

    Example: fluxc init klein-4b --for rtx-5090
    """
    from fluxc.build.starter import next_steps, write_start

    written = write_start(model, on, gpus, out)
    click.echo(f"wrote {', '.join(str(path) for path in (written.recipe, *written.others))}\n\nNext:")
    for line in next_steps(written):
        click.echo(line)


@click.command()
@reports_errors
def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other tools.

    Example: fluxc schema > recipe.schema.json
    """
    from fluxc.recipe.schema import schema_text

    click.echo(schema_text(), nl=False)
