"""The page of a GPU check: outcomes in a table, then every figure."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec

from fluxc.gpu_check.record import Record, write_by_rename


def write_page(path: Path, record: Record, shows: dict[str, str]) -> None:
    """Write the page of `record`, with its images, which lie beside; `shows` says by check what it is about."""
    write_by_rename(path, render([record], shows, pictures=True).encode())


def render(records: list[Record], shows: dict[str, str], pictures: bool) -> str:
    """The page of these records as HTML."""
    import jinja2

    template = resources.files("fluxc.gpu_check").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    return page.render(records=[msgspec.to_builtins(record) for record in records], shows=shows, pictures=pictures)
