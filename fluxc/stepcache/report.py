"""The report's page on the step cache: how the polynomial fits, the frontier as table and plot, the worst images."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fluxc.base.numbers import as_json
from fluxc.fidelity.report import contact_sheet
from fluxc.stepcache.frontier import METHODS, FrontierRequest
from fluxrt.manifest import StepCache

WORST = 3
NAMES = {
    "static": "fixed schedule",
    "dynamic": "fitted rule",
    "published": "NVIDIA's FLUX.2 rule",
    "fewer steps": "simply fewer steps",
}
JUDGED = {"lpips": "LPIPS, mean", "image_text": "image-text agreement, mean"}


def write_page(
    folder: Path,
    name: str,
    target: str,
    request: FrontierRequest,
    cache: StepCache,
    points: dict[int, dict[str, Any]],
    chosen: dict[str, Any],
    images: tuple[np.ndarray, np.ndarray],
    by_count: dict[int, np.ndarray],
) -> None:
    """Write report/step-cache.{html,json,svg} and the images of the worst prompts below `folder`.

    `points` are the figures by skipped steps and method, `chosen` those of the policy that serves; `images` fp32
    [prompts, height, width, 3] without and with it, `by_count` those of its mode at every point.
    """
    import jinja2

    report = folder / "report"
    (report / "images").mkdir(parents=True)
    worst = sorted(range(len(request.prompts)), key=lambda number: chosen["by_prompt"][number]["psnr_db"])[:WORST]
    full, cached = (found[worst] for found in images)
    maps, scale = error_maps(full, cached)
    rows = {"every step": list(full), "with the step cache": list(cached), f"difference x {scale:.0f}": list(maps)}
    contact_sheet(rows).save(report / "images" / "step-cache-worst.png")
    if by_count:
        number = worst[0]
        strip = [found[number] for found in by_count.values()]
        original = images[0][number]
        maps, scale = error_maps(np.stack([original] * len(strip)), np.stack(strip))
        names = ", ".join(str(count) for count in by_count)
        onset = {f"skipped {names}": strip, f"difference from every step x {scale:.0f}": list(maps)}
        contact_sheet(onset).save(report / "images" / "step-cache-onset.png")
    plot(report / "step-cache.svg", request.steps, points, chosen)
    figures = {"target": target, "chosen": chosen, "frontier": {str(count): found for count, found in points.items()}}
    (report / "step-cache.json").write_text(as_json(figures, "step cache", indent=1) + "\n")
    template = resources.files("fluxc.stepcache").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    (report / "step-cache.html").write_text(
        page.render(
            name=name,
            target=target,
            request=request,
            cache=msgspec.to_builtins(cache),
            points=points,
            methods={key: NAMES[key] for key in METHODS},
            chosen=chosen,
            judged={name: title for name, title in JUDGED.items() if name in chosen},
            onset=request.prompts[worst[0]] if by_count else None,
            worst=[(request.prompts[number], chosen["by_prompt"][number]) for number in worst],
        ),
        encoding="utf-8",
    )


def error_maps(full: np.ndarray, cached: np.ndarray) -> tuple[np.ndarray, float]:
    """Where images differ, brightest where most, on one scale for all: fp32 [images, height, width, 3], and the factor."""
    difference = np.abs(full - cached).max(axis=-1, keepdims=True)
    scale = 1.0 / max(float(difference.max()), 1e-6)
    return np.repeat(difference * scale, 3, axis=-1).astype(np.float32), scale


def plot(path: Path, steps: int, points: dict[int, dict[str, Any]], chosen: dict[str, Any]) -> None:
    """The frontier as an SVG: mean PSNR of every method against the steps it computes, from the 5th percentile up."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Without a salt of its own matplotlib numbers its elements at random.
    with matplotlib.rc_context({"svg.hashsalt": "fluxc", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for method, marker in zip(METHODS, "os^x", strict=True):
            at = sorted((found[method]["computed"], found[method]) for found in points.values())
            x = [computed for computed, _ in at]
            line = axes.plot(x, [found["psnr_db"] for _, found in at], marker=marker, label=NAMES[method])[0]
            low = [found["psnr_db_p5"] for _, found in at]
            axes.fill_between(x, low, [found["psnr_db"] for _, found in at], color=line.get_color(), alpha=0.12, lw=0)
        axes.plot(chosen["computed"], chosen["psnr_db"], "*", color="black", markersize=13, label="this bundle")
        axes.set_xlabel(f"steps computed, of {steps}")
        axes.set_ylabel("PSNR to the full run, dB (shade: to 5th percentile)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
