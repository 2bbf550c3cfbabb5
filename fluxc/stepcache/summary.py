"""What `fluxc trace` and `fluxc inspect` print of a step cache."""

from __future__ import annotations

import numpy as np

from fluxc.base.console import new_console, new_table
from fluxc.stepcache.choose import occurrences
from fluxc.stepcache.file import TraceFile, model_in_words
from fluxrt.manifest import StepCache


def print_trace(file: TraceFile) -> None:
    """How often changes of each size occurred, and what the residuals did there."""
    console = new_console(width=120)
    request, trace = file.origin.request, file.trace
    height, width = request["size"]
    console.print(
        f"{len(file.images)} of {len(request['prompts'])} prompts, {request['steps']} steps at {height}x{width}, "
        f"guidance {request['guidance']}, {request['dtype']}; {file.origin.ran}, {model_in_words(file.origin)}"
    )
    table = new_table("change of the modulated input", "occurred", "mean change of the residual, by guidance branch")
    for found in occurrences(trace):
        low, high = found["change"]
        table.add_row(f"{low:.4g} to {high:.4g}", str(found["count"]), ", ".join(f"{r:.4g}" for r in found["residual"]))
    console.print(table)
    one = trace.residual_error[:, 1:, 0].mean(axis=0)
    console.print(
        f"Skipping one step alone throws the latents off by {one.min():.2g} (step {int(np.argmin(one)) + 1}) to "
        f"{one.max():.2g} (step {int(np.argmax(one)) + 1}), counted from 0."
    )


def step_cache_lines(cache: StepCache) -> list[str]:
    """A bundle's step cache in words."""
    height, width = cache.size
    fit, rule = cache.fit, cache.rule
    how = (
        f"skips the same {len(cache.schedule)} steps of every image: {', '.join(map(str, cache.schedule))}"
        if cache.mode == "static"
        else f"decides while it generates, with threshold {rule.threshold}"
    )
    polynomial = ", ".join(f"{c:.6g}" for c in rule.coefficients)
    lines = [
        f"step cache for {cache.steps} steps at {height}x{width}: {how}",
        f"polynomial {polynomial} ({fit['kind']}, degree {fit['degree']}); on {fit['prompts']['held_out']} held-out prompts "
        f"R2 {fit['residual']['r2']}, RMSE {fit['residual']['rmse']}, largest error {fit['residual']['worst']}; at threshold "
        f"{rule.threshold} it skips {fit['skipped']['dynamic']['held_out']} steps on average",
        f"for VisualGen (residuals of the latents): R2 {fit['latent']['r2']}"
        + ("" if fit["latent"]["r2"] > 0 else ", so its polynomial explains nothing"),
    ]
    other = fit.get("reference")
    if other:
        error = fit["accumulated_error"][cache.mode]
        lines.append(
            f"fitted on the checkpoint's own model it would have R2 {other['residual']['r2']}, threshold "
            f"{other['rule']['threshold']} and skip {', '.join(map(str, other['schedule']))}; accumulated error of skipping on "
            f"the model that runs: {other['accumulated_error'][cache.mode]}, where this one has {error}"
        )
    return lines
