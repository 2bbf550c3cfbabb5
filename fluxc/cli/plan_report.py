"""What a plan amounts to, as data: weights in memory, widened fusion groups, presets compared, and the whole as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from fluxc.build.budget import BUNDLE, HASH, budget_as_json, rates_for
from fluxc.build.input_scales import input_scales
from fluxc.build.preflight import Preflight
from fluxc.predict.scaling import memory_at_once, recipe_model
from fluxc.quantize.memory import WeightsMemory
from fluxc.quantize.plan import LayerPlan, precision_plan, summary_by_format
from fluxc.quantize.presets import PRESETS, Preset, absent_parts
from fluxc.quantize.source import Source
from fluxc.quantize.source_memory import memory_by_component, planned_memory
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import ComponentPrecision
from fluxc.targets.base import TargetContext


@dataclass(frozen=True)
class PresetFigures:
    """What a preset keeps in bf16 of one model when everything else is nvfp4; `share` is of the Linears' parameters."""

    preset: Preset
    layers: int
    parameters: int
    share: float
    memory: WeightsMemory


def preset_figures(source: Source) -> list[PresetFigures]:
    """Every preset on this checkpoint, in place of the recipe's own `exclude`, `rules` and `default`."""
    figures = []
    for preset in PRESETS.values():
        planned = source.plans[preset.component]
        layers = [entry.layer for entry in planned]
        bytes_before = {entry.layer.name: entry.source_bytes for entry in planned if not entry.quantized_in_source}
        precision = ComponentPrecision(default="nvfp4", preset=preset.name)
        plan = precision_plan(preset.component, layers, precision, bytes_before)
        count, parameters, _, _ = summary_by_format(plan)["bf16"]
        share = parameters / sum(entry.parameters for entry in plan)
        figures.append(PresetFigures(preset, count, parameters, share, planned_memory(source, preset.component, plan)))
    return figures


def widened_groups(plan: list[LayerPlan]) -> dict[str, tuple[list[str], str]]:
    """The fusion groups a rule was widened to: group to (members that only follow, the rule)."""
    groups: dict[str, tuple[list[str], str]] = {}
    for entry in plan:
        if entry.widened and entry.layer.group:
            groups.setdefault(entry.layer.group, ([], entry.rule))[0].append(entry.layer.name)
    return groups


def lacking(loaded: LoadedRecipe, component: str, plan: list[LayerPlan]) -> list[str]:
    """A sentence for each part of the component's preset that this model legitimately lacks."""
    name = getattr(loaded.recipe.precision, component).preset
    if name is None:
        return []
    layers = [entry.layer for entry in plan]
    return [
        f"preset {name}: {p.pattern!r} names no layer here: {p.absent}" for p in absent_parts(PRESETS[name], layers)
    ]


def plan_as_json(ready: Preflight) -> dict[str, Any]:
    """The plan for scripts, field by field in docs/recipe.md; `precision` has the fields that bundle.json gives every layer."""
    recipe, source = ready.job.loaded.recipe, ready.job.original
    context = TargetContext(recipe, source)
    return {
        "name": recipe.name,
        "family": source.checkpoint.pipeline_class,
        "commits": source.checkpoint.commits,
        "downloads": {f"{entry.repo}/{entry.path}": entry.size for entry in source.checkpoint.missing},
        "presets": {name: getattr(recipe.precision, name).preset for name in source.plans},
        "precision": [_layer(entry) for plan in source.plans.values() for entry in plan],
        "formats": {name: _formats(plan) for name, plan in source.plans.items()},
        "widened": {
            group: {"follow": members, "rule": rule}
            for plan in source.plans.values()
            for group, (members, rule) in widened_groups(plan).items()
        },
        "input_scales": asdict(scales) if (scales := input_scales(ready.job)) else None,
        "weights_bytes": {name: asdict(memory) for name, memory in memory_by_component(source).items()},
        "targets": [target.name for target in recipe.targets],
        "ranks": {
            target.name: [shards.as_json() for shards in context.shards(target)]
            for target in recipe.targets
            if target.ranks > 1
        },
        "sampling": {
            "sizes": [list(size) for size in recipe.listed_sizes],
            "text_length": recipe.text.length,
            "steps": recipe.sampling.steps,
            "guidance": recipe.sampling.guidance,
            "passes": ready.job.rows(recipe.sampling.guidance),
            "at_once": {
                str(images): {"working": round(memory.working), "buffers": round(memory.buffers)}
                for images, memory in memory_at_once(recipe_model(ready.job.loaded, source)).items()
            },
            "tiles": msgspec.to_builtins(context.tiles),
        },
        "stages": [
            {"name": stage.name, "part": stage.part, "result": stage.result}
            for stage in ready.budget.stages
            if stage.name not in (HASH, BUNDLE)
        ],
        "budget": budget_as_json(ready.budget, rates_for(ready.job)),
        "unused": ready.job.unused,
        "lacking_here": list(ready.lacking.texts),
    }


def presets_as_json(source: Source) -> list[dict[str, Any]]:
    """The comparison of presets for scripts."""
    return [
        {
            "name": figures.preset.name,
            "meaning": figures.preset.meaning,
            "source": figures.preset.source,
            "layers": figures.layers,
            "parameters": figures.parameters,
            "share": figures.share,
            "weights_bytes": asdict(figures.memory),
        }
        for figures in preset_figures(source)
    ]


def _layer(entry: LayerPlan) -> dict[str, Any]:
    return {
        "component": entry.component,
        "name": entry.layer.name,
        "shape": [entry.layer.out_features, entry.layer.in_features],
        "format": entry.format,
        "rule": entry.rule,
        "group": entry.layer.group,
        "bytes_before": entry.source_bytes,
        "bytes_after": entry.bytes_after,
    }


def _formats(plan: list[LayerPlan]) -> dict[str, dict[str, float]]:
    total = sum(entry.parameters for entry in plan)
    return {
        format: {
            "layers": layers,
            "parameters": parameters,
            "share": parameters / total,
            "bytes_before": before,
            "bytes_after": after,
        }
        for format, (layers, parameters, before, after) in sorted(summary_by_format(plan).items())
    }
