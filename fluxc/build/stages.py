"""The stages of a build: each a plain function from what came before to a folder of results, cached by what it read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fluxc.base.cache import PROGRESS, StageCache, key_of, locked, tool_versions
from fluxc.calibrate.amax import input_amax
from fluxc.calibrate.file import read_calibration, write_calibration
from fluxc.models.flux2 import pixels_per_token
from fluxc.checkpoint.source import WEIGHTED, Checkpoint, check_tensors
from fluxc.checkpoint.components import WEIGHTS_FILE, small_files
from fluxc.targets.tensorrt.library import installed_version
from fluxc.base.errors import RecipeError
from fluxc.base.measured import CHECKPOINT_PARTS, Origin, check_origin
from fluxc.quantize.source import Source, kept_tensors, read_source
from fluxc.base.progress import Report, StageProgress
from fluxc.formats.constants import Scales
from fluxc.quantize.plan import to_quantize
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import Recipe
from fluxc.targets.visual_gen.folder import is_split
from fluxrt.bundle import Prompting
from fluxrt.errors import RequestError

if TYPE_CHECKING:
    from fluxc.checkpoint.reference import Drawing

CALIBRATION = "calibration.safetensors"
SENSITIVITY = "sensitivity.json"


def checkpoint_digests(checkpoint: Checkpoint, cache: StageCache, report: Report) -> dict[str, dict[str, str]]:
    """{component: {file: SHA-256}} of everything a build reads from the checkpoint; `report` counts bytes."""
    files = {"": [checkpoint.root / "model_index.json"]}
    for name, component in checkpoint.components.items():
        files[name] = small_files(component) + (component.weight_files if name in WEIGHTED else [])
    total = sum(file.stat().st_size for group in files.values() for file in group)
    done = 0
    digests: dict[str, dict[str, str]] = {}
    for name, group in files.items():
        digests[name] = {}
        for file in group:
            digests[name][file.name] = cache.file_digest(file)
            done += file.stat().st_size
            report(done, total)
    return digests


def calibration_request(loaded: LoadedRecipe) -> dict[str, Any]:
    """What the calibration pass is asked to do, with the prompts themselves."""
    recipe = loaded.recipe
    calibration, sampling = recipe.calibration, recipe.sampling
    return {
        "prompts": loaded.prompts("calibration.prompts", calibration.prompts),
        "steps": calibration.steps or sampling.steps,
        "guidance": sampling.guidance if calibration.guidance is None else calibration.guidance,
        "size": list(calibration.size or recipe.sizes[0]),
        "seed": calibration.seed,
        "text_length": recipe.text.length,
    }


def run_calibration(
    cache: StageCache, loaded: LoadedRecipe, source: Source, digests: dict[str, Any], device: str = "auto"
) -> Path:
    """The calibration file, made on this machine."""

    def work(folder: Path, report: Report) -> None:
        progress = cache.root / PROGRESS / "calibration"
        make_calibration(loaded, source, digests, folder / CALIBRATION, progress, device, report)

    inputs = [{part: digests[part] for part in CHECKPOINT_PARTS}, calibration_request(loaded)]
    return cache.run("calibration", "calibrate", inputs, work) / CALIBRATION


def run_modelopt(cache: StageCache, loaded: LoadedRecipe, source: Source, digests: dict[str, Any]) -> Path:
    """The transformer as modelopt quantized, calibrated and exported it, under the recipe's plan."""
    from fluxc.calibrate.modelopt import check_available, quantize_transformer

    check_available()
    if source.quantized["transformer"]:
        raise RecipeError(
            "calibration.engine: the checkpoint is quantized already; leave `engine` out, or use the original"
        )
    plan, request = source.plans["transformer"], calibration_request(loaded)
    algorithm = loaded.recipe.calibration.algorithm

    def work(folder: Path, report: Report) -> None:
        drawing = drawing_of(request, source)
        quantize_transformer(source.checkpoint, plan, algorithm, request["prompts"], drawing, folder / "transformer")

    formats = [[entry.layer.name, entry.format] for entry in plan]
    inputs = [{part: digests[part] for part in CHECKPOINT_PARTS}, request, algorithm, formats]
    return cache.run("modelopt", "quantize with modelopt", inputs, work) / "transformer"


def make_calibration(
    loaded: LoadedRecipe,
    source: Source,
    digests: dict[str, Any],
    path: Path,
    progress: Path,
    device: str,
    report: Report,
) -> None:
    """Run the model over the calibration prompts and write `path`; finished prompts are kept below `progress`-KEY meanwhile."""
    from fluxc.calibrate.placement import find_placement
    from fluxc.calibrate.run import calibrate

    request = calibration_request(loaded)
    placement = find_placement(source.checkpoint, device)
    checkpoint = {part: digests[part] for part in CHECKPOINT_PARTS}
    origin = Origin(checkpoint, request, str(placement), tool_versions())
    drawing = drawing_of(request, source)
    work = progress.with_name(f"{progress.name}-{key_of(origin.__dict__)}")
    branches = 2 if source.guidance_branches and drawing.guidance > 1.0 else 1
    records = calibrate(source.checkpoint, request["prompts"], drawing, branches, origin, placement, work, report)
    write_calibration(path, origin, records)
    shutil.rmtree(work)


