"""The images of a report's page, inside the page: as data URIs, with maps of where they differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fluxc.fidelity.causes_stage import image_name
from fluxc.report.structs import Report

MOST_PROMPTS = 8
LEAST_WHITE = 8
"""Levels of 255: the smallest difference that a map shows in white, so that rounding to 8 bits stays dark."""
EXACT_SIDE, MOST_SIDE = 256, 512
"""Pixels: images up to the first are embedded without loss, larger ones are shrunk to the second."""
QUALITY = 88
REFERENCE = "reference"


@dataclass(frozen=True)
class Picture:
    """One image of the page: what it is, where it is in text, its data URI, and its PSNR if it is compared with another."""

    title: str
    alt: str
    uri: str
    psnr_db: float | None = None
    is_map: bool = False


@dataclass(frozen=True)
class Row:
    """The images of one prompt, the reference first, and the worst PSNR of any target."""

    number: int
    prompt: str
    worst_psnr_db: float | None
    pictures: tuple[Picture, ...]


def rows(report: Report, images: Path) -> list[Row]:
    """The MOST_PROMPTS prompts whose images differ most, worst first, from the folder `images`."""
    if report.level != "images":
        return []
    order = sorted(range(len(report.prompts)), key=lambda number: worst_psnr(report, number) or 0.0)
    return [_row(report, images, number) for number in order[:MOST_PROMPTS]]


def worst_psnr(report: Report, number: int) -> float | None:
    """The lowest PSNR in dB of the prompt's images on any target; None where there is none."""
    found = [figures.prompts[number].image_psnr_db for figures in report.targets.values()]
    return min((psnr for psnr in found if psnr is not None), default=None)


def onset(report: Report, images: Path) -> list[Picture]:
    """The worst prompt of the step cache: with every step, as served, and with each number of steps skipped."""
    cache = report.step_cache
    if cache is None or cache.chosen is None:
        return []
    full = _read(images / "step-cache-every-step.png")
    worst = cache.chosen.worst_prompt
    found = [Picture("every step", f"{report.prompts[worst]}, every step computed", _uri(full))]
    for count in cache.onset:
        image = _read(images / f"step-cache-skipped-{count}.png")
        psnr = cache.frontier[str(count)][cache.mode].by_prompt[worst].psnr_db
        found.append(
            Picture(f"{count} skipped", f"{report.prompts[worst]}, {count} steps skipped", _uri(image), psnr_db=psnr)
        )
    return found


def causes(report: Report, images: Path, titles: Mapping[str, str]) -> list[Row]:
    """The images of each cause of error alone, with `titles`, and where they differ from the reference."""
    found = report.causes
    if found is None:
        return []
    rows = []
    for number, prompt in enumerate(found.prompts):
        reference = _read(images / image_name(REFERENCE, number))
        made = {cause: _read(images / image_name(cause, number)) for cause in titles if cause in found.psnr_db}
        pictures = [Picture(REFERENCE, f"{prompt}, by {report.reference}", _uri(reference))]
        for cause, image in made.items():
            alt = f"{prompt}, with {titles[cause]} alone" if cause != "all" else f"{prompt}, with every cause"
            pictures.append(Picture(cause, alt, _uri(image), psnr_db=found.psnr_db[cause][number]))
        pictures += [_difference(cause, image, "the reference", reference) for cause, image in made.items()]
        rows.append(Row(number, prompt, min(psnrs[number] for psnrs in found.psnr_db.values()), tuple(pictures)))
    return rows


def recorded(images: Path, name: str, number: int, prompt: str, title: str, psnr_db: float | None = None) -> Picture:
    """The recorded image of a target, or of the reference, for the prompt of that number."""
    return Picture(title, f"{prompt}, by {name}", _uri(_read(images / f"{name}-{number}.png")), psnr_db=psnr_db)


def _row(report: Report, images: Path, number: int) -> Row:
    prompt = report.prompts[number]
    reference = _read(images / f"{REFERENCE}-{number}.png")
    pictures = [Picture(REFERENCE, f"{prompt}, by {report.reference}", _uri(reference))]
    made = {name: _read(images / f"{name}-{number}.png") for name in report.targets}
    for name, image in made.items():
        psnr = report.targets[name].prompts[number].image_psnr_db
        pictures.append(Picture(name, f"{prompt}, by target {name}", _uri(image), psnr_db=psnr))
    pictures += [_difference(name, image, "the reference", reference) for name, image in made.items()]
    pictures += _cached(report, images, number, made)
    return Row(number, prompt, worst_psnr(report, number), tuple(pictures))


def _cached(report: Report, images: Path, number: int, made: dict[str, np.ndarray]) -> Iterator[Picture]:
    """The image with the step cache, and its difference from every step where that is the same request."""
    cache = report.step_cache
    if cache is None or cache.chosen is None:
        return
    image = _read(images / f"step-cache-{number}.png")
    found = cache.chosen.by_prompt[number]
    title = f"{cache.target} with step cache"
    alt = f"{report.prompts[number]}, by target {cache.target}, {len(found.skipped)} of {cache.steps} steps skipped"
    yield Picture(title, alt, _uri(image), psnr_db=found.psnr_db)
    if cache.target in made and made[cache.target].shape == image.shape and cache.steps == report.steps:
        yield _difference("step cache", image, f"{cache.target} with every step", made[cache.target])


def _difference(title: str, image: np.ndarray, other: str, reference: np.ndarray) -> Picture:
    """Where two images differ: the largest of the three colours; white is the largest of the image, or LEAST_WHITE."""
    found = np.abs(image.astype(np.int16) - reference.astype(np.int16)).max(axis=-1)
    largest = int(found.max())
    scaled = (found * (255 // max(largest, LEAST_WHITE))).astype(np.uint8)
    alt = f"map of the difference between {title} and {other}; the largest is {largest} of 255 levels"
    return Picture(f"difference: {title}", alt, _uri(scaled), is_map=True)


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _uri(pixels: np.ndarray) -> str:
    """The image as a data URI: WebP without loss up to EXACT_SIDE, beyond that shrunk to MOST_SIDE."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= EXACT_SIDE:
        image.save(file, format="WEBP", lossless=True, quality=100, method=4)
    else:
        image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
