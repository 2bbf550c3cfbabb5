"""Two bundles side by side: what their recipes, formats, sizes and figures differ in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fluxc.report.page import bytes_words, measured_steps
from fluxc.report.structs import LayerFigures, Report, Struct


class Changed(Struct, frozen=True):
    """A field of the recipe with its value in each; null where a recipe lacks it."""

    field: str
    first: Any
    second: Any


class LayerChanged(Struct, frozen=True):
    """A Linear that is stored in other formats, or by another rule; null where a bundle has no such layer."""

    component: str
    layer: str
    first: str | None
    second: str | None
    first_rule: str | None
    second_rule: str | None


class Figure(Struct, frozen=True):
    """One figure of both; null where it was not measured. `better` says whether a higher or a lower one is."""

    what: str
    unit: str
    first: float | None
    second: float | None
    better: str


class Comparison(Struct, frozen=True):
    """All that `fluxc report A B` says."""

    names: tuple[str, str]
    passed: tuple[bool, bool]
    comparable: str
    figures: tuple[Figure, ...]
    recipe: tuple[Changed, ...]
    precision: tuple[LayerChanged, ...]


def compare(first: Report, second: Report, names: tuple[str, str]) -> Comparison:
    """The comparison of two reports, called `names`."""
    return Comparison(
        names=names,
        passed=(first.verdict.passed, second.verdict.passed),
        comparable=_not_comparable(first, second),
        figures=tuple(_figures(first, second)),
        recipe=tuple(_recipe(first, second)),
        precision=tuple(_precision(first, second)),
    )


def names_of(paths: tuple[Path, Path]) -> tuple[str, str]:
    """The folders' names, or where those are equal their paths."""
    a, b = (path.resolve() for path in paths)
    return (a.name, b.name) if a.name != b.name else (str(a), str(b))


def shown(figure: Figure, value: float | None) -> str:
    """A value of a figure with its unit."""
    if value is None:
        return "none"
    return bytes_words(value) if figure.unit == "bytes" else f"{value:g}{f' {figure.unit}' if figure.unit else ''}"


def change(figure: Figure) -> str:
    """What the second differs by: of bytes and times in percent, else in the figure's unit; empty where one lacks it."""
    a, b = figure.first, figure.second
    if a is None or b is None:
        return ""
    if a == b:
        return "equal"
    if figure.unit in ("bytes", "ms") and a:
        return f"{100 * (b / a - 1):+.1f} %"
    return f"{b - a:+.4g}{f' {figure.unit}' if figure.unit else ''}"


def _not_comparable(first: Report, second: Report) -> str:
    """Why figures of images are not comparable, in a sentence; empty where they are."""
    differ = [
        what
        for what, a, b in (
            ("checkpoint", first.checkpoint, second.checkpoint),
            ("what was compared (fidelity.level)", first.level, second.level),
            ("prompts", first.prompts, second.prompts),
            ("seed", first.seed, second.seed),
            ("steps", first.steps, second.steps),
            ("guidance", first.guidance, second.guidance),
            ("size", first.size, second.size),
            ("reference", first.reference, second.reference),
        )
        if a != b
    ]
    if not differ:
        return ""
    return f"Figures of steps and images are not of the same thing: the two differ in {', '.join(differ)}."


def _figures(first: Report, second: Report) -> Iterator[Figure]:
    sizes = [{size.component: size for size in report.sizes} for report in (first, second)]
    for component in dict.fromkeys([*sizes[0], *sizes[1]]):
        a, b = (found[component].planned if component in found else None for found in sizes)
        yield Figure(what=f"weights: {component}", unit="bytes", first=a, second=b, better="lower")
    for target in dict.fromkeys([*first.targets, *second.targets]):
        found = [report.targets.get(target) for report in (first, second)]
        for name, what, unit, better in (
            ("step_cosine", "velocity cosine, worst", "", "higher"),
            ("image_psnr_db", "image PSNR, mean", "dB", "higher"),
            ("image_psnr_db_worst", "image PSNR, worst", "dB", "higher"),
            ("image_ssim", "image SSIM, mean", "", "higher"),
        ):
            a, b = (getattr(figures, name) if figures else None for figures in found)
            yield Figure(what=f"{target}: {what}", unit=unit, first=a, second=b, better=better)
    yield from _of_step_cache(first, second)
    yield from _times(first, second)


def _of_step_cache(first: Report, second: Report) -> Iterator[Figure]:
    chosen = [report.step_cache.chosen if report.step_cache else None for report in (first, second)]
    if any(chosen):
        for name, what, unit, better in (
            ("computed", "steps computed", "", "lower"),
            ("psnr_db", "PSNR to every step, mean", "dB", "higher"),
            ("psnr_db_worst", "PSNR to every step, worst", "dB", "higher"),
        ):
            a, b = (getattr(point, name) if point else None for point in chosen)
            yield Figure(what=f"step cache: {what}", unit=unit, first=a, second=b, better=better)


def _times(first: Report, second: Report) -> Iterator[Figure]:
    """Step times: predicted, and measured on GPUs."""
    times: list[dict[str, float]] = []
    for report in (first, second):
        points = report.prediction.points if report.prediction else ()
        found = {f"predicted step, {p.gpus} x {p.gpu}": p.step_ms for p in points}
        for step in measured_steps(report):
            if step["p50_ms"] is not None:
                found[f"measured step (p50), {step['target']} on {step['gpu']}"] = float(step["p50_ms"])
        times.append(found)
    for what in dict.fromkeys([*times[0], *times[1]]):
        yield Figure(what=what, unit="ms", first=times[0].get(what), second=times[1].get(what), better="lower")


def _recipe(first: Report, second: Report) -> Iterator[Changed]:
    a, b = (dict(_fields(report.recipe, "")) for report in (first, second))
    for field in dict.fromkeys([*a, *b]):
        if a.get(field) != b.get(field):
            yield Changed(field=field, first=a.get(field), second=b.get(field))


def _fields(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every field with where it is: "a.b[0].c"; a list of plain values is one field."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _fields(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for at, item in enumerate(value):
            yield from _fields(item, f"{place}[{at}]")
    else:
        yield place, value


def _precision(first: Report, second: Report) -> Iterator[LayerChanged]:
    a, b = ({(x.component, x.name): x for x in report.layers} for report in (first, second))
    for component, layer in dict.fromkeys([*a, *b]):
        ours, theirs = a.get((component, layer)), b.get((component, layer))
        if _decided(ours) != _decided(theirs):
            yield LayerChanged(
                component=component,
                layer=layer,
                first=ours.format if ours else None,
                second=theirs.format if theirs else None,
                first_rule=ours.rule if ours else None,
                second_rule=theirs.rule if theirs else None,
            )


def _decided(layer: LayerFigures | None) -> tuple[str, str] | None:
    return (layer.format, layer.rule) if layer else None


def as_json(comparison: Comparison) -> bytes:
    """The comparison as readable JSON."""
    return msgspec.json.format(msgspec.json.encode(comparison), indent=1)
