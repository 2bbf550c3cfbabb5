"""The stages of the step cache: the trace, what is chosen from it, the points of the frontier, the report's page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import PROGRESS, StageCache, key_of, tool_versions
from fluxc.base.errors import RecipeError
from fluxc.base.measured import CHECKPOINT_PARTS, Origin, check_origin
from fluxc.base.progress import Report
from fluxc.build.stages import calibration_request, drawing_of
from fluxc.quantize.source import Source
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import Recipe
from fluxc.recipe.structs import StepCache as Settings
from fluxrt import bundle as format

TRACE = "trace.safetensors"
POLICY = "step_cache.json"
LEAST_PROMPTS = 8


def trace_request(loaded: LoadedRecipe) -> dict[str, Any]:
    """What the trace is asked to do, with the prompts themselves: the steps that are served, whatever calibration takes."""
    recipe, settings = loaded.recipe, _settings(loaded.recipe)
    request = calibration_request(loaded) | {"steps": recipe.sampling.steps, "dtype": recipe.fidelity.reference}
    if settings.prompts is not None:
        request["prompts"] = loaded.prompts("step_cache.prompts", settings.prompts)
    if len(request["prompts"]) < LEAST_PROMPTS:
        field = "calibration.prompts" if settings.prompts is None else "step_cache.prompts"
        raise RecipeError(
            f"{field}: {len(request['prompts'])} prompts are too few to fit a step cache on some and judge it on others; "
            f"give at least {LEAST_PROMPTS}, better some dozens"
        )
    return request


def given_trace(loaded: LoadedRecipe, digests: dict[str, Any]) -> Path | None:
    """The trace file that the recipe names, after checking that it fits and is complete; None if it names none."""
    from fluxc.stepcache.file import check_complete, read_trace

    settings = loaded.recipe.step_cache
    if settings is None or settings.trace is None:
        return None
    path = loaded.folder / settings.trace
    file = read_trace(path)
    check_origin(file, digests, trace_request(loaded))
    check_complete(file)
    return path


def run_step_trace(
    cache: StageCache, loaded: LoadedRecipe, source: Source, digests: dict[str, Any], device: str = "auto"
) -> Path:
    """The trace file, made on this machine."""
    pictures = list(range(len(trace_request(loaded)["prompts"])))

    def work(folder: Path, report: Report) -> None:
        progress = cache.root / PROGRESS / "step-trace"
        make_trace(loaded, source, digests, pictures, folder / TRACE, progress, device, report)

    inputs = [{part: digests[part] for part in CHECKPOINT_PARTS}, trace_request(loaded)]
    return cache.run("step-trace", "trace steps", inputs, work) / TRACE


def make_trace(
    loaded: LoadedRecipe,
    source: Source,
    digests: dict[str, Any],
    pictures: list[int],
    path: Path,
    progress: Path,
    device: str,
    report: Report,
) -> None:
    """Trace the prompts numbered `pictures` and write `path`; finished prompts are kept below `progress`-KEY meanwhile."""
    import torch

    from fluxc.calibrate.placement import find_placement
    from fluxc.stepcache.file import write_trace
    from fluxc.stepcache.record import record_steps

    request = trace_request(loaded)
    dtype = getattr(torch, request["dtype"])
    placement = find_placement(source.checkpoint, device, dtype)
    origin = Origin({part: digests[part] for part in CHECKPOINT_PARTS}, request, str(placement), tool_versions())
    drawing = drawing_of(request, source)
    branches = 2 if source.guidance_branches and drawing.guidance > 1.0 else 1
    work = progress.with_name(f"{progress.name}-{key_of(origin.__dict__)}")
    prompts = request["prompts"]
    trace = record_steps(
        source.checkpoint, prompts, pictures, drawing, branches, origin, placement, dtype, work, report
    )
    write_trace(path, origin, pictures, trace)
    shutil.rmtree(work)


def run_step_cache(cache: StageCache, recipe: Recipe, size: tuple[int, int], trace: Path) -> format.StepCache:
    """The manifest's `step_cache`."""
    settings = _settings(recipe)

    def work(folder: Path, report: Report) -> None:
        from fluxc.stepcache.choose import make_step_cache
        from fluxc.stepcache.file import read_trace

        made = make_step_cache(settings, read_trace(trace).trace, size)
        (folder / POLICY).write_bytes(msgspec.json.encode(made, order="deterministic"))

    plain = msgspec.structs.replace(settings, frontier="auto", prompts=None, trace=None)
    inputs = [cache.file_digest(trace), msgspec.to_builtins(plain), list(size)]
    folder = cache.run("step-cache", "fit step cache", inputs, work)
    return msgspec.json.decode((folder / POLICY).read_bytes(), type=format.StepCache)


