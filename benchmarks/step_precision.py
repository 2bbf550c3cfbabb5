"""Where precision is best spent: on layers, on steps, or on layers at steps, at equal predicted time.

    python benchmarks/step_precision.py                  # about an hour on two idle cores
    python benchmarks/step_precision.py --work FOLDER    # keeps results there, and goes on after an interruption

Errors are flux2-nano's (guidance 1.5, `rounding: gptq`, `scales: mse`, inputs rounded as a GPU rounds them). It is too small
for precision to cost it time, so times are those predicted for a large model on a GPU: each kind of layer of flux2-nano stands
for that kind of the large model's, its blocks for an equal share of the large one's.

Between a step with all inputs rounded and one with none lies the time that there is to spend; at some parts of it, the best
choices are made from what each layer costs at each step on calibration's prompts (fluxc.calibrate.choice), of

- layers: some in nvfp4-w4a16, all steps alike;
- layers or bf16: some in bf16 too, which takes more memory;
- steps: at some steps all layers leave their inputs as they are;
- both: some in nvfp4-w4a16 at all steps, some at some steps;
- both or bf16: as fluxc tune chooses.

Each choice is then built as a bundle. `velocity`: its relative error over PROMPTS prompts that nothing saw and all steps, root
mean square; `PSNR` of its images to those of diffusers in fp32, mean and worst.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calibration import CALIBRATED, ROOT, summarized, write_prompts
from cpu_step import cpu_name

SUBJECTS = (("klein-4b", "b200"), ("klein-4b", "rtx-5090"))
PARTS = (1 / 8, 1 / 4, 1 / 2)
PROMPTS, STEPS = 32, 24
FORMATS = ("nvfp4", "nvfp4-w4a16")
RECIPE = ROOT / "recipes" / "flux2-nano.yaml"


@dataclass(frozen=True)
class Found:
    """A choice: formats of layers, the layers that leave inputs as they are at `steps` (from 0), milliseconds of a step of the
    large model and the error, both as they add up."""

    what: str
    part: float
    milliseconds: float
    predicted: float
    formats: dict[str, str]
    layers: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    measured: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """For files: equal choices share one."""
        from hashlib import sha256

        plain = [sorted(self.formats.items()), sorted(self.layers), self.steps]
        return sha256(json.dumps(plain).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for results")
    parser.add_argument("--subjects", nargs="+", default=[":".join(pair) for pair in SUBJECTS], help="MODEL:GPU ...")
    parser.add_argument("--parts", nargs="+", type=float, default=PARTS, help="parts of the time there is to spend")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_prompts(work)
        lines = (work / "reference.txt").read_text(encoding="utf-8").splitlines()[:PROMPTS]
        (work / "held-out.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        costs = costs_of_layers(work)
        print(f"flux2-nano, {PROMPTS} held-out prompts, {STEPS} steps, on {cpu_name()}", flush=True)
        for subject in options.subjects:
            model, gpu = subject.split(":")
            print(
                f"\ntimes of {model} on {gpu}\n\n| part | spent on | layers | steps | a step, ms | added up | velocity |"
            )
            print("PSNR, mean | worst |\n", "|---" * 9, "|", sep="", flush=True)
            for found in choices(costs, model, gpu, tuple(options.parts)):
                print(row(found, work), flush=True)


def changes_of(work: Path) -> tuple[str, ...]:
    """To the recipe, for everything here."""
    return (
        f"calibration.prompts={work / 'calibration.txt'}",
        f"calibration.max_prompts={CALIBRATED}",
        f"fidelity.prompts={work / 'held-out.txt'}",
        "precision.transformer.scales=mse",
        "precision.transformer.rounding=gptq",
        "targets=[{kind: onnxruntime, activations: nvfp4}]",
        "gates={}",
    )


def costs_of_layers(work: Path) -> list[Any]:
    """What each group of layers costs in each of FORMATS at every step, as fluxc tune measures it."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.preflight import measuring
    from fluxc.build.runner import Results, run_steps
    from fluxc.build.stages import tuning_steps
    from fluxc.calibrate.costs_stage import read_costs
    from fluxc.recipe.load import load_recipe

    loaded, results = load_recipe(RECIPE, changes_of(work)), Results()
    with measuring(loaded, work / "costs", StageProgress(), "tune-12") as (cache, job):
        run_steps(cache, tuning_steps(job, FORMATS, STEPS, skips=False), results)
    return read_costs(results["tune-costs"])


