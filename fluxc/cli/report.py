"""`fluxc report`: the report of a bundle, and two bundles side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxc.cli.options import PLACE, SOURCE, json_option, verb

if TYPE_CHECKING:
    from fluxc.report.compare import Comparison


BUNDLES = {"BUNDLES": "a bundle to show, or two to compare; the report of a failed build (NAME-failed) will do for one"}


@verb(
    short_help="Show where a bundle's report is, or compare two bundles.",
    arguments=BUNDLES,
    example=(
        "fluxc report artifacts/flux2-nano-nvfp4 --out report.html\n"
        "fluxc report artifacts/one artifacts/other --out both.html"
    ),
)
@click.argument("bundles", nargs=-1, required=True, type=SOURCE)
@click.option("--out", type=PLACE, help="Write the page to this file.")
@json_option
def report(bundles: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Show a bundle's verdict and where its report is, or compare two bundles: recipes, formats, sizes and figures.

    With --out the page is made again from the bundle as it is now: with engines that `finish` built since, and with what
    `add-evidence` added.
    """
    if len(bundles) > 2:
        raise click.UsageError(f"{len(bundles)} bundles were given; one is shown, or two are compared")
    if out:
        _check_page(out)
    if len(bundles) == 1:
        _one(bundles[0], out, as_json)
    else:
        _two((bundles[0], bundles[1]), out, as_json)


def _check_page(out: Path) -> None:
    """Refuse a place where no page can be written, or that is somebody's file."""
    from fluxc.base.errors import RecipeError
    from fluxc.base.output import check_output

    check_output(out, "a page")
    if out.exists() and not out.read_bytes()[:15].lower().startswith(b"<!doctype html"):
        raise RecipeError(f"{out}: exists and is not a page; give another --out, or move it away")


def _one(bundle: Path, out: Path | None, as_json: bool) -> None:
    from fluxc.report.bundles import page_again, page_of, report_of
    from fluxc.report.page import summary
    from fluxc.report.structs import encode_report

    if as_json:
        click.echo(encode_report(report_of(bundle)), nl=False)
        return
    found = report_of(bundle)
    click.echo(f"{found.name}: {'passed' if found.verdict.passed else 'FAILED'}. {summary(found)}")
    for line in found.never_run:
        click.echo(f"not run: {line}")
    if out:
        page_again(bundle, out)
    click.echo(f"{out or page_of(bundle)}")


def _two(bundles: tuple[Path, Path], out: Path | None, as_json: bool) -> None:
    from fluxc.report import compare
    from fluxc.report.bundles import report_of, write_page

    reports = (report_of(bundles[0]), report_of(bundles[1]))
    comparison = compare.compare(*reports, compare.names_of(bundles))
    if out:
        from fluxc.report.compare_page import render_comparison

        write_page(render_comparison(comparison, reports, bundles), out)
    if as_json:
        click.echo(compare.as_json(comparison))
    elif out:
        click.echo(f"{out}")
    else:
        _print(comparison)


def _print(comparison: Comparison) -> None:
    """The comparison as tables."""
    from fluxc.base.console import new_console, new_table
    from fluxc.report.compare import change, shown
    from fluxc.report.compare_page import words

    console = new_console()
    for name, passed in zip(comparison.names, comparison.passed, strict=True):
        console.print(f"{name}: {'passed' if passed else 'FAILED'}")
    if comparison.comparable:
        console.print(comparison.comparable)
    table = new_table("figure", *comparison.names, "change", "better is", title="figures")
    for figure in comparison.figures:
        values = (shown(figure, figure.first), shown(figure, figure.second))
        table.add_row(figure.what, *values, change(figure), figure.better)
    console.print(table)
    if comparison.recipe:
        table = new_table("field", *comparison.names, title="recipe")
        for field in comparison.recipe:
            table.add_row(field.field, words(field.first), words(field.second))
        console.print(table)
    else:
        console.print("The recipes are equal.")
    if comparison.precision:
        table = new_table("layer", *comparison.names, title="precision")
        for layer in comparison.precision:
            sides = ((layer.first, layer.first_rule), (layer.second, layer.second_rule))
            table.add_row(
                f"{layer.component}: {layer.layer}",
                *(f"{format} ({rule})" if format else "none" for format, rule in sides),
            )
        console.print(table)
    else:
        console.print("Every Linear is stored in the same format by the same rule.")
