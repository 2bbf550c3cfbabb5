"""The charts of a report's page: SVG by matplotlib, whose colours are the page's own in light and dark.

Each chart is drawn for a wide page and for a phone. Text stays text, marks that stand for one thing carry its figures as a
title, and the same input gives the same bytes. The figures are also in a table beside every chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from fluxc.report.structs import Report
from fluxrt.stepprecision import BODY

WIDE, NARROW = 8.4, 3.7
"""Inches of 96 pixels on the page."""
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "limit": "#040404",
    **{f"c{number}": f"#0{number}0505" for number in range(1, 7)},
}
"""Custom properties of the page's style, and the colours that stand for them while matplotlib draws."""
FORMATS = {"nvfp4": "c1", "fp8": "c2", "mxfp4": "c3", "nvfp4-w4a16": "c6", "bf16": "c4"}
OTHER_FORMAT = "c5"
GATE_LINE: dict[str, Any] = {"color": COLOURS["limit"], "lw": 1.5, "ls": (0, (5, 3))}
MOST_LAYERS = 30
SERIES = ("c1", "c2", "c3", "c5", "c6", "c4")
METHODS = {
    "static": "fixed schedule",
    "dynamic": "fitted rule",
    "published": "NVIDIA's FLUX.2 rule",
    "fewer steps": "simply fewer steps",
}


@dataclass
class Canvas:
    """A chart being drawn: matplotlib's axes, whether it is for a phone, and the titles of marks by their number."""

    axes: Any
    narrow: bool
    titles: list[str] = field(default_factory=list)

    def title(self, mark: Any, text: str) -> None:
        """Let the mark show `text` when it is pointed at."""
        mark.set_gid(f"mark-{len(self.titles)}")
        self.titles.append(text)


@dataclass(frozen=True)
class Chart:
    """A chart for the page: its two SVGs, and what it shows in a sentence."""

    name: str
    summary: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Choice:
    """A choice of `fluxc tune`: what it takes, its error as costs add up and as it was measured, and its figures in words."""

    takes: float
    added_up: float
    measured: float
    words: str


Draw = Callable[[Canvas], None]


def format_colour(name: str) -> str:
    """The custom property of a format's colour."""
    return FORMATS.get(name, OTHER_FORMAT)


def layers_chart(report: Report) -> Chart | None:
    """Weight SNR of the layers that lost most, worst at the top, with the gate."""
    measured = sorted((x for x in report.layers if x.snr_db is not None), key=lambda x: (x.snr_db, x.name))
    shown = measured[:MOST_LAYERS]
    if not shown:
        return None
    limit, height = _limit(report, "layer_snr_db"), 1.4 + 0.21 * len(shown)

    def draw(canvas: Canvas) -> None:
        axes = canvas.axes
        colours = [COLOURS[format_colour(layer.format)] for layer in shown]
        bars = axes.barh(range(len(shown)), [layer.snr_db for layer in shown], 0.72, color=colours)
        for bar, layer in zip(bars, shown, strict=True):
            output = "" if layer.output_snr_db is None else f"; output {layer.output_snr_db} dB"
            canvas.title(bar, f"{layer.name}: {layer.format}, weight {layer.snr_db} dB{output}; {layer.rule}")
        known = [(layer.output_snr_db, at) for at, layer in enumerate(shown) if layer.output_snr_db is not None]
        if known:
            outputs = {"color": COLOURS["ink"], "markersize": 4, "label": "output of the layer"}
            axes.plot([snr for snr, _ in known], [at for _, at in known], "D", **outputs)
            _legend(canvas, below=0.55 / height)
        names = [_short(layer.name, 26) if canvas.narrow else layer.name for layer in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, max(limit or 0, *(max(x.snr_db or 0, x.output_snr_db or 0) for x in shown)) * 1.06)
        if limit is not None:
            axes.axvline(limit, **GATE_LINE)
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text(limit, 1.005, f"gate {limit:g} dB", color=COLOURS["limit"], **place)
        axes.set_xlabel("SNR, dB (longer is better)")
        axes.grid(axis="x")

    of = f"the {len(shown)} of {len(measured)}" if len(measured) > len(shown) else f"all {len(shown)}"
    gate = "" if limit is None else f", against the gate of {limit:g} dB"
    summary = (
        f"Signal-to-noise ratio of {of} quantized layers, worst first: {shown[0].name} has {shown[0].snr_db} dB{gate}."
    )
    return _chart("layers", summary, draw, (height, height), left=(3.35, 1.85), bottom=0.85, top=0.3)


