"""Commands that tell what a recipe would come to, and write nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from fluxc.cli.options import PLACE, RECIPE, SOURCE, json_option, memory_option, recipe_argument, set_option, verb
from fluxc.models.published import MODELS
from fluxc.predict.gpus import GPUS


@verb(
    short_help="Show what building a recipe would do; writes nothing.",
    arguments=RECIPE,
    example="fluxc plan recipes/flux2-nano.yaml --set precision.transformer.preset=nvidia-blog",
)
@recipe_argument
@set_option
@click.option("--layers/--no-layers", default=True, help="List every layer, or the summary alone.")
@click.option("--presets", is_flag=True, help="Compare the presets on this checkpoint instead.")
@click.option("--out", type=PLACE, help="The bundle folder a build would write.", show_default="artifacts/NAME")
@memory_option
@json_option
def plan(recipe: Path, changes: tuple[str, ...], layers: bool, presets: bool, out: Path | None, as_json: bool) -> None:
    """Show what building RECIPE would do: precision of every layer and why, sizes, memory, targets, stages. Writes nothing."""
    from fluxc.cli.describe import print_plan, print_plan_json, print_presets
    from fluxc.recipe.load import load_recipe

    loaded = load_recipe(recipe, changes)
    folder = out or Path("artifacts") / loaded.recipe.name
    if as_json:
        print_plan_json(loaded, presets, folder)
    elif presets:
        print_presets(loaded, folder)
    else:
        print_plan(loaded, layers, folder)


def counts_of(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Numbers of GPUs or images, separated by commas, in rising order."""
    if value is None:
        return None
    try:
        counts = sorted({int(word) for word in value.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise click.BadParameter(f"{value[:40]!r} is not a list of numbers, for example 1,2,4,8")
    return tuple(counts)


def size_of(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH in pixels."""
    if value is None:
        return None
    sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value)
    if sides is None:
        raise click.BadParameter(f"{value[:40]!r} is not a size HEIGHTxWIDTH, for example 1024x1024")
    return int(sides[1]), int(sides[2])


@verb(
    short_help="Predict time and memory on GPUs that are not here.",
    arguments={"RECIPE": f"{RECIPE['RECIPE']}; without it, a published model"},
    example="fluxc predict --on rtx-5090 --model klein-4b --size 1024x1024",
)
@click.argument("recipe", type=SOURCE, required=False)
@set_option
@click.option("--on", required=True, type=click.Choice(tuple(GPUS), case_sensitive=False), help="The kind of GPU.")
@click.option("--gpus", metavar="N,...", callback=counts_of, default="1,2,4,8", help="How many.")
@click.option(
    "--model", type=click.Choice(tuple(MODELS)), help="Without RECIPE: a published model.", show_default="dev"
)
@click.option(
    "--size", metavar="HEIGHTxWIDTH", callback=size_of, help="Without RECIPE: pixels.", show_default="1024x1024"
)
@click.option(
    "--batch",
    metavar="N,...",
    callback=counts_of,
    help="How many images at once, besides one.",
    show_default="the recipe's batches",
)
@json_option
def predict(
    recipe: Path | None, changes: tuple[str, ...], on: str, gpus: tuple[int, ...], as_json: bool, **options: Any
) -> None:
    """Predict time and memory of RECIPE's model on GPUs that are not here, or of a published model without one."""
    from fluxc.cli.describe import print_prediction
    from fluxc.recipe.load import load_recipe

    model, size = options["model"], options["size"]
    if recipe is None and changes:
        raise click.UsageError("--set goes with a RECIPE")
    if recipe and model:
        raise click.UsageError("--model goes without a RECIPE, which names its own model")
    if recipe and size:
        raise click.UsageError("--size goes without a RECIPE, which names its own sizes; change those with --set")
    loaded = load_recipe(recipe, changes) if recipe else None
    print_prediction(loaded, model or "dev", size or (1024, 1024), GPUS[on], gpus, options["batch"], as_json)
