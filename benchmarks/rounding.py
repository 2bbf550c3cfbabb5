"""What solving weights (`rounding: gptq`) gains: flux2-nano's errors by block scales, rounding, guidance and calibration.

    python benchmarks/rounding.py                    # everything, about an hour on two idle cores
    python benchmarks/rounding.py --parts 1.5        # one table: guidance 1.5 or 3, calibration, or activations
    python benchmarks/rounding.py --work FOLDER      # keeps finished variants there, and goes on after an interruption
    python benchmarks/rounding.py --parts --picture FILE.png     # images of four prompts, and what is wrong in them, alone

Every variant is a whole build of flux2-nano, compared with one reference of diffusers in fp32 on 64 prompts that neither the
model was trained on nor calibration saw, and on 16 that resemble none of them (benchmarks/calibration.py). Two targets each:
with NVFP4 weights alone, and with inputs rounded to NVFP4 too. `oracle` counts, of the 64, the images whose shapes, colours and
places are those that the prompt asks for, as tests/oracle.py reads them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from calibration import CALIBRATED, HELD_OUT, MANY, NANO, ROOT, UNLIKE, summarized, write_prompts
from cpu_step import cpu_name

TARGETS = {"weights": "onnxruntime-exact", "and activations": "onnxruntime-nvfp4"}


class Named(Protocol):
    """A build: its `name`, for files, and its `changes` to recipes/flux2-nano.yaml."""

    @property
    def name(self) -> str: ...

    @property
    def changes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Variant:
    """One build; `prompts` and `steps` are calibration's, which runs the prompts of the file `calibrated`. Inputs of the layers
    `in_16_bits`, patterns, are never rounded."""

    scales: str
    rounding: str
    guidance: float
    prompts: int = CALIBRATED
    steps: int = 24
    in_16_bits: tuple[str, ...] = ()
    calibrated: str = "calibration"

    @property
    def name(self) -> str:
        """For files; no two variants share one."""
        apart = "-".join(pattern.strip("*.").replace("[", "").replace("]", "") for pattern in self.in_16_bits)
        how = f"{self.scales}-{self.rounding}-guidance-{self.guidance}-{self.prompts}-prompts-{self.steps}-steps"
        if self.calibrated != "calibration":
            how = f"{how}-{self.calibrated}"
        return f"{how}-16-{apart}" if apart else how

    @property
    def changes(self) -> tuple[str, ...]:
        """To recipes/flux2-nano.yaml."""
        rules = ", ".join(f'{{match: "{pattern}", format: nvfp4-w4a16}}' for pattern in self.in_16_bits)
        return (
            f"precision.transformer.scales={self.scales}",
            f"precision.transformer.rounding={self.rounding}",
            f"precision.transformer.rules=[{rules}]",
            f"sampling.guidance={self.guidance}",
            f"calibration.max_prompts={self.prompts}",
            f"calibration.steps={self.steps}",
            "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, activations: nvfp4}]",
            "gates={}",
        )


PICTURED, AMPLIFIED = 4, 8
SCALES = ("max", "four-over-six", "mse")
ATTENDING = ("*.to_[qkv]", "*.add_[qkv]_proj", "*.to_qkv_mlp_proj")
OUTPUTS = ("*.to_out*", "*.to_add_out")
FEED_FORWARD = ("*.ff.*", "*.ff_context.*")
CALIBRATIONS = ((1, 1), (1, 24), (4, 4), (4, 24), (CALIBRATED, 24), (MANY, 24))
PARTS: dict[str, list[Variant]] = {
    **{
        f"{guidance:g}": [Variant(scales, rounding, guidance) for rounding in ("nearest", "gptq") for scales in SCALES]
        for guidance in (1.5, 3.0)
    },
    "calibration": [
        *(Variant("mse", "gptq", 1.5, prompts, steps, calibrated="many") for prompts, steps in CALIBRATIONS),
        Variant("mse", "gptq", 1.5, len(UNLIKE), calibrated="unlike"),
        Variant("mse", "nearest", 1.5, calibrated="many"),
    ],
    "activations": [
        Variant("mse", "gptq", guidance, in_16_bits=patterns)
        for guidance in (1.5, 3.0)
        for patterns in ((), FEED_FORWARD, OUTPUTS, ATTENDING, (*ATTENDING, *OUTPUTS, *FEED_FORWARD))
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS), help="which tables")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps of every image compared (default 24)")
    parser.add_argument("--work", type=Path, help="a folder for finished variants")
    parser.add_argument("--picture", type=Path, help="where to write images of the prompts that lose most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_prompts(work)
        print(f"flux2-nano, 64x64, {options.steps} steps, on {cpu_name()}", flush=True)
        for part in (part for part in PARTS if part in options.parts):
            print_table(part, PARTS[part], work, options.steps)
        if options.picture:
            draw(options.picture, work, options.steps)


def figures_of(variant: Named, work: Path, steps: int, calibrated: str = "calibration") -> dict[str, Any]:
    """By target the report's figures of every prompt and the oracle's count, and the mean SNR of outputs; of a build calibrated
    on that file of prompts, or kept of an earlier one in `work`."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    from fluxc.report.structs import REPORT_JSON

    kept = work / f"{variant.name}-compared-in-{steps}.json"
    if not kept.exists():
        prompts = [f"calibration.prompts={work / f'{calibrated}.txt'}", f"fidelity.prompts={work / 'reference.txt'}"]
        recipe = load_recipe(
            ROOT / "recipes" / "flux2-nano.yaml", (*prompts, f"sampling.steps={steps}", *variant.changes)
        )
        bundle = build(recipe, work / "bundle", StageProgress())
        assert bundle is not None
        report = json.loads((bundle / REPORT_JSON).read_text())
        snr = [layer["output_snr_db"] for layer in report["layers"] if layer.get("output_snr_db")]
        found = {
            "output_snr_db": float(np.mean(snr)) if snr else None,
            **{
                what: {"prompts": report["targets"][target]["prompts"], "oracle": followed(bundle, target)}
                for what, target in TARGETS.items()
            },
        }
        shutil.copytree(bundle / "report" / "images", images_of(variant, work, steps), dirs_exist_ok=True)
        kept.write_text(json.dumps(found))
    read: dict[str, Any] = json.loads(kept.read_text())
    return read


