"""The page of `fluxc tune`: the frontier as a chart and as a table, and the format of every layer that was to be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxc.report.charts import Choice, choices_chart, format_colour
from fluxc.report.page import render_template


@dataclass(frozen=True)
class Frontier:
    """What is shown: a title, the table's columns and rows, choices for the chart against what they take (`axis`), the one that
    was chosen, sentences about them, and the chosen format of every layer."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    choices: Sequence[Choice]
    chosen: Choice
    axis: str
    notes: Sequence[str]
    layers: dict[str, str]


def render_tuning(frontier: Frontier) -> str:
    """The page as HTML; nothing of it lies elsewhere."""
    return render_template(
        "tuning.html.j2",
        f=frontier,
        chart=choices_chart(frontier.choices, frontier.chosen, frontier.axis),
        colours={format: format_colour(format) for format in sorted(set(frontier.layers.values()))},
    )