def drawing_of(request: dict[str, Any], source: Source) -> Drawing:
    """How diffusers draws what calibration_request asks for."""
    from fluxc.checkpoint.reference import Drawing

    return Drawing(
        size=tuple(request["size"]),
        steps=request["steps"],
        guidance=request["guidance"],
        seed=request["seed"],
        text_length=request["text_length"],
        text_layers=source.family.text_layers,
    )


def given_calibration(loaded: LoadedRecipe, digests: dict[str, Any]) -> Path | None:
    """The calibration file that the recipe names, after checking that it fits; None if it names none."""
    if loaded.recipe.calibration.file is None:
        return None
    path = loaded.folder / loaded.recipe.calibration.file
    check_origin(read_calibration(path), digests, calibration_request(loaded))
    return path


def run_sensitivity(
    cache: StageCache, loaded: LoadedRecipe, source: Source, digests: dict[str, Any], calibration: Path
) -> dict[str, Any]:
    """What `keep: auto` measured and chose, see sensitivity.measure."""
    recipe = loaded.recipe
    precision, plan = recipe.precision.transformer, source.plans["transformer"]
    request = calibration_request(loaded)
    round_inputs = any(target.rounds_inputs for target in recipe.targets)

    def work(folder: Path, report: Report) -> None:
        import torch

        from fluxc.calibrate.sensitivity import Simulation, measure

        assert precision.budget is not None
        records = read_calibration(calibration).records["transformer"]
        measured = measure(
            source.checkpoint,
            request["prompts"],
            drawing_of(request, source),
            2 if source.guidance_branches and request["guidance"] > 1 else 1,
            getattr(torch, recipe.fidelity.reference),
            plan,
            Simulation(
                source.checkpoint.components["transformer"].tensors,
                input_amax(records, plan, recipe.calibration),
                precision.scales,
                round_inputs,
            ),
            precision.budget,
            report,
        )
        (folder / SENSITIVITY).write_text(json.dumps(measured, indent=1) + "\n")

    inputs = [
        {part: digests[part] for part in CHECKPOINT_PARTS},
        cache.file_digest(calibration),
        request,
        msgspec.to_builtins([precision, recipe.calibration, recipe.fidelity.reference]),
        round_inputs,
    ]
    folder = cache.run("sensitivity", "measure sensitivity", inputs, work)
    measured: dict[str, Any] = json.loads((folder / SENSITIVITY).read_text())
    return measured


def run_weights(
    cache: StageCache,
    component: str,
    recipe: Recipe,
    source: Source,
    digests: dict[str, Any],
    calibration: Path | None,
) -> Path:
    """The component's weights, and layers.json: format and errors of every quantized layer."""
    plan = source.plans.get(component, [])
    precision = getattr(recipe.precision, component, None)
    scales: Scales = precision.scales if precision and any(entry.format == "nvfp4" for entry in plan) else "max"
    shard_bytes = None if recipe.weights.shard_gib is None else int(recipe.weights.shard_gib * 2**30)
    quantizes = bool(to_quantize(plan))
    measured_by = (
        [cache.file_digest(calibration), recipe.calibration.amax, recipe.calibration.percentile]
        if calibration and quantizes
        else []
    )
    formats = [[entry.layer.name, entry.format, entry.layer.group] for entry in plan]
    # VisualGen wants these under other names, and everything else from the same files as everyone.
    apart = (
        [f"{entry.layer.name}.weight" for entry in plan if is_split(entry.layer.name)]
        if component == "transformer" and any(target.is_visual_gen for target in recipe.targets)
        else []
    )
    tensors = kept_tensors(source, component)

    def work(folder: Path, report: Report) -> None:
        from fluxc.quantize.writer import write_weights

        records = read_calibration(calibration).records[component] if calibration and quantizes else {}
        written = write_weights(
            folder / WEIGHTS_FILE[component],
            tensors,
            plan,
            input_amax(records, plan, recipe.calibration),
            scales=scales,
            input_rows=lambda layer: records[layer].rows,
            shard_bytes=shard_bytes,
            apart=apart,
            on_progress=report,
        )
        layers = [
            {
                "name": r.name,
                "format": r.format,
                "scales": scales if r.format == "nvfp4" else "max",
                "snr_db": round(r.snr_db, 3),
                "output_snr_db": None if r.output_snr_db is None else round(r.output_snr_db, 2),
            }
            for r in written
        ]
        # No original to compare with, so their errors are not known.
        layers += [
            {"name": e.layer.name, "format": e.format, "scales": None, "snr_db": None, "output_snr_db": None}
            for e in plan
            if e.quantized_in_source
        ]
        (folder / "layers.json").write_text(json.dumps(layers))

    inputs = [component, digests[component], formats, measured_by, list(tensors), scales, shard_bytes, apart]
    return cache.run(f"weights-{component}", f"write {component} weights", inputs, work)