def images_of(variant: Named, work: Path, steps: int) -> Path:
    """Where its images are kept."""
    return work / f"{variant.name}-images-in-{steps}"


def draw(path: Path, work: Path, steps: int) -> None:
    """Write a picture: for each guidance the PICTURED held-out prompts that lose most of their images where inputs are rounded
    and weights rounded to nearest under `max`. From above: diffusers; NVFP4 weights rounded so, then solved under `mse`; the
    same with inputs rounded. On the right how far they are from diffusers, AMPLIFIED times."""
    from PIL import Image

    columns: list[np.ndarray] = []
    for guidance in (1.5, 3.0):
        nearest, solved = Variant("max", "nearest", guidance), Variant("mse", "gptq", guidance)
        for variant in (nearest, solved):
            if not images_of(variant, work, steps).exists():
                (work / f"{variant.name}-compared-in-{steps}.json").unlink(missing_ok=True)
        lost = figures_of(nearest, work, steps)["and activations"]["prompts"][:HELD_OUT]
        figures_of(solved, work, steps)
        numbers = sorted(range(HELD_OUT), key=lambda number: lost[number]["image_psnr_db"])[:PICTURED]
        rows = [(nearest, "reference"), *((one, target) for target in TARGETS.values() for one in (nearest, solved))]
        images = [
            [
                np.asarray(Image.open(images_of(one, work, steps) / f"{who}-{number}.png"), np.float32)
                for one, who in rows
            ]
            for number in numbers
        ]
        wrong = [[np.abs(image - of_prompt[0]) * AMPLIFIED for image in of_prompt] for of_prompt in images]
        columns += [np.concatenate(of_prompt) for of_prompt in (*images, *wrong)]
    pixels = np.clip(np.concatenate(columns, axis=1), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((pixels.shape[1] * 3 // 2, pixels.shape[0] * 3 // 2), Image.Resampling.NEAREST).save(
        path
    )


def followed(bundle: Path, target: str) -> int:
    """Of the held-out prompts, how many the images of `target` follow."""
    import fluxrt

    sys.path[:0] = [str(NANO), str(ROOT / "tests")]
    from oracle import follows
    from pictures import TEMPLATES, split_specs

    specs = split_specs()[1][:HELD_OUT]
    prompts = [spec.caption(number % len(TEMPLATES)) for number, spec in enumerate(specs)]
    with fluxrt.load(bundle, target=target) as pipeline:
        images = pipeline.generate(fluxrt.Request(prompts, seed=0)).images
    return sum(follows(np.asarray(image), spec) for image, spec in zip(images, specs, strict=True))


def print_table(part: str, variants: list[Variant], work: Path, steps: int) -> None:
    """One row a variant: how weights were rounded, then for each target the errors on held-out prompts and on those unlike
    them."""
    measured = [f"{target}: {what}" for target in TARGETS for what in ("velocity", "PSNR", "worst", "oracle", "unlike")]
    columns = ["guidance", "calibration", "rounding", "scales", "inputs in 16 bits", "output SNR", *measured]
    print(f"\n{part}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for variant in variants:
        figures = figures_of(variant, work, steps, variant.calibrated)
        which = " unlike" if variant.calibrated == "unlike" else ""
        ran = f"{variant.prompts}{which} prompt{'s'[: variant.prompts - 1]}, {variant.steps} step{'s'[: variant.steps - 1]}"
        row = [f"{variant.guidance:g}", ran, variant.rounding, variant.scales, ", ".join(variant.in_16_bits) or "-"]
        row.append(f"{figures['output_snr_db']:.1f}")
        for target in TARGETS:
            of_target = figures[target]
            row += [*summarized(of_target["prompts"][:HELD_OUT]), f"{of_target['oracle']}"]
            row.append(next(summarized(of_target["prompts"][HELD_OUT:])))
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