def kind_of(layer: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", layer)


def seconds_of(costs: list[Any], model: str, gpu: str) -> tuple[float, list[dict[str, float]]]:
    """A step of `model` with every layer in bf16, and what each group of `costs` adds to it by format."""
    from fluxc.predict.gpus import GPUS
    from fluxc.predict.scaling import predict, published_model

    subject = published_model(model)
    kinds = [{kind_of(layer) for layer in group.layers} for group in costs]
    shared = Counter(frozenset(kind) for kind in kinds)

    def step(formats: Mapping[str, str]) -> float:
        plan = [replace(entry, format=formats.get(kind_of(entry.layer.name), "bf16")) for entry in subject.plan]
        return predict(replace(subject, plan=plan), GPUS[gpu], (1,)).predictions[0].time.seconds

    plain = step({})
    added = {
        (kind, format): (step(dict.fromkeys(kind, format)) - plain) / count
        for kind, count in shared.items()
        for format in FORMATS
    }
    return plain, [{format: added[frozenset(kind), format] for format in FORMATS} for kind in kinds]


def choices(costs: list[Any], model: str, gpu: str, parts: tuple[float, ...]) -> list[Found]:
    """The choices to be built."""
    import numpy as np

    from fluxc.calibrate.choice import Limits, Option, choose, choose_of, taken

    plain, seconds = seconds_of(costs, model, gpu)
    rounded, exact = FORMATS
    gains = sum(group.by_format[rounded] - group.by_format[exact] for group in costs)
    ranked = [int(step) for step in np.argsort(-gains, kind="stable")]
    alone = [
        [Option(name, float(group.by_format[name].mean()), added[name], 0.0) for name in FORMATS]
        for group, added in zip(costs, seconds, strict=True)
    ]

    def partly(group: Any, added: dict[str, float], count: int) -> Any:
        cost = group.by_format[rounded].copy()
        cost[ranked[:count]] = group.by_format[exact][ranked[:count]]
        share = count / STEPS
        return Option(
            rounded, float(cost.mean()), (1 - share) * added[rounded] + share * added[exact], 0.0, is_exact=True
        )

    space = {
        (0, count): [
            [*options, partly(group, added, count)] for options, group, added in zip(alone, costs, seconds, strict=True)
        ]
        for count in range(STEPS)
    }

    def with_bf16(groups: Any) -> Any:
        return [[*options, Option("bf16", 0.0, 0.0, 1.0)] for options in groups]

    def found(what: str, part: float, options: list[Any], count: int = 0) -> Found:
        formats, layers = {}, []
        for group, option in zip(costs, options, strict=True):
            formats |= dict.fromkeys(group.layers, option.format)
            layers += group.layers if option.is_exact else ()
        took = plain + sum(option.seconds for option in options)
        error = sum(option.cost for option in options) ** 0.5
        steps = tuple(sorted(ranked[:count])) if layers else ()
        return Found(what, part, 1e3 * took, error, formats, tuple(layers), steps)

    least, most = (sum(options[at].seconds for options in alone) for at in (0, 1))
    every = [found("nothing", 0, [options[0] for options in alone])]
    for part in parts:
        limits = Limits(seconds=least + part * (most - least))
        picks = choose(alone, limits)
        assert picks is not None
        every.append(found("layers", part, taken(alone, picks)))
        picks = choose(with_bf16(alone), limits)
        assert picks is not None
        every.append(found("layers or bf16", part, taken(with_bf16(alone), picks)))
        count = int(part * STEPS)
        every.append(found("steps", part, [options[2] for options in space[0, count]], count))
        best = choose_of(space, limits)
        assert best is not None
        every.append(found("both", part, taken(space[best[0]], best[1]), best[0][1]))
        freest = {setting: with_bf16(groups) for setting, groups in space.items()}
        best = choose_of(freest, limits)
        assert best is not None
        every.append(found("both or bf16", part, taken(freest[best[0]], best[1]), best[0][1]))
    return [*every, found("everything", 1, [options[1] for options in alone])]


def row(found: Found, work: Path) -> str:
    """A row of the table; the bundle is built, or its figures were kept."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    from fluxc.report.structs import REPORT_JSON

    kept = work / f"built-{found.key}.json"
    if not kept.exists():
        rules = [{"match": layer, "format": format} for layer, format in found.formats.items()]
        steps = [{"at": [step + 1 for step in found.steps], "layers": list(found.layers)}] if found.steps else []
        changes = (f"precision.transformer.rules={json.dumps(rules)}", f"precision.steps={json.dumps(steps)}")
        recipe = load_recipe(RECIPE, (*changes_of(work), *changes))
        bundle = build(recipe, work / "bundle", StageProgress())
        assert bundle is not None
        (figures,) = json.loads((bundle / REPORT_JSON).read_text())["targets"].values()
        kept.write_text(json.dumps(figures["prompts"]))
    formats = Counter(found.formats.values())
    layers = ", ".join(f"{formats[name]} {name}" for name in sorted(formats))
    steps = f"{len(found.layers)} layers at {len(found.steps)}" if found.steps else ""
    figures = " | ".join(summarized(json.loads(kept.read_text())))
    return (
        f"| {found.part:.3g} | {found.what} | {layers} | {steps} | {found.milliseconds:.3g} | {found.predicted:.4f} | "
        f"{figures} |"
    )


if __name__ == "__main__":
    main()