def run_trace(cache: StageCache, component: str, loaded: LoadedRecipe, source: Source) -> Path:
    """The component's neutral graphs as .onnx files."""
    config = source.checkpoint.components[component].config
    length, family = loaded.recipe.text.length, source.family

    def work(folder: Path, report: Report) -> None:
        from fluxc.graph import compose, export as trace

        if component == "transformer":
            pieces = trace.trace_transformer(config, length, source.guidance_branches)
            body = compose.compose_body(pieces, config["num_layers"], config["num_single_layers"], length)
            graphs = {name: pieces[name] for name in ("prologue", "signal", "epilogue")} | {"body": body}
        elif component == "text_encoder":
            pieces = trace.trace_text_encoder(config, length, family)
            graphs = {"text_encoder": compose.compose_text_encoder(pieces, family.text_layers)}
        else:
            decoder, expected = trace.trace_vae_decoder(config)
            check_tensors(source.checkpoint.components["vae"], expected, ignored=("bn.num_batches_tracked",))
            graphs = {"vae_decoder": decoder}
        for name, model in graphs.items():
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))

    names = list(source.checkpoint.components[component].tensors) if component == "vae" else []
    inputs = [component, config, length, source.guidance_branches, list(family.text_layers), names]
    return cache.run(f"trace-{component}", f"trace {component}", inputs, work)


def run_prompting(cache: StageCache, recipe: Recipe, source: Source, digests: dict[str, Any]) -> Prompting:
    """The manifest's `prompting`: the chat template rendered around a prompt, the length, the pad token."""

    def work(folder: Path, report: Report) -> None:
        from fluxc.checkpoint.components import render_template

        prefix, suffix, pad = render_template(source.checkpoint, source.family.template_options)
        (folder / "template.json").write_text(json.dumps({"prefix": prefix, "suffix": suffix, "pad_id": pad}))

    inputs = [digests["tokenizer"], source.family.template_options]
    folder = cache.run("template", "render chat template", inputs, work)
    rendered = json.loads((folder / "template.json").read_text())
    return Prompting(tokenizer="tokenizer/tokenizer.json", length=recipe.text.length, **rendered)


def check_prompts(loaded: LoadedRecipe, source: Source, prompting: Prompting) -> None:
    """Refuse prompts of the recipe that are longer than the compiled text; diffusers would cut them without a word."""
    from fluxrt.prompt import PromptEncoder

    encoder = PromptEncoder(prompting, source.checkpoint.components["tokenizer"].folder / "tokenizer.json")
    for field in ("calibration", "fidelity", "step_cache"):
        file = getattr(getattr(loaded.recipe, field), "prompts", None)
        if file is None:
            continue
        prompts = loaded.prompts(f"{field}.prompts", file)
        try:
            encoder.encode(prompts)
        except RequestError as error:
            raise RecipeError(f"{field}.prompts: {error}") from error


@contextmanager
def measuring(
    loaded: LoadedRecipe, out: Path, progress: StageProgress
) -> Iterator[tuple[StageCache, Source, dict[str, dict[str, str]]]]:
    """(cache, source, checkpoint's digests) for a command that measures the checkpoint into the file `out`.

    Prompts are checked first. The cache is in `.fluxc/` beside `out`, locked meanwhile and pruned after.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = StageCache(out.resolve().parent / ".fluxc", progress)
    with locked(cache.root):
        source = read_source(loaded)
        with progress.stage("hash checkpoint") as report:
            digests = checkpoint_digests(source.checkpoint, cache, report)
        check_prompts(loaded, source, run_prompting(cache, loaded.recipe, source, digests))
        yield cache, source, digests
        cache.prune()


def sampling_entry(recipe: Recipe, source: Source) -> dict[str, Any]:
    """The manifest's `sampling`."""
    return {
        "sizes": recipe.sizes,
        "pixels_per_token": pixels_per_token(source.checkpoint),
        "latent_channels": source.checkpoint.components["transformer"].config["in_channels"],
        "schedule": "flux2-flow-match",
        "steps": recipe.sampling.steps,
        "guidance": recipe.sampling.guidance,
        "guidance_branches": source.guidance_branches,
    }


def provenance_tools(recipe: Recipe) -> dict[str, str]:
    """Versions of everything the bundle's bytes depend on."""
    libraries = {target.kind: installed_version(target.kind) for target in recipe.targets if target.is_tensorrt}
    return dict(sorted((tool_versions() | {name: version for name, version in libraries.items() if version}).items()))
