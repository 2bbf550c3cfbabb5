"""The report of a bundle that is there: read, brought up to date, and its page made again."""

from __future__ import annotations

from pathlib import Path

from fluxc.base.errors import BuildError
from fluxc.base.output import check_output, names_place
from fluxc.fidelity.on_target import FILES
from fluxc.report.assemble import as_it_is
from fluxc.report.page import IMAGES, render
from fluxc.report.structs import PAGE, REPORT_JSON, Report, read_report
from fluxrt.bundle import open_bundle
from fluxrt.manifest import MANIFEST


def report_of(folder: Path) -> Report:
    """The report of the bundle at `folder` as the bundle is now, or of a failed build as it was.

    Raises BuildError, and the errors of opening a bundle.
    """
    if not (folder / MANIFEST).exists() and (folder / REPORT_JSON).exists():
        return read_report(folder / REPORT_JSON)
    bundle = open_bundle(folder)
    return as_it_is(read_report(bundle.path(REPORT_JSON)), bundle.manifest)


def page_of(folder: Path) -> Path:
    """The page in the bundle at `folder`: the one with figures of GPUs where there are any."""
    if (folder / MANIFEST).exists():
        files = open_bundle(folder).manifest.files
        added = [name for name in files if name.startswith(FILES) and name.endswith(".html")]
        return folder / (added[0] if added else PAGE)
    if (folder / PAGE).exists():
        return folder / PAGE
    raise BuildError(f"{folder}: neither a bundle nor the report of a failed build; `fluxc build RECIPE` makes one")


def write_page(text: str, out: Path) -> None:
    """Write a page to the file `out`; BuildError where that is not possible."""
    check_output(out, "a page")
    with names_place("report", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


def page_again(folder: Path, out: Path) -> None:
    """Make the page of the bundle at `folder` again, with all that was added since, and write it to `out`."""
    write_page(render(report_of(folder), folder / IMAGES), out)
