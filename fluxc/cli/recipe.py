"""Commands about recipes themselves: start one, and the schema that editors check them with."""

from __future__ import annotations

from pathlib import Path

import click

from fluxc.cli.options import PLACE, verb
from fluxc.predict.gpus import GPUS


@verb(
    short_help="Write a recipe to start from.",
    arguments={
        "MODEL": "klein-4b, klein-9b, flux2-nano (the small model of the repository; what is taken without MODEL), a diffusers "
        "folder, or a hub id"
    },
    example="fluxc init klein-4b --for rtx-5090",
)
@click.argument("model", required=False)
@click.option(
    "--for",
    "on",
    type=click.Choice(("cpu", *GPUS), case_sensitive=False),
    default="cpu",
    help="What the bundle is to run on.",
)
@click.option(
    "--gpus",
    type=click.IntRange(1),
    default=1,
    help="Also for so many GPUs together (on the CPU: processes).",
)
@click.option("--out", type=PLACE, help="The recipe to write.", show_default="NAME.yaml")
def init(model: str | None, on: str, gpus: int, out: Path | None) -> None:
    """Write a commented recipe for MODEL, with prompt files, and say what to do next.

    Nothing is overwritten.
    """
    from fluxc.build.starter import next_steps, write_start

    written = write_start(model, on, gpus, out)
    click.echo(f"wrote {', '.join(str(path) for path in (written.recipe, *written.others))}\n\nNext:")
    for line in next_steps(written):
        click.echo(line)


@verb(short_help="Print the JSON schema of a recipe.", example="fluxc schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other tools."""
    from fluxc.recipe.schema import schema_text

    click.echo(schema_text(), nl=False)