def judges_of(loaded: LoadedRecipe) -> dict[str, Path | None]:
    """Where the weights of LPIPS and of image-text agreement are; RecipeError where the recipe names what is not there."""
    fidelity = loaded.recipe.fidelity
    found: dict[str, Path | None] = {}
    for field, is_there in (("lpips", Path.is_file), ("image_text", Path.is_dir)):
        name = getattr(fidelity, field)
        found[field] = None if name is None else loaded.folder / name
        if found[field] and not is_there(loaded.folder / name):
            what = "file" if field == "lpips" else "folder"
            raise RecipeError(
                f"fidelity.{field}: there is no {what} {loaded.folder / name}; weights are not downloaded"
            )
    return found


def run_frontier(
    cache: StageCache, loaded: LoadedRecipe, bundle: format.Bundle, trace: Path, prompts: list[str]
) -> Path | None:
    """report/step-cache.html with its table, plot and pictures, and figures.json; None where no target runs here."""
    recipe = loaded.recipe
    target = next((target.name for target in recipe.targets if target.runs_here), None)
    step_cache = bundle.manifest.step_cache
    if target is None or step_cache is None:
        return None
    from fluxc.stepcache import frontier
    from fluxc.stepcache.file import read_trace

    request = frontier.Request(
        prompts, recipe.fidelity.seed, step_cache.steps, recipe.sampling.guidance, step_cache.size
    )
    recorded = read_trace(trace).trace
    drawn = [
        {name: [file.size, file.sha256] for name, file in bundle.manifest.files.items() if name.startswith(PARTS)},
        msgspec.to_builtins([bundle.manifest.prompting, bundle.manifest.sampling, bundle.target(target)]),
        target,
        request.__dict__,
    ]
    weights = judges_of(loaded)
    judged_by = [
        cache.file_digest(file)
        for path in weights.values()
        if path
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.is_file()
    ]

    def point(
        name: str, title: str, methods: dict[str, dict[str, Any]], keep: tuple[str, ...], full: Path | None
    ) -> Path:
        def work(folder: Path, report: Report) -> None:
            import numpy as np

            total, done = len(prompts) * len(methods), 0

            def advance() -> None:
                nonlocal done
                done += 1
                report(done, total)

            if full is None:
                pictures, _ = frontier.draw_all(bundle, target, request, {}, advance)
                np.save(folder / "full.npy", pictures)
            else:
                from fluxc.fidelity.perceptual import Judges

                judges = Judges(**weights)
                original = np.load(full / "full.npy")
                frontier.measure_point(folder, bundle, target, request, methods, original, keep, judges, advance)

        return cache.run(f"step-cache-{name}", title, [*drawn, methods, list(keep), judged_by if full else []], work)

    full = point("full", "draw without step cache", {"full": {}}, (), None)
    points = {}
    for count in frontier.counts(_settings(recipe), step_cache.steps):
        title = f"draw with {count} of {step_cache.steps} steps skipped"
        points[count] = point(
            str(count), title, frontier.policies(step_cache, recorded, count), (step_cache.mode,), full
        )
    served = point("chosen", "draw with the step cache", {"chosen": frontier.chosen(step_cache)}, ("chosen",), full)

    def write(folder: Path, report: Report) -> None:
        import numpy as np

        from fluxc.stepcache.report import write_page

        measured = {count: json.loads((path / "figures.json").read_text()) for count, path in points.items()}
        chosen = json.loads((served / "figures.json").read_text())["chosen"]
        pictures = (np.load(full / "full.npy"), np.load(served / "chosen.npy"))
        by_count = {count: np.load(path / f"{step_cache.mode}.npy") for count, path in points.items()}
        write_page(folder, recipe.name, target, request, step_cache, measured, chosen, pictures, by_count)

    inputs = [recipe.name, msgspec.to_builtins(step_cache), [path.name for path in (full, served, *points.values())]]
    return cache.run("step-cache-report", "report the step cache", inputs, write)


PARTS = ("transformer/", "text_encoder/", "vae/", "tokenizer/")
"""The files of a bundle that its pictures depend on."""


def _settings(recipe: Recipe) -> Settings:
    assert recipe.step_cache is not None
    return recipe.step_cache
