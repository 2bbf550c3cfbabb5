"""What `plan` prints."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fluxc.base.console import new_console, new_table
from fluxc.base.fitted import Column, fitted_table
from fluxc.base.numbers import as_json as to_json
from fluxc.build.input_scales import InputScales, input_scales
from fluxc.build.job import Job
from fluxc.build.preflight import preflight
from fluxc.calibrate.summary import in_words
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.cli.describe_serving import batch_sentences, decoding_sentences, step_sentences
from fluxc.cli.plan_budget import print_budget
from fluxc.cli.plan_report import (
    lacking,
    memory_by_component,
    plan_as_json,
    preset_figures,
    presets_as_json,
    widened_groups,
)
from fluxc.cli.plan_source import print_source
from fluxc.predict.gpus import Gpu
from fluxc.predict.scaling import memory_at_once, recipe_model
from fluxc.quantize.memory import WeightsMemory
from fluxc.quantize.plan import WIDENED, LayerPlan, summary_by_format
from fluxc.quantize.source import Source, kept_tensors, narrowed, read_source
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import Budget
from fluxc.targets.base import TargetContext
from fluxc.targets.registry import kind_of


def print_plan(loaded: LoadedRecipe, every_layer: bool, out: Path) -> None:
    """The precision of every layer with the rule that decided it, sizes before and after, what each target will do, and which
    stages a build into `out` would run. Raises what a build would raise before its first stage, what this machine lacks after
    the tables."""
    ready = preflight(loaded, out)
    source = ready.job.original
    context = TargetContext(loaded.recipe, source)
    console = new_console()
    recipe = loaded.recipe
    print_source(console, loaded, source.checkpoint)
    for component, plan in source.plans.items():
        if every_layer:
            console.print(_layer_table(console, component, plan))
        console.print(_format_table(console, component, plan))
        if widened_groups(plan):
            console.print(_widened_table(plan))
        for sentence in lacking(loaded, component, plan):
            console.print(sentence)
        if getattr(recipe.precision, component).exclude == "auto":
            console.print(_auto_sentence(recipe.precision.transformer.budget))
    scales = input_scales(ready.job)
    if scales:
        console.print(_scales_sentence(loaded, scales))
        for component, ranges in scales.ranges.items():
            console.print(_range_table(component, ranges))
    console.print(_component_table(source))
    _print_narrowed(console, source)
    console.print(_memory_table(memory_by_component(source)))
    console.print(
        "What an engine that computes in these formats holds; activations are not counted. "
        "(FP8 cut dev's memory by over 40%, NVIDIA reports.)"
    )
    table = new_table(
        "target",
        "what it will do",
        title="targets",
    )
    for target in recipe.targets:
        table.add_row(target.name, kind_of(target.kind).describe(target))
    console.print(table)
    for target in (target for target in recipe.targets if target.ranks > 1):
        for shards in context.shards(target):
            console.print(f"{target.name}: {shards}")
    _print_sampling(console, ready.job, context)
    print_budget(console, ready)
    ready.check_machine()


def _print_sampling(console: Console, job: Job, context: TargetContext) -> None:
    """What a request may ask for and what that takes, and what the recipe asks in vain."""
    recipe = job.loaded.recipe
    sizes = ", ".join(f"{height}x{width}" for height, width in recipe.listed_sizes)
    sizes += ", and all between the last two" if recipe.size_range else ""
    branches = "two passes a step (guidance)" if job.original.cfg_batch else "one pass a step"
    console.print(f"sizes {sizes}; text {recipe.text.length} tokens; {recipe.sampling.steps} steps; {branches}")
    at_once = memory_at_once(recipe_model(job.loaded, job.original))
    for sentence in (*job.unused, *batch_sentences(context, at_once), *decoding_sentences(context)):
        console.print(sentence)
    for sentence in step_sentences(recipe, job.original.plans["transformer"]):
        console.print(sentence)
    if recipe.step_cache:
        console.print(_cache_sentence(job.loaded))


def _scales_sentence(loaded: LoadedRecipe, scales: InputScales) -> str:
    """What input scales stand for, and where that is measured."""
    asked = loaded.recipe.calibration
    words = f"input scales: {in_words(asked, scales.margins)}"
    if scales.size is None:
        return words
    height, width = scales.size
    measured = f"read from {scales.file}, measured" if scales.file else "measured"
    text = f"{words}; {measured} on {scales.prompts} prompts, {scales.steps} steps, {height}x{width}"
    return f"{text}. The transformer's are modelopt's own" if scales.engine == "modelopt" else text


def _range_table(component: str, ranges: dict[str, float]) -> Table:
    """The ranges that are assumed of a component's inputs, by kind of layer."""
    table = new_table(
        "inputs of",
        "layers",
        "largest, with margin",
        title=f"{component} inputs, as assumed",
    )
    kinds: dict[str, list[str]] = {}
    for layer in ranges:
        kinds.setdefault(_kind(layer), []).append(layer)
    for kind, layers in kinds.items():
        table.add_row(_numbered(kind, layers), str(len(layers)), f"{ranges[layers[0]]:g}")
    return table


