"""`fluxc tune` on flux2-nano: the frontier on three kinds of GPU, and five points of one built and measured as bundles.

    python benchmarks/tune.py                  # about half an hour on two idle cores
    python benchmarks/tune.py --work FOLDER    # keeps results there, and goes on after an interruption

The frontier weighs memory against error: flux2-nano is so small that no format saves predicted time. *Added up* and *measured*
are as in docs/tuning.md, on 4 calibration prompts. *Bundle*: the same error of a built bundle, with inputs rounded, over 64
prompts that nothing saw and all of its steps, root mean square; with it PSNR of its images to those of diffusers, mean and
worst.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from calibration import CALIBRATED, HELD_OUT, ROOT, summarized, write_prompts
from cpu_step import cpu_name

KINDS = ("rtx-5090", "b200", "h100")
BUILT, ON = 5, "rtx-5090"
RECIPE = ROOT / "recipes" / "flux2-nano.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_prompts(work)
        print(f"flux2-nano, rounding: gptq, scales: mse, on {cpu_name()}", flush=True)
        points = {kind: frontier(kind, work) for kind in KINDS}
        for kind, found in points.items():
            print(f"\n{kind}\n\n| weights, KiB | added up | measured | layers |\n|---|---|---|---|")
            for point in found:
                print(f"| {point['weights'] / 1024:.0f} | {errors_of(point)} | {layers_of(point)} |", flush=True)
        print(f"\n{ON}, built\n\n| weights, KiB | added up | measured | bundle | PSNR | worst | layers |")
        print(f"|{'---|' * 7}", flush=True)
        chosen = points[ON]
        for number in range(BUILT):
            point = chosen[number * (len(chosen) - 2) // (BUILT - 1)]
            velocity, psnr, worst = built(point, work)
            figures = f"{point['weights'] / 1024:.0f} | {errors_of(point)} | {velocity} | {psnr} | {worst}"
            print(f"| {figures} | {layers_of(point)} |", flush=True)


def changes_of(work: Path) -> tuple[str, ...]:
    """To the recipe, for everything here."""
    return (
        f"calibration.prompts={work / 'calibration.txt'}",
        f"calibration.max_prompts={CALIBRATED}",
        f"fidelity.prompts={work / 'reference.txt'}",
        "precision.transformer.scales=mse",
        "precision.transformer.rounding=gptq",
        "targets=[{kind: onnxruntime, activations: nvfp4}]",
        "gates={}",
    )


def frontier(kind: str, work: Path) -> list[dict[str, Any]]:
    """The points as `fluxc tune --json` prints them."""
    from dataclasses import asdict

    from fluxc.base.progress import StageProgress
    from fluxc.build.tune import Candidates, Wish, tune
    from fluxc.cli.tune import CANDIDATES
    from fluxc.formats.registry import multiplied_in
    from fluxc.predict.gpus import GPUS
    from fluxc.recipe.load import load_recipe

    kept = work / f"frontier-{kind}.json"
    if not kept.exists():
        gpu = GPUS[kind]
        formats = tuple(name for name in CANDIDATES if multiplied_in(name) in gpu.gemms)
        loaded, wish = load_recipe(RECIPE, changes_of(work)), Wish(error=0.05, least="memory")
        tuned = tune(loaded, (gpu, 1), wish, Candidates(formats), work / "tuned.yaml", StageProgress())
        kept.write_text(json.dumps([asdict(point) for point in tuned.frontier]))
    found: list[dict[str, Any]] = json.loads(kept.read_text())
    return found


def built(point: dict[str, Any], work: Path) -> tuple[str, ...]:
    """Velocity error and PSNR of a bundle with the formats of `point`, on the held-out prompts."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    from fluxc.report.structs import REPORT_JSON

    kept = work / f"built-{point['weights']}.json"
    if not kept.exists():
        every = list(frontier(ON, work)[0]["choice"])
        rules = [{"match": layer, "format": point["choice"].get(layer, "bf16")} for layer in every]
        recipe = load_recipe(RECIPE, (*changes_of(work), f"precision.transformer.rules={json.dumps(rules)}"))
        bundle = build(recipe, work / "bundle", StageProgress())
        assert bundle is not None
        (figures,) = json.loads((bundle / REPORT_JSON).read_text())["targets"].values()
        kept.write_text(json.dumps(figures["prompts"]))
    return tuple(summarized(json.loads(kept.read_text())[:HELD_OUT]))


def errors_of(point: dict[str, Any]) -> str:
    return f"{point['predicted_error']:.4f} | {point['error']:.4f}"


def layers_of(point: dict[str, Any]) -> str:
    named = list(point["choice"].values())
    return ", ".join(f"{named.count(format)} {format}" for format in sorted(set(named))) or "all bf16"


if __name__ == "__main__":
    main()
