"""The report a bundle carries: report.json, a page to look at, and images side by side."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fluxc.base.numbers import as_json
from fluxrt.pipeline import to_image


def write_report(folder: Path, figures: dict[str, Any], rows: dict[str, list[np.ndarray]]) -> None:
    """Write report.json, index.html and images/ below `folder`.

    `rows` maps the reference and each target to its images, fp32 [height, width, 3] in 0..1, in the prompts' order.
    """
    import jinja2

    (folder / "images").mkdir(parents=True)
    (folder / "report.json").write_text(as_json(figures, "report", indent=1) + "\n")
    for name, images in rows.items():
        for number, image in enumerate(images):
            to_image(image).save(folder / "images" / f"{name}-{number}.png")
    sheet = contact_sheet(rows)
    sheet.save(folder / "images" / "sheet.png")
    targets = figures["targets"]
    steps = range(figures["steps"])
    step_rows = [
        [
            (
                f"{max(p['step_error'][step] for p in target['prompts']):.2e}",
                f"{min(p['step_cosine'][step] for p in target['prompts']):.5f}",
            )
            for target in targets.values()
        ]
        for step in steps
    ]
    template = resources.files("fluxc.fidelity").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    (folder / "index.html").write_text(
        page.render(
            name=figures["name"],
            reference=f"{figures['reference']} on the CPU",
            prompts=len(figures["prompts"]),
            prompt_list=figures["prompts"],
            steps=figures["steps"],
            guidance=figures["guidance"],
            size=figures["size"],
            targets=targets,
            step_rows=step_rows,
            layers=figures["layers"],
            sensitivity=figures["sensitivity"],
            engines=figures["engines"],
            not_run=figures["not_run"],
            ranks=figures["ranks"],
            step_cache=figures["step_cache"],
            sheet_width=min(sheet.width, 1400),
        ),
        encoding="utf-8",
    )


def contact_sheet(rows: dict[str, list[np.ndarray]], least_side: int = 128) -> Image.Image:
    """An image with one row a name and one column a prompt; small images are enlarged by whole factors."""
    sheets = {name: [to_image(image) for image in images] for name, images in rows.items()}
    width, height = next(iter(sheets.values()))[0].size
    factor = max(1, -(-least_side // width))
    width, height, gap, head = width * factor, height * factor, 8, 20
    columns = max(len(row) for row in sheets.values())
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(sheets) * (height + gap + head) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(sheets.items()):
        y = gap + row * (height + gap + head)
        draw.text((gap, y), name, fill="black")
        for column, image in enumerate(images):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + column * (width + gap), y + head))
    return sheet
