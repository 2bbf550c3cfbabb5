"""The report a bundle carries: report.json, a page to look at, and pictures side by side."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fluxrt.pipeline import to_image


def write_report(folder: Path, figures: dict[str, Any], pictures: dict[str, list[np.ndarray]]) -> None:
    """Write report.json, index.html and pictures/ below `folder`; `pictures` maps a column's name to its pictures."""
    import jinja2

    (folder / "pictures").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, images in pictures.items():
        for number, image in enumerate(images):
            to_image(image).save(folder / "pictures" / f"{name}-{number}.png")
    sheet = contact_sheet(pictures)
    sheet.save(folder / "pictures" / "sheet.png")
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
    first = next(iter(targets.values()))
    template = resources.files("fluxc.fidelity").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    (folder / "index.html").write_text(
        page.render(
            name=figures["name"],
            reference=f"{figures['reference']} on the CPU",
            prompts=len(first["prompts"]),
            prompt_list=[p["prompt"] for p in first["prompts"]],
            steps=figures["steps"],
            guidance=figures["guidance"],
            size=figures["size"],
            targets=targets,
            step_rows=step_rows,
            layers=figures["layers"],
            sheet_width=min(sheet.width, 1400),
        ),
        encoding="utf-8",
    )


def contact_sheet(columns: dict[str, list[np.ndarray]], least_side: int = 160) -> Image.Image:
    """A picture with one column a name and one row a prompt; small pictures are enlarged by whole factors."""
    images = {name: [to_image(picture) for picture in pictures] for name, pictures in columns.items()}
    width, height = next(iter(images.values()))[0].size
    factor = max(1, -(-least_side // width))
    width, height, gap, head = width * factor, height * factor, 8, 22
    rows = max(len(column) for column in images.values())
    sheet = Image.new("RGB", (len(images) * (width + gap) + gap, rows * (height + gap) + gap + head), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, pictures) in enumerate(images.items()):
        x = gap + column * (width + gap)
        draw.text((x, 5), name, fill="black")
        for row, picture in enumerate(pictures):
            sheet.paste(
                picture.resize((width, height), Image.Resampling.NEAREST), (x, head + gap + row * (height + gap))
            )
    return sheet
