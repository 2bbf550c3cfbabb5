"""What calibration is worth: flux2-nano's errors by margin, number of prompts, steps and size, and without calibration.

    python benchmarks/calibration.py                 # everything, about half an hour on two idle cores
    python benchmarks/calibration.py --parts margins # one table
    python benchmarks/calibration.py --work FOLDER   # keeps finished variants there, and goes on after an interruption

Every variant is a whole build of flux2-nano whose activations are rounded as a GPU rounds them. All are compared with one
reference of diffusers, in fp32, on 64 prompts that the model was not trained on, and on 16 that resemble neither those nor
the calibration's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cpu_step import cpu_name

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "models" / "flux2-nano"
CALIBRATED, MANY, HELD_OUT = 32, 1000, 64
"""Prompts that calibration runs unless a table says otherwise, the most that it runs, and those that nothing saw."""
UNLIKE = (
    "a cat on a sofa",
    "naïve café",
    "Häuser am See",
    "苹果",
    "山の上",
    "снег",
    "🙂🙂",
    "f(x) = x^2",
    "<<<>>>",
    "9999",
    "?!",
    ".",
    "CIRCLE",
    "at at at on on on of of of",
    "two rings, no cross",
    "red red red red red red red red red red red red red red red red",
)
"""Words, scripts and symbols that flux2-nano never saw, almost nothing, and its own words without a sentence."""


@dataclass(frozen=True)
class Variant:
    """One build: the format of the transformer, what calibration ran, and the margin; `prompts` 0 runs no model."""

    format: str
    prompts: int
    margin: float | None
    steps: int = 24
    side: int = 64

    @property
    def name(self) -> str:
        """For files; no two variants share one."""
        return f"{self.format}-{self.prompts}-prompts-{self.steps}-steps-{self.side}-margin-{self.margin or 'none'}"

    @property
    def changes(self) -> tuple[str, ...]:
        """To recipes/flux2-nano.yaml."""
        changes = [
            f"precision.transformer.default={self.format}",
            "targets=[{kind: onnxruntime, activations: nvfp4}]",
            "gates={}",
        ]
        if not self.prompts:
            return (*changes, "calibration.engine=none")
        measured = {"max_prompts": self.prompts, "steps": self.steps, "margin": self.margin}
        size = f"calibration.size=[{self.side}, {self.side}]"
        return (*changes, *(f"calibration.{field}={value}" for field, value in measured.items()), size)

    @property
    def passes(self) -> int:
        """Of the transformer that calibration takes: prompts, steps, and two rows for guidance."""
        return 2 * self.prompts * self.steps


MARGINS = [Variant("nvfp4", prompts, margin) for prompts in (1, 4, CALIBRATED) for margin in (0.5, 1, 8, 64)]
PARTS: dict[str, list[Variant]] = {
    "margins": [*MARGINS, Variant("nvfp4", 0, None)],
    "less": [
        *(Variant("nvfp4", CALIBRATED, 1, steps) for steps in (4, 2)),
        Variant("nvfp4", CALIBRATED, 1, 24, 32),
        *(Variant("nvfp4", 4, margin, 4, 32) for margin in (1, 8)),
    ],
    "fp8": [*(Variant("fp8", CALIBRATED, margin) for margin in (1, 64)), Variant("fp8", 0, None)],
}


RANGES = {"a quarter": 0.25, "half": 0.5, "exact": 1.0, "8x": 8.0, "64x": 64.0, "512x": 512.0, "4096x": 4096.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("room", *PARTS), default=["room", *PARTS], help="which tables")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of every image compared (default 6)")
    parser.add_argument("--work", type=Path, help="a folder for finished variants")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_prompts(work)
        print(f"flux2-nano, 64x64, {options.steps} steps, guidance 1.5, on {cpu_name()}", flush=True)
        if "room" in options.parts:
            print_room()
        for part in (part for part in PARTS if part in options.parts):
            print_table(part, PARTS[part], work, options.steps)


def print_room() -> None:
    """Relative error of rounding inputs under a range that is so many times their largest magnitude."""
    import torch

    from fluxc.formats.registry import FORMATS

    random = np.random.default_rng(0)
    shape = (512, 1024)
    data = {
        "Gaussian": random.standard_normal(shape),
        "Student t, 3 degrees of freedom": random.standard_t(3, shape),
        "Gaussian, 1 % of channels 100 times larger": random.standard_normal(shape)
        * np.where(random.random(shape[1]) < 0.01, 100, 1),
    }
    print(f"\nroom\n\n| inputs | format | {' | '.join(RANGES)} |\n|{'---|' * (2 + len(RANGES))}")
    for name, values in data.items():
        x = torch.from_numpy(values).float()
        for format in ("nvfp4", "fp8"):
            how, errors = FORMATS[format], []
            for times in RANGES.values():
                rounded = how.fake_quantize(x, how.tensor_scale(times * x.abs().max()))
                errors.append(f"{((rounded - x).norm() / x.norm()).item():.4f}")
            print(f"| {name} | {format} | {' | '.join(errors)} |", flush=True)


def write_prompts(work: Path) -> None:
    """Files of prompts. `calibration`: those of the recipe's step cache; `many`: the same, then others that the model was
    trained on; `unlike`: those that resemble nothing; `reference`: the held-out ones, then those."""
    sys.path.insert(0, str(NANO))
    from pictures import TEMPLATES, split_specs

    trained, held_out = ([s.caption(n % len(TEMPLATES)) for n, s in enumerate(specs)] for specs in split_specs())
    known = (ROOT / "recipes" / "prompts" / "flux2-nano-steps.txt").read_text().splitlines()
    calibrated = [line for line in known if not line.startswith("#")][:CALIBRATED]
    files = {
        "calibration": calibrated,
        "many": [*calibrated, *(prompt for prompt in trained if prompt not in calibrated)][:MANY],
        "unlike": list(UNLIKE),
        "reference": [*held_out[:HELD_OUT], *UNLIKE],
    }
    for name, prompts in files.items():
        (work / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def prompt_figures(variant: Variant, work: Path, steps: int) -> list[dict[str, Any]]:
    """The report's figures of every prompt of the reference, from a build of `variant`, or from an earlier one in `work`."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    from fluxc.report.structs import REPORT_JSON

    kept = work / f"{variant.name}-compared-in-{steps}.json"
    if not kept.exists():
        prompts = [f"calibration.prompts={work / 'calibration.txt'}", f"fidelity.prompts={work / 'reference.txt'}"]
        recipe = load_recipe(
            ROOT / "recipes" / "flux2-nano.yaml", (*prompts, f"sampling.steps={steps}", *variant.changes)
        )
        bundle = build(recipe, work / "bundle", StageProgress())
        assert bundle is not None
        (figures,) = json.loads((bundle / REPORT_JSON).read_text())["targets"].values()
        kept.write_text(json.dumps(figures["prompts"]))
    found: list[dict[str, Any]] = json.loads(kept.read_text())
    return found