def steps_chart(report: Report) -> Chart | None:
    """The worst cosine of every step by target, with the gate."""
    if not report.targets:
        return None
    limit = _limit(report, "step_cosine")
    worst = {
        name: [min(prompt.step_cosine[step] for prompt in figures.prompts) for step in range(report.steps)]
        for name, figures in report.targets.items()
    }
    schedule = report.step_precision.schedule if report.step_precision else None
    exact = [n for n in range(report.steps) if schedule and schedule.body(n, report.steps) != BODY]

    def draw(canvas: Canvas) -> None:
        axes = canvas.axes
        steps = range(1, report.steps + 1)
        for (name, values), colour in zip(worst.items(), SERIES * len(worst), strict=False):
            axes.plot(steps, values, marker="o", markersize=3, color=COLOURS[colour], label=name)
        for number in exact:
            axes.axvspan(number + 0.5, number + 1.5, color=COLOURS["c3"], alpha=0.12, linewidth=0)
        _gate_line(axes.axhline, limit)
        axes.set_xlabel(f"step, of {report.steps}")
        axes.set_ylabel("cosine of the velocity, worst prompt")
        axes.ticklabel_format(useOffset=False)
        axes.grid()
        _legend(canvas)

    name = min(worst, key=lambda name: min(worst[name]))
    step = int(np.argmin(worst[name])) + 1
    gate = "" if limit is None else f"; the gate is {limit:g}"
    shaded = " Shaded: steps that leave inputs as they are, on targets that else round them." if exact else ""
    summary = f"Lowest: {min(worst[name])} at step {step} of target {name}{gate}.{shaded}"
    return _chart("steps", summary, draw, (3.4, 3.2))


def sizes_chart(report: Report) -> Chart:
    """Bytes of weights in bf16, all FP8 and as planned, by component."""
    parts = [size for size in report.sizes if size.component != "all"]
    total = next(size for size in report.sizes if size.component == "all")
    unit, scale = bytes_unit(total.bf16)
    ways = (("bf16", "bf16"), ("fp8", "all FP8"), ("planned", "this bundle"))

    def draw(canvas: Canvas) -> None:
        axes = canvas.axes
        for at, (way, title) in enumerate(ways):
            left = 0.0
            for part, colour in zip(parts, SERIES, strict=False):
                value = getattr(part, way) / scale
                label = part.component.replace("_", " ") if at == 0 else None
                (bar,) = axes.barh(at, value, 0.6, left=left, color=COLOURS[colour], label=label)
                canvas.title(bar, f"{part.component}, {title}: {value:.2f} {unit}")
                left += value
            axes.text(left, at, f" {left:.2f}", va="center", color=COLOURS["ink"])
        axes.set_yticks(range(len(ways)), [title for _, title in ways])
        axes.set_ylim(2.6, -0.6)
        axes.set_xlim(0, max(getattr(total, way) for way, _ in ways) / scale * 1.16)
        axes.set_xlabel(f"weights with their scales, {unit}")
        axes.grid(axis="x")
        _legend(canvas, below=0.32)

    change = f"{total.planned / total.bf16 - 1:+.0%} against bf16, {total.planned / total.fp8 - 1:+.0%} against FP8"
    summary = f"Weights in memory: {total.planned / scale:.2f} {unit} in this bundle, {change}."
    return _chart("sizes", summary, draw, (2.3, 2.5), left=(1.05, 0.95), bottom=0.85)


def scatter_chart(report: Report) -> Chart | None:
    """Every traced step: change of its input against change of its residual, with the polynomial."""
    cache = report.step_cache
    if cache is None or not cache.changes:
        return None
    points = np.array(cache.changes)
    coefficients = cache.rule.coefficients
    low, high = float(points[:, 0].min()), float(points[:, 0].max())

    def draw(canvas: Canvas) -> None:
        axes = canvas.axes
        axes.plot(
            points[:, 0], points[:, 1], ".", markersize=3.5, alpha=0.55, color=COLOURS["c1"], label="a step of an image"
        )
        x = np.linspace(low, high, 80)
        axes.plot(
            x, np.polyval(np.array(coefficients), x), color=COLOURS["c2"], lw=2, label=f"degree {len(coefficients) - 1}"
        )
        axes.set_xlabel("change of the modulated input (relative)")
        axes.set_ylabel("change of the residual (relative)")
        axes.grid()
        _legend(canvas)

    summary = (
        f"{len(points)} steps of the trace and the polynomial fitted to it: R2 {cache.fit['residual']['r2']} on prompts "
        "that were held out."
    )
    return _chart("scatter", summary, draw, (3.6, 3.3))


def frontier_chart(report: Report) -> Chart | None:
    """Mean PSNR of every method against the steps it computes, and the bundle's own point."""
    cache = report.step_cache
    if cache is None or cache.chosen is None:
        return None
    chosen, limit = cache.chosen, _limit(report, "step_cache_psnr_db")

    def draw(canvas: Canvas) -> None:
        axes = canvas.axes
        for (method, title), colour, marker in zip(METHODS.items(), SERIES, "os^x", strict=False):
            found = sorted((points[method].computed, points[method]) for points in cache.frontier.values())
            if not found:
                continue
            x = [computed for computed, _ in found]
            axes.plot(x, [point.psnr_db for _, point in found], color=COLOURS[colour], marker=marker, ms=4, label=title)
            low = [point.psnr_db_p5 for _, point in found]
            axes.fill_between(x, low, [point.psnr_db for _, point in found], color=COLOURS[colour], alpha=0.12, lw=0)
        (star,) = axes.plot(
            chosen.computed, chosen.psnr_db, "*", color=COLOURS["ink"], markersize=13, label="this bundle"
        )
        canvas.title(star, f"this bundle: {chosen.computed:g} of {cache.steps} steps computed, {chosen.psnr_db} dB")
        _gate_line(axes.axhline, limit)
        axes.set_xlabel(f"steps computed, of {cache.steps}")
        axes.set_ylabel("PSNR to every step, dB")
        axes.grid()
        _legend(canvas)

    summary = (
        f"This bundle computes {chosen.computed:g} of {cache.steps} steps at {chosen.psnr_db} dB mean PSNR. Lines are "
        "means over the prompts; the shade reaches down to the 5th percentile."
    )
    return _chart("frontier", summary, draw, (3.8, 3.6))