def _cache_sentence(loaded: LoadedRecipe) -> str:
    """What the recipe asks of the step cache."""
    from fluxc.build.requests import trace_request

    cache = loaded.recipe.step_cache
    assert cache is not None
    request = trace_request(loaded)
    height, width = request["size"]
    asked = f"as many steps as an accumulated error of {cache.max_error} allows, of"
    if cache.skip is not None:
        asked = "as many steps as the knee of the curve says, of" if cache.skip == "auto" else f"{cache.skip:g} of"
    how = "always the same" if cache.mode == "static" else "on average, decided while an image is generated"
    traced = f"traced in {cache.trace}" if cache.trace else f"to be traced in {request['dtype']}"
    prompts = f"{len(request['prompts'])} prompts at {height}x{width} {traced}"
    return f"step cache: skips {asked} {request['steps']} steps ({how}); {prompts}"


def _auto_sentence(budget: Budget | None) -> str:
    """What `exclude: auto` leaves open until the model has run."""
    assert budget is not None
    limit = (
        f"at most {budget.share:.2%} of the parameters"
        if budget.share is not None
        else f"as few parameters as bring the velocity's error to {budget.error}"
    )
    return f"exclude: auto chooses during the build, from measurements, {limit} to stay bf16; the tables show none kept"


def print_plan_json(loaded: LoadedRecipe, presets: bool, out: Path) -> None:
    """The plan, or the comparison of presets, as one JSON document; errors as of print_plan."""
    ready = preflight(loaded, out)
    source = ready.job.original
    print(to_json(presets_as_json(source) if presets else plan_as_json(ready), "plan", indent=1))
    ready.check_machine()


def print_presets(loaded: LoadedRecipe, out: Path) -> None:
    """What every preset would keep of this checkpoint, beside what the recipe keeps."""
    source = preflight(loaded, out).job.original
    console = new_console()
    figures = preset_figures(source)
    print_source(console, loaded, source.checkpoint)
    unit, size = _unit(figures[0].memory)
    table = new_table(
        "preset",
        "layers kept in bf16",
        "share of parameters",
        f"transformer weights, {unit}",
        "against bf16",
        title="presets, everything else nvfp4",
    )
    for row in figures:
        after = row.memory.planned
        table.add_row(
            row.preset.name,
            str(row.layers),
            f"{row.share:.2%}",
            f"{after / size:.2f}",
            f"{row.memory.planned_change:+.1%}",
        )
    plan, memory = source.plans["transformer"], memory_by_component(source)["transformer"]
    layers, parameters, _, _ = summary_by_format(plan).get("bf16", (0, 0, 0, 0))
    share = parameters / sum(entry.parameters for entry in plan)
    table.add_row(
        "(this recipe)", str(layers), f"{share:.2%}", f"{memory.planned / size:.2f}", f"{memory.planned_change:+.1%}"
    )
    table.add_row("(all FP8)", "0", "0.00%", f"{memory.fp8 / size:.2f}", f"{memory.fp8_change:+.1%}")
    console.print(table)
    for row in figures:
        console.print(f"{row.preset.name}: {row.preset.meaning}. From: {row.preset.source}.", soft_wrap=True)
    console.print("Use one with `precision: {transformer: {default: nvfp4, preset: NAME}}`.")


def print_prediction(
    loaded: LoadedRecipe | None,
    model: str,
    size: tuple[int, int],
    gpu: Gpu,
    counts: tuple[int, ...],
    batches: tuple[int, ...] | None,
    as_json: bool,
) -> None:
    """Predicted time and memory of the recipe's model on `counts` GPUs, or without one of the published `model` at `size`.

    `batches` are how many images are made at once, by default the recipe's.
    """
    from fluxc.predict.report import print_scaling
    from fluxc.predict.scaling import predict, published_model, scaling_as_json

    subject = recipe_model(loaded, read_source(loaded)) if loaded else published_model(model, size)
    scaling = predict(replace(subject, batches=batches) if batches else subject, gpu, counts)
    if as_json:
        print(to_json(scaling_as_json(scaling), "prediction", indent=1))
    else:
        console = new_console()
        print_scaling(console, scaling)
        if loaded and loaded.recipe.precision.transformer.exclude == "auto":
            console.print(_auto_sentence(loaded.recipe.precision.transformer.budget))


LAYER_COLUMNS = (
    Column("layer", whole=True),
    Column("out x in", 3),
    Column("format", whole=True),
    Column("decided by"),
    Column("share", 1),
    Column("bytes before", 4),
    Column("bytes after", 2),
)
"""Of the table of layers. A narrow terminal keeps what was decided, of which layers and why; sizes go first."""