def summarized(figures: list[dict[str, Any]]) -> Iterator[str]:
    """Root mean square of the velocity's relative error over prompts and steps, mean PSNR of images, and the worst."""
    errors = np.array([row["step_error"] for row in figures])
    decibels = [row["image_psnr_db"] for row in figures]
    yield f"{math.sqrt(np.square(errors).mean()):.4f}"
    yield f"{np.mean(decibels):.1f}"
    yield f"{min(decibels):.1f}"


def print_table(part: str, variants: list[Variant], work: Path, steps: int) -> None:
    """One row a variant: what calibration ran, then the errors on held-out prompts, then on those unlike them."""
    measured = [f"{prompts}: {what}" for prompts in ("held out", "unlike") for what in ("velocity", "PSNR", "worst")]
    columns = ["calibration", "passes", "margin", *measured]
    print(f"\n{part}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for variant in variants:
        figures = prompt_figures(variant, work, steps)
        ran = f"{variant.prompts} prompt{'s'[: variant.prompts - 1]}, {variant.steps} steps, {variant.side}x{variant.side}"
        how = [ran if variant.prompts else "none", f"{variant.passes}", f"{variant.margin or '-'}"]
        errors = [*summarized(figures[:HELD_OUT]), *summarized(figures[HELD_OUT:])]
        print(f"| {' | '.join([*how, *errors])} |", flush=True)


if __name__ == "__main__":
    main()
