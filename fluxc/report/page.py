"""The page of a report: one HTML file that holds its images and charts, made from the report's data and its images alone."""

from __future__ import annotations

import io
import math
import shlex
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.report import charts, pictures
from fluxc.report.structs import PAGE, REPORT_JSON, LayerFigures, Report, encode_report
from fluxrt.stepprecision import step_words

if TYPE_CHECKING:
    import jinja2

IMAGES = "report/images"
JUDGED = {"lpips": "LPIPS, mean", "image_text": "image-text agreement, mean"}


CAUSES = {
    "weights": "weights of the transformer's quantized layers, rounded",
    "inputs": "inputs of these layers, rounded as a GPU rounds them",
    "text encoder": "the quantized text encoder",
    "step cache": "steps that the step cache skips",
    "vae": "the type that the VAE is computed in",
    "all": "all of these",
}
"""What a report says of each cause of an attribution."""


def write_report(folder: Path, report: Report) -> Path:
    """Write report/report.json and the page of `report` below `folder`, which holds its images; the page's path."""
    (folder / REPORT_JSON).parent.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_JSON).write_bytes(encode_report(report))
    page = folder / PAGE
    page.write_text(render(report, folder / IMAGES), encoding="utf-8")
    return page


def render(report: Report, images: Path) -> str:
    """The page as HTML; `images` is the folder of the bundle's recorded images."""
    total = next(size for size in report.sizes if size.component == "all")
    shown = {name: draw(report) for name, draw in CHARTS.items()}
    return render_template(
        "page.html.j2",
        r=report,
        js=_text("page.js"),
        summary=summary(report),
        sections=_sections(report),
        total=total,
        bytes=bytes_words,
        quality=_quality(report),
        at_once=[
            (name, images, found, figures.step_error)
            for name, figures in report.targets.items()
            for images, found in figures.at_once.items()
        ],
        text_apart=any(f.image_psnr_db_reference_text is not None for f in report.targets.values()),
        cosine=_cosine(report),
        psnr_meaning=PSNR,
        measured=measured_steps(report),
        rows=pictures.rows(report, images),
        exact=max(report.size) <= pictures.EXACT_SIDE,
        commands=[commands(report, number) for number in range(len(report.prompts))],
        charts=shown,
        formats=_formats(report),
        layers=sorted(report.layers, key=_worst_first),
        causes=_causes(report),
        cause_rows=pictures.causes(report, images, CAUSES),
        solved=[layer.rounding for layer in report.layers if layer.rounding],
        steps=_step_rows(report),
        step_lines=step_words(report.step_precision.schedule) if report.step_precision else [],
        step_bodies=_step_bodies(report),
        onset=pictures.onset(report, images),
        skipped=_skipped(report),
        methods=charts.METHODS,
        judged=_judged(report),
        recipe=_yaml(report.recipe),
    )


def render_template(name: str, **values: Any) -> str:
    """A template of this package with the style of all its pages."""
    return str(_templates().get_template(name).render(css=_text("page.css"), **values))


CHARTS = {
    "layers": charts.layers_chart,
    "steps": charts.steps_chart,
    "sizes": charts.sizes_chart,
    "frontier": charts.frontier_chart,
    "scatter": charts.scatter_chart,
}
PSNR = (
    "It compares two images pixel by pixel, in dB; higher is nearer. 20 dB is a difference of 25.5 of 255 levels (root mean "
    "square), 30 dB of 8, 40 dB of 2.6, 50 dB of 0.8; 120 dB is written for equal images. From about 40 dB differences are "
    "hard to see even when the two images are switched in place; below about 30 dB details differ, which need not look worse: "
    "the sampler went to another image of the same prompt."
)


def summary(report: Report) -> str:
    """The verdict in a sentence."""
    gates = report.verdict.gates
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        return f"{len(failed)} of {len(gates)} gates failed: {', '.join(f'{g.name} of {g.about}' for g in failed)}."
    if not gates:
        return "It has no gates."
    return f"All {len(gates)} gates hold." if report.verdict.passed else "It failed."


def psnr_words(psnr_db: float) -> str:
    """What a PSNR means to who looks at the images."""
    if psnr_db >= 120:
        return "The images are equal."
    levels = 255 * 10 ** (-psnr_db / 20)
    size = f"A colour value is off by {levels:.2g} of 255 levels (root mean square)"
    if psnr_db >= 40:
        return f"{size}: hard to see, even when the two images are switched in place."
    if psnr_db >= 30:
        return f"{size}: seen when the two images are switched in place, hardly side by side."
    return f"{size}: details differ, and side by side it shows."


def bytes_words(nbytes: float) -> str:
    """A number of bytes with a unit that suits it."""
    unit, scale = charts.bytes_unit(nbytes)
    return f"{nbytes / scale:.2f} {unit}"