def choices_chart(choices: Sequence[Choice], chosen: Choice, axis: str) -> Chart:
    """The error of choices against what they take (`axis`), as it was measured and as it adds up, and the one that was
    chosen."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.axes
        shown = sorted(choices, key=lambda choice: choice.takes)
        takes = [choice.takes for choice in shown]
        axes.plot(takes, [choice.measured for choice in shown], color=COLOURS["c1"], lw=1.5, label="measured")
        for choice in shown:
            (mark,) = axes.plot(choice.takes, choice.measured, "o", color=COLOURS["c1"], markersize=5)
            canvas.title(mark, choice.words)
        added_up = {"color": COLOURS["c2"], "markersize": 5, "label": "added up"}
        axes.plot(takes, [choice.added_up for choice in shown], "x", **added_up)
        (star,) = axes.plot(chosen.takes, chosen.measured, "*", color=COLOURS["ink"], markersize=13, label="chosen")
        canvas.title(star, chosen.words)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(axis)
        axes.set_ylabel("error of the velocity (relative)")
        axes.grid()
        _legend(canvas)

    return _chart("choices", f"Chosen: {chosen.words}.", draw, (3.6, 3.3))


def bytes_unit(nbytes: float) -> tuple[str, int]:
    """A unit that suits a number of bytes, and its own bytes."""
    return ("GiB", 2**30) if nbytes >= 2**30 else ("MiB", 2**20)


def _limit(report: Report, name: str) -> float | None:
    return next((gate.limit for gate in report.verdict.gates if gate.name == name), None)


def _short(name: str, most: int) -> str:
    name = name.replace("single_transformer_blocks.", "single.").replace("transformer_blocks.", "double.")
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _gate_line(line: Callable[..., Any], limit: float | None) -> None:
    if limit is not None:
        line(limit, label=f"gate {limit:g}", **GATE_LINE)


def _legend(canvas: Canvas, below: float = 0.0) -> None:
    """A legend in the chart, or `below` it by that share of its height."""
    place: dict[str, Any] = {"loc": "best"}
    if below:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -below), "ncols": 3, "columnspacing": 1.2}
    canvas.axes.legend(frameon=False, labelcolor=COLOURS["ink"], handlelength=1.4, **place)


def _chart(
    name: str,
    summary: str,
    draw: Draw,
    heights: tuple[float, float],
    *,
    left: tuple[float, float] = (0.75, 0.62),
    bottom: float = 0.55,
    top: float = 0.12,
) -> Chart:
    """The chart at both widths; `heights` and `left` (the room for names) are in inches, wide and narrow."""
    wide, narrow = (
        _draw(f"{name}-{size}", draw, (width, height), (room, bottom, top), size == "narrow")
        for size, width, height, room in zip(("wide", "narrow"), (WIDE, NARROW), heights, left, strict=True)
    )
    return Chart(name, summary, wide, narrow)


def _draw(name: str, draw: Draw, size: tuple[float, float], room: tuple[float, float, float], narrow: bool) -> str:
    """The chart as SVG; `size` and the `room` at the left, bottom and top are in inches."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": 8.5 if narrow else 9,
        "text.color": COLOURS["ink"],
        "axes.labelcolor": COLOURS["muted"],
        "axes.edgecolor": COLOURS["muted"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "grid.color": COLOURS["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    (width, height), (left, bottom, top) = size, room
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        canvas = Canvas(figure.subplots(), narrow)
        canvas.axes.patch.set_visible(False)
        figure.subplots_adjust(left / width, bottom / height, 1 - 0.15 / width, 1 - top / height)
        draw(canvas)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _of_page(file.getvalue(), canvas.titles)


def _of_page(svg: str, titles: Sequence[str]) -> str:
    """matplotlib's file as an element of the page: its colours, titles on marks, no names that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?)height="[^"]*" width="[^"]*"', r"\1\2", svg)
    for number, title in enumerate(titles):
        svg = svg.replace(f'<g id="mark-{number}">', f"<g><title>{escape(title)}</title>")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font: ([0-9.]+px) '[^']*'[^;\"]*", r"font-size: \1", svg)
    return re.sub(r"\s*\n\s*", "\n", svg.replace("xmlns:xlink", "xmlns:xlink")).strip()