def _layer_table(console: Console, component: str, plan: list[LayerPlan]) -> Table:
    """Layers of the same kind, format and rule in one row, with their block numbers as ranges."""
    table = []
    total = sum(entry.parameters for entry in plan)
    rows: dict[tuple[str, str, str, str], list[LayerPlan]] = {}
    for entry in plan:
        kind = _kind(entry.layer.name)
        shape = f"{entry.layer.out_features} x {entry.layer.in_features}"
        rows.setdefault((kind, shape, entry.format, entry.rule), []).append(entry)
    for (kind, shape, format, rule), entries in rows.items():
        name = _numbered(kind, [entry.layer.name for entry in entries])
        before, after = sum(e.source_bytes for e in entries), sum(e.bytes_after for e in entries)
        share = sum(e.parameters for e in entries) / total
        table.append((name, shape, format, rule, f"{share:.2%}", f"{before:,}", f"{after:,}"))
    return fitted_table(console, LAYER_COLUMNS, table, component)


def _kind(name: str) -> str:
    """The name with its block number replaced by {}."""
    return re.sub(r"\.\d+\.", ".{}.", name, count=1)


def _numbered(kind: str, names: list[str]) -> str:
    """`kind` with the block numbers of `names` in place of {}."""
    numbers = [int(m[1]) for name in names if (m := re.search(r"\.(\d+)\.", name)) and "{}" in kind]
    return kind.replace("{}", _ranges(numbers)) if numbers else kind


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as '0-2,5'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


FORMAT_COLUMNS = (
    Column("format", whole=True),
    Column("layers"),
    Column("parameters", 2),
    Column("share"),
    Column("bytes before", 1),
    Column("bytes after"),
)


def _format_table(console: Console, component: str, plan: list[LayerPlan]) -> Table:
    """Layers, parameters and bytes of each format."""
    total = sum(entry.parameters for entry in plan)
    rows = [
        (format, str(layers), f"{parameters:,}", f"{parameters / total:.2%}", f"{before:,}", f"{after:,}")
        for format, (layers, parameters, before, after) in sorted(summary_by_format(plan).items())
    ]
    before, after = sum(entry.source_bytes for entry in plan), sum(entry.bytes_after for entry in plan)
    change = f"{after:,} ({after / before - 1:+.0%})"
    rows.append(("all", str(len(plan)), f"{total:,}", "100%", f"{before:,}", change))
    return fitted_table(console, FORMAT_COLUMNS, rows, f"{component} Linears")


def _widened_table(plan: list[LayerPlan]) -> Table:
    """Fusion groups that follow a rule for one of their members; those of the same kind and rule in one row."""
    table = new_table(
        "fusion group",
        "follow",
        "decided by",
        title="widened to the whole fusion group",
    )
    rows: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for group, (members, rule) in widened_groups(plan).items():
        followers = tuple(member.rsplit(".", 1)[-1] for member in members)
        rows.setdefault((_kind(group), followers, rule), []).append(group)
    for (kind, followers, rule), groups in rows.items():
        table.add_row(_numbered(kind, groups), ", ".join(followers), rule.replace(WIDENED, ""))
    return table


def _print_narrowed(console: Console, source: Source) -> None:
    """What is stored in fewer bits than in the checkpoint although it is not quantized."""
    wide = [name for name in WEIGHTS_FILE if narrowed(name, kept_tensors(source, name))]
    if wide:
        named = " and ".join(wide)
        console.print(f"{named}: the checkpoint holds weights in fp32; those that are not quantized become bf16.")


def _component_table(source: Source) -> Table:
    table = new_table(
        "component",
        "bytes in the checkpoint",
        "bytes in the bundle",
        title="weights files",
    )
    for name, memory in memory_by_component(source).items():
        if name in WEIGHTS_FILE:
            before = sum(ref.nbytes for ref in source.checkpoint.components[name].tensors.values())
            table.add_row(name, f"{before:,}", f"{memory.planned:,}")
    return table


def _memory_table(components: dict[str, WeightsMemory]) -> Table:
    """Of what a bundle stores: of the text encoder only the layers that are needed."""
    unit, size = _unit(components["all"])
    table = new_table(
        "component",
        "bf16",
        "all FP8",
        "this plan",
        title=f"weights in memory, {unit}, scales included",
    )
    for name, memory in components.items():
        fp8 = f"{memory.fp8 / size:.2f} ({memory.fp8_change:+.1%})"
        planned = f"{memory.planned / size:.2f} ({memory.planned_change:+.1%})"
        table.add_row(name, f"{memory.bf16 / size:.2f}", fp8, planned)
    return table


def _unit(memory: WeightsMemory) -> tuple[str, int]:
    """A unit that suits the weights, and its bytes."""
    return ("GiB", 2**30) if memory.bf16 >= 2**30 else ("MiB", 2**20)
