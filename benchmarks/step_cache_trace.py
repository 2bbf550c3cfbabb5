"""Whether a step cache should be fitted on the trace of the model that will run, or on that of the checkpoint's own.

    python benchmarks/step_cache_trace.py                  # about half an hour on two idle cores
    python benchmarks/step_cache_trace.py --work FOLDER    # keeps traces and bundle there, and goes on after an interruption
    python benchmarks/step_cache_trace.py --weights-alone --images 0     # inputs not rounded; the fits, and no images

flux2-nano in 50 steps with NVFP4 weights and inputs rounded to NVFP4, as an FP4 GPU computes. Both models are traced on the 40
prompts of the recipe. For each number of skipped steps, schedule and rule of either trace run in the same bundle, on prompts
that neither the model was trained on nor a trace has seen; PSNR is against the images of that bundle with every step.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cpu_step import cpu_name
from step_cache import ROOT, specs

RECIPE = ROOT / "recipes" / "flux2-nano-50-steps.yaml"
MOVED = 1e-6
EXACT, ROUNDED = "compute: exact", "activations: nvfp4"
HEADINGS = (
    "skipped",
    "method",
    "trace of",
    "computed",
    "PSNR, mean",
    "5th percentile",
    "worst",
    "accumulated error",
    "same schedule",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="unseen prompts (default 32; 0: no images)")
    parser.add_argument("--weights-alone", action="store_true", help="inputs are not rounded")
    parser.add_argument("--skip", type=int, nargs="+", default=[10, 19, 30], help="steps to skip (default 10 19 30)")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="a further change of the recipe")
    parser.add_argument("--work", type=Path, help="a folder for traces and the bundle")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        print(f"flux2-nano, 64x64, 50 steps, {options.images} prompts, on {cpu_name()}", flush=True)
        asked = [f"targets=[{{kind: onnxruntime, {EXACT if options.weights_alone else ROUNDED}}}]", *options.changes]
        traces = {name: traced(name, work, asked) for name in ("quantized", "reference")}
        print_fits(traces, options)
        if options.images:
            print_images(traces, made(work, asked), options)


def changes_of(asked: list[str], cache: str = "") -> tuple[str, ...]:
    """To the recipe."""
    prompts = f"step_cache={{skip: 19, prompts: prompts/flux2-nano-steps.txt, frontier: []{cache}}}"
    return ("gates={}", "fidelity.level=none", prompts, *asked)


def traced(model: str, work: Path, asked: list[str]) -> Any:
    """The trace of the "quantized" or the "reference" model."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.measure import trace_to_file
    from fluxc.recipe.load import load_recipe
    from fluxc.stepcache.file import read_trace

    path = work / f"{model}.trace"
    if path.exists():
        return read_trace(path).trace
    loaded = load_recipe(RECIPE, changes_of(asked, f", traced: {model}"))
    return trace_to_file(loaded, path, "cpu", (1, 1), StageProgress()).trace