def measured_steps(report: Report) -> list[dict[str, Any]]:
    """The step times that were measured on GPUs, in milliseconds."""
    found = []
    for entry in report.on_target:
        for target in entry.tiers:
            check = entry.checks.get(f"steps:{target}")
            step = check.figures.get("step") if check else None
            if isinstance(step, dict):
                times = {name: step.get(name) for name in ("p50_ms", "p99_ms", "count")}
                found.append({"target": target, "gpu": entry.gpu, "driver": entry.device.driver, **times})
    return found


def commands(report: Report, number: int) -> list[str]:
    """The commands that generate a prompt's images again, by every target that ran, and with the step cache."""
    height, width = report.size
    cache = report.step_cache
    command = ["fluxrt", "generate", f"artifacts/{report.name}", "--prompt", report.prompts[number]]
    command += ["--seed", str(report.seed + number), "--steps", str(report.steps)]
    command += ["--guidance", f"{report.guidance:g}", "--size", f"{height}x{width}"]
    found = []
    for name in report.targets:
        plain = [] if cache is None else ["--no-step-cache"]
        found.append(shlex.join([*command, "--target", name, *plain, "--out", f"{name}-{number}.png"]))
    if cache is not None and cache.chosen is not None and cache.target is not None:
        found.append(shlex.join([*command, "--target", cache.target, "--out", f"step-cache-{number}.png"]))
    return found


def _quality(report: Report) -> dict[str, Any] | None:
    """The images of the target that is farthest from the reference."""
    found = {name: f.image_psnr_db for name, f in report.targets.items() if f.image_psnr_db is not None}
    if not found:
        return None
    name = min(found, key=lambda name: found[name])
    worst, words = report.targets[name].image_psnr_db_worst, psnr_words(found[name])
    return {"target": name, "psnr": found[name], "worst": worst, "words": words}


def _cosine(report: Report) -> tuple[str, float] | None:
    """Where no image was generated, the target whose velocity is farthest from the reference's, and its cosine."""
    found = {name: f.step_cosine for name, f in report.targets.items() if f.image_psnr_db is None}
    name = min(found, key=lambda name: found[name], default=None)
    return None if name is None else (name, found[name])


def _sections(report: Report) -> list[tuple[str, str]]:
    names = [("gates", "Gates"), ("targets", "Targets"), ("images", "Images"), ("layers", "Layers")]
    names += [("causes", "Causes of error")] if report.attribution or report.causes else []
    names += [("steps", "Steps")] if report.targets else []
    names += [("step-cache", "Step cache")] if report.step_cache else []
    names += [("size", "Size"), ("speed", "Speed")]
    names += [("engines", "Engines")] if report.engines else []
    names += [("on-target", "On GPUs")] if report.on_target else []
    return [*names, ("provenance", "Provenance")]


def _causes(report: Report) -> list[tuple[str, float | None, tuple[float, ...] | None]]:
    """In words each cause of error that something was measured of: the velocity's error, and the PSNR of its images."""
    errors = report.attribution.errors if report.attribution else {}
    images = report.causes.psnr_db if report.causes else {}
    return [
        (title, errors.get(cause), images.get(cause))
        for cause, title in CAUSES.items()
        if cause in errors or cause in images
    ]


def _formats(report: Report) -> list[tuple[str, str]]:
    """The formats of the layers' chart and the custom properties of their colours."""
    names = sorted({layer.format for layer in report.layers if layer.snr_db is not None})
    return [(name, charts.format_colour(name)) for name in names]


def _worst_first(layer: LayerFigures) -> tuple[float, str, str]:
    return (math.inf if layer.snr_db is None else layer.snr_db, layer.component, layer.name)


def _step_rows(report: Report) -> list[list[tuple[float, float]]]:
    """By step and target, the largest error and the lowest cosine of any prompt."""
    return [
        [
            (max(p.step_error[step] for p in figures.prompts), min(p.step_cosine[step] for p in figures.prompts))
            for figures in report.targets.values()
        ]
        for step in range(report.steps)
    ]


def _step_bodies(report: Report) -> list[str]:
    """What runs each of the compiled steps."""
    found = report.step_precision
    return [found.schedule.body(step, found.schedule.steps) for step in range(found.schedule.steps)] if found else []


def _skipped(report: Report) -> set[int]:
    """The steps that the step cache skips: of a rule, those of the prompt with the worst image."""
    cache = report.step_cache
    if cache is None or cache.chosen is None:
        return set()
    return set(cache.chosen.by_prompt[cache.chosen.worst_prompt].skipped)


def _judged(report: Report) -> list[tuple[str, str]]:
    """The further measures of images that were asked for."""
    cache = report.step_cache
    if cache is None or cache.chosen is None:
        return []
    return [(name, title) for name, title in JUDGED.items() if getattr(cache.chosen, name) is not None]


def _yaml(recipe: dict[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml, file = YAML(typ="safe"), io.StringIO()
    yaml.default_flow_style = False
    yaml.width = 100
    yaml.dump(recipe, file)
    return file.getvalue()


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(_text),
        undefined=jinja2.StrictUndefined,
    )


def _text(name: str) -> str:
    return resources.files("fluxc.report").joinpath(name).read_text(encoding="utf-8")
