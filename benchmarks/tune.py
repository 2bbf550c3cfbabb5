"""`fluxc tune` on flux2-nano: the frontier on three kinds of GPU, and five points of one built and measured as bundles.

    python benchmarks/tune.py                  # about an hour on two idle cores
    python benchmarks/tune.py --parts time     # one part: memory or time
    python benchmarks/tune.py --work FOLDER    # keeps results there, and goes on after an interruption

`memory`: the frontier of memory against error. *Added up* and *measured* are as in docs/tuning.md, on 4 calibration prompts.
*Bundle*: the same error of a built bundle, with inputs rounded, over 64 prompts that nothing saw and all of its steps, root
mean square; with it PSNR of its images to those of diffusers, mean and worst.

`time`: of time against error, in no more memory than all layers in NVFP4 take and a third of what bf16 takes more, so that the
formats hardly change from point to point: flux2-nano is so small that no format saves predicted time, and skipped steps do.
*Bundle* as above, of all steps computed; PSNR of its images with skipped steps to its own with all of them.
"""

from __future__ import annotations

import argparse
import hashlib
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
    parser.add_argument(
        "--parts", nargs="+", choices=("memory", "time"), default=["memory", "time"], help="which tables"
    )
    parser.add_argument("--work", type=Path, help="a folder for results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_prompts(work)
        print(f"flux2-nano, rounding: gptq, scales: mse, on {cpu_name()}", flush=True)
        if "memory" in options.parts:
            print_memory(work)
        if "time" in options.parts:
            print_time(work)


def print_memory(work: Path) -> None:
    """The tables of memory against error."""
    points = {kind: frontier(kind, work) for kind in KINDS}
    for kind, found in points.items():
        print(f"\n{kind}\n\n| weights, KiB | added up | measured | layers |\n|---|---|---|---|")
        for point in found:
            print(f"| {point['weights'] / 1024:.0f} | {errors_of(point)} | {layers_of(point)} |", flush=True)
    print(f"\n{ON}, built\n\n| weights, KiB | added up | measured | bundle | PSNR | worst | layers |")
    print(f"|{'---|' * 7}", flush=True)
    for point in some_of(points[ON]):
        velocity, psnr, worst = summarized(built(point, work)["prompts"][:HELD_OUT])
        figures = f"{point['weights'] / 1024:.0f} | {errors_of(point)} | {velocity} | {psnr} | {worst}"
        print(f"| {figures} | {layers_of(point)} |", flush=True)


def print_time(work: Path) -> None:
    """The tables of time against error."""
    points = {kind: frontier(kind, work, by_time=True) for kind in KINDS}
    for kind, found in points.items():
        print(f"\n{kind}\n\n| a step, ms | skipped | added up | measured | layers |\n|{'---|' * 5}")
        for point in found:
            print(f"| {time_of(point)} | {errors_of(point)} | {layers_of(point)} |", flush=True)
    print(f"\n{ON}, built\n\n| a step, ms | skipped | added up | measured | bundle | PSNR | worst | layers |")
    print(f"|{'---|' * 8}", flush=True)
    for point in some_of(points[ON]):
        figures = built(point, work)
        velocity, *_ = summarized(figures["prompts"][:HELD_OUT])
        skipping = [f"{row['psnr_db']:.1f}" for row in figures["skipping"][:HELD_OUT]]
        decibels = (
            f"{sum(map(float, skipping)) / len(skipping):.1f} | {min(skipping, key=float)}" if skipping else " | "
        )
        print(f"| {time_of(point)} | {errors_of(point)} | {velocity} | {decibels} | {layers_of(point)} |", flush=True)


def some_of(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are built, from the first to the last but one."""
    return [points[number * (len(points) - 2) // (BUILT - 1)] for number in range(BUILT)]


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


def frontier(kind: str, work: Path, *, by_time: bool = False) -> list[dict[str, Any]]:
    """The points as `fluxc tune --json` prints them."""
    from dataclasses import asdict

    from fluxc.base.progress import StageProgress
    from fluxc.build.tune import Candidates, tune
    from fluxc.build.tuning_space import Wish
    from fluxc.cli.tune import CANDIDATES
    from fluxc.formats.registry import multiplied_in
    from fluxc.predict.gpus import GPUS
    from fluxc.recipe.load import load_recipe

    kept = work / f"{'times' if by_time else 'frontier'}-{kind}.json"
    if not kept.exists():
        gpu = GPUS[kind]
        formats = tuple(name for name in CANDIDATES if multiplied_in(name) in gpu.gemms)
        loaded, wish = load_recipe(RECIPE, changes_of(work)), Wish(error=0.05, least="memory")
        if by_time:
            memory = [point["memory"] for point in frontier(kind, work)]
            wish = Wish(seconds=1.0, memory=min(memory) + (max(memory) - min(memory)) / 3)
        tuned = tune(loaded, (gpu, 1), wish, Candidates(formats), work / "tuned.yaml", StageProgress())
        kept.write_text(json.dumps([asdict(point) for point in tuned.frontier]))
    found: list[dict[str, Any]] = json.loads(kept.read_text())
    return found


def built(point: dict[str, Any], work: Path) -> dict[str, Any]:
    """Of a bundle with the formats of `point`: figures of every prompt with all steps computed, and with steps skipped."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    from fluxc.report.structs import REPORT_JSON

    skip = len(point["skipped"])
    digest = hashlib.sha256(json.dumps([sorted(point["choice"].items()), skip, point["exact_steps"]]).encode())
    kept = work / f"built-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        every = list(frontier(ON, work)[0]["choice"])
        rules = [{"match": layer, "format": point["choice"].get(layer, "bf16")} for layer in every]
        at = [step + 1 for step in point["exact_steps"]]
        steps = [{"at": at, "layers": list(point["exact_layers"])}] if at else []
        changes = (f"precision.transformer.rules={json.dumps(rules)}", f"precision.steps={json.dumps(steps)}")
        changes += (f"step_cache={{skip: {skip}, frontier: []}}",) if skip else ()
        bundle = build(load_recipe(RECIPE, (*changes_of(work), *changes)), work / "bundle", StageProgress())
        assert bundle is not None
        report = json.loads((bundle / REPORT_JSON).read_text())
        (figures,) = report["targets"].values()
        cache = report.get("step_cache") or {}
        skipping = cache["chosen"]["by_prompt"] if cache.get("chosen") else []
        kept.write_text(json.dumps({"prompts": figures["prompts"], "skipping": skipping}))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def time_of(point: dict[str, Any]) -> str:
    """The average time of a step, and how many are skipped."""
    return f"{1e3 * point['seconds']:.4f} | {len(point['skipped'])}"


def errors_of(point: dict[str, Any]) -> str:
    return f"{point['predicted_error']:.4f} | {point['error']:.4f}"


def layers_of(point: dict[str, Any]) -> str:
    named = list(point["choice"].values())
    return ", ".join(f"{named.count(format)} {format}" for format in sorted(set(named))) or "all bf16"


if __name__ == "__main__":
    main()