def made(work: Path, asked: list[str]) -> Any:
    """The bundle that both are run in."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    from fluxrt.bundle import open_bundle

    out = work / "bundle"
    if not out.exists():
        build(
            load_recipe(RECIPE, changes_of(asked, f", trace: {work.resolve() / 'quantized.trace'}")),
            out,
            StageProgress(),
        )
    return open_bundle(out)


def print_fits(traces: dict[str, Any], options: argparse.Namespace) -> None:
    """What the fit of either trace comes to."""
    from fluxc.stepcache.choose import make_step_cache

    headings = ("trace of", "skipped", "R2", "RMSE", "threshold", "R2, latents (VisualGen)", "its threshold")
    print("\n| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
    for name, trace in traces.items():
        for count in options.skip:
            cache = make_step_cache(settings(count), trace, (64, 64))
            residual, latent = cache.fit["residual"], cache.fit["latent"]
            thresholds = f"{cache.rule.threshold:.4g} | {latent['r2']} | {cache.visual_gen.threshold:.4g}"
            print(f"| {name} | {count} | {residual['r2']} | {residual['rmse']} | {thresholds} |")
    change = np.abs(traces["quantized"].change / np.maximum(traces["reference"].change, 1e-12) - 1)[:, 1:]
    error = traces["quantized"].residual_error[:, 1:, 0] / traces["reference"].residual_error[:, 1:, 0]
    print(f"\nchange of the modulated input: apart by {np.median(change):.2%} (median), {change.max():.2%} (largest)")
    print(
        f"error of reusing the last residual: {np.median(error):.3f} times the reference's (median), by step", end=" "
    )
    print(", ".join(f"{value:.2f}" for value in np.median(error, axis=0)))
    for most in (0.005, 0.01, 0.02):
        skips = [f"{most_under(trace, most)} steps by the trace of the {name} model" for name, trace in traces.items()]
        print(f"max_error {most}: skips {', '.join(skips)}")
    print(flush=True)


def most_under(trace: Any, error: float) -> int:
    """How many steps `max_error` would skip."""
    from fluxc.stepcache.policy import best_schedules

    return max(count for count, (_, total) in best_schedules(trace.residual_error, 1, 1, 4).items() if total <= error)


def settings(count: int) -> Any:
    """What is asked of a fit."""
    from fluxc.recipe.structs import StepCache

    return StepCache(skip=float(count), min_r2=-1e9)


def moved(bundle: Any, target: str, request: Any) -> np.ndarray:
    """Images with every step, from starting noise that is moved by MOVED of itself: what rounding alone makes of that."""
    from fluxrt.pipeline import Pipeline, starting_noise
    from fluxrt.schedule import SCHEDULES

    pipeline = Pipeline(bundle, target=target)
    grid, sampling = pipeline.grid(request.size), bundle.manifest.sampling
    tokens, images = grid[0] * grid[1], []
    for number, prompt in enumerate(request.prompts):
        noise = starting_noise(request.seed + number, tokens, sampling.latent_channels)[None]
        noise = (noise * (1 + np.float32(MOVED))).astype(np.float32)
        pipeline.begin(noise, grid, request.guidance, pipeline.tokenize(pipeline.branches(prompt, request.guidance)))
        list(pipeline.denoise(SCHEDULES[sampling.schedule](tokens, request.steps), None))
        images.append(pipeline.decode(pipeline.backend.get("latents"), grid)[0])
    return np.stack(images)


def print_images(traces: dict[str, Any], bundle: Any, options: argparse.Namespace) -> None:
    """The table of images."""
    from fluxc.stepcache.choose import make_step_cache
    from fluxc.stepcache.frontier import FrontierRequest, figures, generate_all
    from fluxc.stepcache.policy import accumulated_error, skipped_by

    prompts = [spec.caption(number % 3) for number, spec in enumerate(specs(options.images))]
    request = FrontierRequest(prompts, 0, 50, bundle.manifest.sampling.guidance, (64, 64))
    (target,) = (target.name for target in bundle.manifest.targets)
    full, _ = generate_all(bundle, target, request, {}, lambda: None)
    print("\n| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|", flush=True)
    found = figures(moved(bundle, target, request), full, [[] for _ in prompts], 50, [{}] * len(prompts))
    quality = " | ".join(f"{found[name]:.2f}" for name in ("psnr_db", "psnr_db_p5", "psnr_db_worst"))
    print(f"| 0 | every step, from noise changed by {MOVED:g} of itself | | 50 | {quality} | | |", flush=True)
    runs = traces["quantized"]
    for count in options.skip:
        caches = {name: make_step_cache(settings(count), trace, (64, 64)) for name, trace in traces.items()}
        same = len(set(caches["quantized"].schedule) & set(caches["reference"].schedule))
        for method in ("schedule", "rule"):
            for name, cache in caches.items():
                schedule = list(cache.schedule)
                policy = {"schedule": schedule} if method == "schedule" else {"rule": msgspec.to_builtins(cache.rule)}
                images, skipped = generate_all(bundle, target, request, policy, lambda: None)
                by_trace = [schedule] * runs.images if method == "schedule" else skipped_by(cache.rule, runs.change)
                error = accumulated_error(by_trace, runs.residual_error)
                found = figures(images, full, skipped, 50, [{}] * len(prompts))
                quality = " | ".join(f"{found[name]:.2f}" for name in ("psnr_db", "psnr_db_p5", "psnr_db_worst"))
                row = f"| {count} | {method} | {name} | {found['computed']} | {quality} | {error:.4g} |"
                print(row + f" {f'{same} of {count}' if method == 'schedule' else ''} |", flush=True)


if __name__ == "__main__":
    main()
