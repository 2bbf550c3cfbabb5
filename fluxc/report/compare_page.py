"""The page of two bundles side by side, with images of the prompts that both have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxc.report import pictures
from fluxc.report.compare import Comparison, change, shown
from fluxc.report.page import IMAGES, render_template
from fluxc.report.structs import Report

MOST_PROMPTS = 4
LONGEST = 100


def render_comparison(comparison: Comparison, reports: tuple[Report, Report], folders: tuple[Path, Path]) -> str:
    """The page as HTML; `folders` are those of the two bundles."""
    rows = [
        {"what": figure.what, "first": shown(figure, figure.first), "second": shown(figure, figure.second)}
        | {"change": change(figure), "better": figure.better}
        for figure in comparison.figures
    ]
    return render_template(
        "compare.html.j2",
        c=comparison,
        figures=rows,
        recipe=[(field.field, words(field.first), words(field.second)) for field in comparison.recipe],
        rows=_images(comparison, reports, folders),
        exact=max(reports[0].size) <= pictures.EXACT_SIDE,
    )


def words(value: Any) -> str:
    """A recipe's value in a line, at most LONGEST characters: text as it is, nothing as "none", anything else as JSON."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= LONGEST:
        return text
    count = f"{len(value)} entries: " if isinstance(value, list | tuple) else ""
    return f"{count}{text[:LONGEST]}..."


def _images(
    comparison: Comparison, reports: tuple[Report, Report], folders: tuple[Path, Path]
) -> list[tuple[str, list[pictures.Picture]]]:
    """By prompt that both have, the reference and the images of every target that both ran; those of the second that differ
    most from its reference first."""
    first, second = reports
    if first.size != second.size or "images" not in (first.level, second.level) or first.level != second.level:
        return []
    targets = [name for name in first.targets if name in second.targets]
    numbers = {prompt: number for number, prompt in enumerate(first.prompts)}
    common = [number for number, prompt in enumerate(second.prompts) if prompt in numbers] if targets else []
    common.sort(key=lambda number: pictures.worst_psnr(second, number) or 0.0)
    found = []
    for number in common[:MOST_PROMPTS]:
        prompt = second.prompts[number]
        row = [pictures.recorded(folders[1] / IMAGES, pictures.REFERENCE, number, prompt, "reference")]
        for name in targets:
            for title, report, folder, at in zip(
                comparison.names, reports, folders, (numbers[prompt], number), strict=True
            ):
                psnr = report.targets[name].prompts[at].image_psnr_db
                row.append(pictures.recorded(folder / IMAGES, name, at, prompt, f"{title}: {name}", psnr))
        found.append((prompt, row))
    return found
