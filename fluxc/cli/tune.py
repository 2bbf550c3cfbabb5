"""`fluxc tune`: formats of layers, and what steps do, under a limit of predicted time or memory, or of measured error."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.options import (
    PLACE,
    RECIPE,
    json_option,
    memory_option,
    recipe_argument,
    set_option,
    shows_progress,
    threads_option,
    verb,
)
from fluxc.predict.gpus import GPUS

if TYPE_CHECKING:
    from fluxc.base.shown import ShownProgress
    from fluxc.build.tune import Tuned
    from fluxc.build.tuning_space import Point, Wish

CANDIDATES = ("nvfp4", "nvfp4-w4a16", "fp8")
"""Formats of layers that are tried where --formats does not say."""


class _Positive(click.FloatRange):
    """A finite number above zero."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; click's usage error for what is none."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


POSITIVE = _Positive(min=0, min_open=True)


@verb(
    short_help="Choose formats of layers under a limit of time, memory or error.",
    arguments=RECIPE,
    example="fluxc tune recipes/flux2-nano.yaml --on rtx-5090 --error 0.08 --out recipes/flux2-nano-tuned.yaml",
)
@recipe_argument
@set_option
@click.option("--on", required=True, type=click.Choice(tuple(GPUS), case_sensitive=False), help="The kind of GPU.")
@click.option("--gpus", type=click.IntRange(1, 8), default=1, help="How many.")
@click.option("--time", "milliseconds", type=POSITIVE, metavar="MS", help="Most predicted time of a step.")
@click.option("--gpu-memory", type=POSITIVE, metavar="GIB", help="Most predicted memory of the fullest GPU.")
@click.option("--error", type=POSITIVE, help="Most relative error of the velocity, as the costs of groups add up.")
@click.option(
    "--least",
    type=click.Choice(("time", "memory")),
    default="time",
    help="Under --error: what there is to be least of.",
)
@click.option(
    "--formats",
    metavar="FORMAT,...",
    help="Formats a layer may have, besides bf16.",
    show_default=f"those of {', '.join(CANDIDATES)} that the GPU computes in",
)
@click.option(
    "--steps/--no-steps",
    default=True,
    help="Also choose steps at which layers in NVFP4 leave their inputs as they are, where the recipe's targets can.",
)
@click.option(
    "--skips/--no-skips",
    default=True,
    help="Also choose how many steps a step cache skips, where the recipe can have one.",
)
@click.option("--out", type=PLACE, help="The recipe to write.", show_default="RECIPE-tuned.yaml")
@memory_option
@threads_option
@json_option
@shows_progress
def tune(recipe: Path, changes: tuple[str, ...], out: Path | None, progress: ShownProgress, **options: Any) -> None:
    """Choose the format of each layer that RECIPE quantizes, steps at which inputs are not rounded, and how many steps are
    skipped: the least error under limits of time and memory, or the least time or memory under one of error.

    What a format costs is measured on calibration's prompts, what it saves is predicted for the GPU. Shown is the frontier,
    each choice measured as a whole; the one that meets the limit is written as a recipe, with a page beside it that has
    the frontier as a chart.
    """
    from fluxc.base.errors import RecipeError
    from fluxc.base.output import check_output
    from fluxc.build.tune import Candidates
    from fluxc.build.tune import tune as run
    from fluxc.formats.registry import check_format, multiplied_in
    from fluxc.recipe.edit import write_with_formats
    from fluxc.recipe.load import load_recipe

    wish, gpu = _wish(options), GPUS[options["on"]]
    if options["formats"] is None:
        formats = tuple(name for name in CANDIDATES if multiplied_in(name) in gpu.gemms)
    else:
        formats = tuple(dict.fromkeys(word.strip() for word in options["formats"].split(",")))
    for format in formats:
        check_format(format, "--formats")
    loaded = load_recipe(recipe, changes)
    target = out or recipe.with_name(f"{recipe.stem}-tuned.yaml")
    check_output(target, "a recipe")
    page = target.with_suffix(".html")
    if page == target:
        raise RecipeError(f"--out {target}: is the name of the page beside the recipe; give a name such as tuned.yaml")
    check_output(page, "a page")
    for place in (target, page):
        if place.exists():
            raise RecipeError(f"{place}: exists already, and is not overwritten; give another --out, or move it away")
    if target.resolve().parent != recipe.resolve().parent:
        raise RecipeError(f"--out {target}: a recipe's paths start from its folder; write it beside {recipe}")
    # Beside the bundle that a build makes by default, which then finds them.
    kept = Path("artifacts") / f"{loaded.recipe.name}-tuned"
    candidates = Candidates(formats, options["steps"], options["skips"])
    tuned = run(loaded, (gpu, options["gpus"]), wish, candidates, kept, progress)
    skip = len(tuned.chosen.skipped) if tuned.may_skip else None
    _write_page(tuned, wish.axis, target, page)
    write_with_formats(recipe, changes, tuned.rules, target, tuned.steps, skip)
    # What was written must say what was chosen.
    load_recipe(target)
    progress.finish(f"tuned {target}", f"build it: fluxc build {target}")
    if options["as_json"]:
        click.echo(json.dumps(_as_json(tuned), indent=2))
        return
    _print(tuned)
    click.echo(click.format_filename(page))
    click.echo(click.format_filename(target))


def _wish(options: dict[str, Any]) -> Wish:
    from fluxc.build.tuning_space import Wish

    milliseconds, memory, error = (options[name] for name in ("milliseconds", "gpu_memory", "error"))
    if (milliseconds is None and memory is None) == (error is None):
        raise click.UsageError("give --time, --gpu-memory or both of them, or --error")
    seconds = None if milliseconds is None else milliseconds / 1e3
    return Wish(seconds, None if memory is None else memory * 2**30, error, options["least"])


def _as_json(tuned: Tuned) -> dict[str, Any]:
    return {
        "gpu": tuned.gpu.name,
        "gpus": tuned.gpus,
        "measured_on": tuned.measured_on,
        "frontier": [asdict(point) for point in tuned.frontier],
        "chosen": asdict(tuned.chosen),
        "bf16": asdict(tuned.plain),
        "rules": tuned.rules,
        "steps": tuned.steps,
        "skipped": list(tuned.chosen.skipped),
    }


COLUMNS = (
    "",
    "a step, ms",
    "x bf16",
    "weights",
    "GPU",
    "error, added up",
    "error, measured",
    "layers",
    "steps",
    "skipped",
)


def _rows(tuned: Tuned) -> list[list[str]]:
    rows = [("", point) for point in tuned.frontier] + [("chosen", tuned.chosen), ("bf16", tuned.plain)]
    return [[name, *_figures(point, tuned)] for name, point in rows]


def _title(tuned: Tuned) -> str:
    return f"time and memory PREDICTED for {tuned.gpus} x {tuned.gpu.name}, one image; error measured"


def _notes(tuned: Tuned) -> list[str]:
    on = tuned.measured_on
    return [
        f"Errors are of the guided velocity, relative, root mean square over {on['prompts']} calibration prompts at steps "
        f"{', '.join(map(str, on['steps']))}{' (measured: at all)' if tuned.may_skip else ''}, with inputs rounded as a GPU "
        "rounds them. Added up: what each layer costs alone. Steps: at how many of an image's the inputs of so many layers are "
        "left as they are. Skipped: how many are, which take no time. A step's time is the average of all.",
        *(f"{note[0].upper()}{note[1:]}." for note in tuned.notes),
    ]


def _print(tuned: Tuned) -> None:
    from fluxc.base.console import new_console, new_table

    console, table = new_console(), new_table(*COLUMNS, title=_title(tuned))
    for row in _rows(tuned):
        table.add_row(*row)
    console.print(table)
    for note in _notes(tuned):
        console.print(note)


def _write_page(tuned: Tuned, axis: str, recipe: Path, page: Path) -> None:
    """The same as a page, with the frontier as a chart."""
    from fluxc.base.output import write_complete
    from fluxc.report.charts import Choice
    from fluxc.report.tuning_page import Frontier, render_tuning

    def choice(point: Point) -> Choice:
        takes = 1e3 * point.seconds if axis == "seconds" else point.weights / 2**20
        time, _, weights, _, added_up, measured, layers, _, skipped = _figures(point, tuned)
        words = f"{time} ms a step, weights of {weights}, error {measured} ({added_up} added up): {layers}"
        if point.exact_steps:
            words += f", inputs of {len(point.exact_layers)} left as they are at {len(point.exact_steps)} steps"
        words += f", {skipped} steps skipped" if skipped else ""
        return Choice(takes, point.predicted_error, point.error or 0.0, words)

    title = f"{recipe.name}: {_title(tuned)}"
    frontier = Frontier(
        title,
        COLUMNS,
        _rows(tuned),
        [choice(point) for point in tuned.frontier],
        choice(tuned.chosen),
        "a step, ms, predicted" if axis == "seconds" else "weights, MiB",
        _notes(tuned),
        tuned.rules,
    )
    write_complete(page, render_tuning(frontier))


def _figures(point: Point, tuned: Tuned) -> list[str]:
    from fluxc.report.page import bytes_words

    left = len(tuned.names) - len(point.choice)
    formats = [f"{count} {format}" for format, count in point.formats.items()] + ([f"{left} bf16"] if left else [])
    return [
        f"{1e3 * point.seconds:.4g}",
        f"{tuned.plain.seconds / point.seconds:.2f}",
        bytes_words(point.weights),
        bytes_words(point.memory),
        f"{point.predicted_error:.4f}",
        "" if point.error is None else f"{point.error:.4f}",
        ", ".join(formats),
        f"{len(point.exact_steps)}: {len(point.exact_layers)} exact" if point.exact_steps else "",
        f"{len(point.skipped)}" if point.skipped else "",
    ]
