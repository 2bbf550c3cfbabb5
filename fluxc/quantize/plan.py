"""The precision plan: every Linear with its format and the rule that decided it.

1. A layer that a `exclude` pattern matches stays bf16, and so does one that `exclude: auto` chose.
2. Otherwise the first of `rules` that matches decides.
3. Otherwise a layer that `preset` keeps stays bf16.
4. Otherwise `default` does.
5. A decision for one member of a fusion group holds for the whole group (in the order above, earlier before later), and the
   rule says that it was widened.
6. A pattern that matches no layer is an error.

In a component that the checkpoint holds quantized already, its layers keep their formats, and those it left alone stay bf16
unless a rule names them: `default` does not apply. A decision that asks a quantized layer for another format is an error.
Fusion groups whose members it quantized under different scales are dissolved, since no engine can merge them.

`low_rank` gives layers that are quantized to NVFP4 here factors beside their weight: the first entry that matches, for the
whole fusion group. An entry that no such layer matches is an error, unless `rules` gave one of its layers another format.

`smoothing` is for all layers that are solved: those with factors, or with `rounding: gptq` all in NVFP4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fluxc.base.errors import RecipeError
from fluxc.checkpoint.quantized import SourceLayer, unmergeable
from fluxc.formats.low_rank import factors_bytes
from fluxc.formats.registry import FORMATS, check_format
from fluxc.formats.smoothing import PRE_QUANT_SCALE, smoothing_bytes
from fluxc.models.base import Linear
from fluxc.quantize.patterns import matching
from fluxc.quantize.presets import find_preset, kept_by
from fluxc.recipe.faults import Collected
from fluxc.recipe.structs import ComponentPrecision

RULE = "rule "
WIDENED = ", widened to the fusion group"
IN_SOURCE = "quantized in the checkpoint (modelopt)"
LEFT_IN_SOURCE = "not quantized in the checkpoint, which is (modelopt); default does not apply"
APART = ", fusion group dissolved: its scales differ there"


@dataclass(frozen=True)
class LayerPlan:
    """One Linear, its format, and why.

    `widened`: the rule matched another member of its fusion group. `quantized_in_source`: the checkpoint holds it in this
    format already, and its tensors are copied: `parts` names them. `low_rank` is the rank of the factors beside its weight
    (SVDQuant), which are among those tensors, or are fitted by this build where the format can have them; 0 without.
    `smoothing`: this build finds a `pre_quant_scale` for it, one for a whole fusion group, where the format can have it.
    """

    component: str
    layer: Linear
    format: str
    rule: str
    source_bytes: int
    widened: bool = False
    quantized_in_source: bool = False
    parts: tuple[str, ...] = ()
    low_rank: int = 0
    smoothing: bool = False

    def fingerprint(self) -> list[Any]:
        """What a stage's key takes of it: not the words of the rule that decided, nor sizes in the checkpoint."""
        layer = self.layer
        shape = [layer.out_features, layer.in_features]
        beside = [list(self.parts), self.low_rank, self.smoothing]
        return [layer.name, shape, layer.group, self.format, self.quantized_in_source, *beside]

    @property
    def parameters(self) -> int:
        return self.layer.out_features * self.layer.in_features

    @property
    def rank(self) -> int:
        """Of the factors that it has in its format; 0 without."""
        return self.low_rank if self.quantized_in_source or self._is_solved else 0

    @property
    def is_smoothed(self) -> bool:
        """Whether it has a `pre_quant_scale` in its format."""
        return PRE_QUANT_SCALE in self.parts if self.quantized_in_source else self.smoothing and self._is_solved

    @property
    def _is_solved(self) -> bool:
        """Whether its format is one whose weights can be solved."""
        return self.format != "bf16" and bool(FORMATS[self.format].solves)

    @property
    def bytes_after(self) -> int:
        """Bytes of the layer's tensors in the bundle; a layer that is kept is copied as it lies in the checkpoint, but for
        weights in fp32, which are rounded to bf16."""
        if self.quantized_in_source:
            return self.source_bytes
        if self.format == "bf16":
            return min(self.source_bytes, 2 * self.parameters)
        rows, columns = self.layer.out_features, self.layer.in_features
        beside = factors_bytes(self.rank, rows, columns) + self.is_smoothed * smoothing_bytes(columns)
        return FORMATS[self.format].nbytes(rows, columns) + beside


def precision_plan(
    component: str,
    layers: list[Linear],
    precision: ComponentPrecision,
    source_bytes: dict[str, int] | None = None,
    chosen_by_auto: dict[str, str] | None = None,
    in_source: Mapping[str, SourceLayer] | None = None,
) -> list[LayerPlan]:
    """The plan of one component, in the order of `layers`; `source_bytes` holds their bytes in the checkpoint (else bf16).

    `chosen_by_auto` is what `exclude: auto` came to: layer to the reason; without it, the plan is that of keeping nothing.
    `in_source` holds the layers that the checkpoint holds quantized. Raises RecipeError for a pattern that matches nothing,
    for a format a layer's shape cannot have, and for another format than a layer is quantized in.
    """
    check_format(precision.default, f"precision.{component}.default")
    for at, rule in enumerate(precision.rules):
        check_format(rule.format, f"precision.{component}.rules[{at}].format")
    _check_patterns(component, precision, [layer.name for layer in layers])
    in_source = in_source or {}
    apart = unmergeable(layers, in_source)
    dissolved = {layer.name for layer in layers if layer.group in apart}
    layers = [replace(layer, group=None) if layer.name in dissolved else layer for layer in layers]
    field = f"precision.{component}"
    names = [layer.name for layer in layers]
    decisions: list[tuple[str, str, set[str]]] = [
        ("bf16", f"exclude {pattern!r}", set(matching(pattern, names, f"{field}.exclude[{i}]")))
        for i, pattern in enumerate(() if precision.exclude == "auto" else precision.exclude)
    ]
    decisions += [("bf16", f"exclude auto: {reason}", {name}) for name, reason in (chosen_by_auto or {}).items()]
    decisions += [
        (rule.format, f"{RULE}{rule.match!r}", set(matching(rule.match, names, f"{field}.rules[{i}].match")))
        for i, rule in enumerate(precision.rules)
    ]
    if precision.preset is not None:
        preset = find_preset(precision.preset, component, f"{field}.preset")
        decisions += [
            ("bf16", f"preset {preset.name}: {pattern!r}", kept)
            for pattern, kept in kept_by(preset, layers, f"{field}.preset")
        ]
    members: dict[str, list[str]] = {}
    for layer in layers:
        members.setdefault(layer.group or layer.name, []).append(layer.name)
    plan = []
    for layer in layers:
        group = members[layer.group or layer.name]
        chosen: str = "bf16" if in_source else precision.default
        why = LEFT_IN_SOURCE if in_source else "default"
        decided = widened = False
        for wanted, label, matched in decisions:
            if matched.intersection(group):
                chosen, decided = wanted, True
                widened = layer.name not in matched
                why = f"{label}{WIDENED}" if widened else label
                break
        stored = in_source.get(layer.name)
        if stored is not None:
            if decided and chosen != stored.format:
                raise RecipeError(
                    f"{field}: {why} asks for {chosen}, but {layer.name} is {stored.format} in the checkpoint, which is not "
                    f"undone; leave {layer.name!r} out of it, or start from a checkpoint that is not quantized"
                )
            why = IN_SOURCE + (APART if layer.name in dissolved else "")
            parts = tuple(part for part in stored.tensors)
            plan.append(
                LayerPlan(component, layer, stored.format, why, stored.nbytes, False, True, parts, stored.low_rank)
            )
            continue
        block = FORMATS[chosen].block if chosen in FORMATS else 1
        if layer.in_features % block:
            raise RecipeError(
                f"{field}: {layer.name} has {layer.in_features} inputs, not a multiple of {block}, so it cannot be "
                f"{chosen}; add {layer.name!r} to {field}.exclude"
            )
        bf16_bytes = 2 * layer.out_features * layer.in_features
        before = (source_bytes or {}).get(layer.name, bf16_bytes)
        plan.append(LayerPlan(component, layer, chosen, why, before, widened))
    _check_rounding(component, precision, plan)
    plan = _with_low_rank(component, precision, plan, must_match=chosen_by_auto is None)
    return _with_smoothing(component, precision, plan) if precision.smoothing != "none" else plan


def _with_low_rank(
    component: str, precision: ComponentPrecision, plan: list[LayerPlan], must_match: bool
) -> list[LayerPlan]:
    """The plan with the ranks that `low_rank` asks for; RecipeError for an entry that is for no layer, or too large for one."""
    names = [entry.layer.name for entry in plan]
    groups = {entry.layer.name: entry.layer.group or entry.layer.name for entry in plan}
    able = {entry.layer.name for entry in to_quantize(plan) if FORMATS[entry.format].solves}
    # `fluxc tune` writes rules that leave everything else as it is.
    ruled = {entry.layer.name for entry in plan if entry.rule.startswith(RULE)}
    ranks: dict[str, int] = {}
    for at, asked in enumerate(precision.low_rank):
        field = f"precision.{component}.low_rank[{at}]"
        matched = [name for name in matching(asked.match, names, f"{field}.match") if name in able]
        if not matched and must_match and not ruled.intersection(matching(asked.match, names, f"{field}.match")):
            formats = ", ".join(sorted(name for name, format in FORMATS.items() if format.solves))
            raise RecipeError(
                f"{field}.match: {asked.match!r} matches no layer that this build quantizes to {formats}, beside which factors "
                "can be; leave the entry out, or give such layers one of these formats"
            )
        for name in matched:
            ranks.setdefault(groups[name], asked.rank)
    found = []
    for entry in plan:
        rank, layer = ranks.get(groups[entry.layer.name], 0), entry.layer
        if rank > min(layer.in_features, layer.out_features):
            raise RecipeError(
                f"precision.{component}.low_rank: rank {rank} is more than {layer.name} has inputs or outputs "
                f"({layer.out_features} x {layer.in_features}); give it an entry of its own before that, with a smaller rank"
            )
        found.append(replace(entry, low_rank=rank, rule=f"{entry.rule}, low rank {rank}") if rank else entry)
    return found


def _with_smoothing(component: str, precision: ComponentPrecision, plan: list[LayerPlan]) -> list[LayerPlan]:
    """The plan with a `pre_quant_scale` for every layer that is solved; RecipeError where the inputs of none are rounded."""
    is_gptq = precision.rounding != "nearest"
    solved = {
        entry.layer.name for entry in to_quantize(plan) if FORMATS[entry.format].solves and (is_gptq or entry.rank)
    }
    rounded = [entry for entry in plan if entry.layer.name in solved and FORMATS[entry.format].calibrated]
    if solved and not rounded and not any(entry.rule.startswith(RULE) for entry in plan):
        raise RecipeError(
            f"precision.{component}.smoothing: none of the {component}'s layers that are solved has rounded inputs, so it "
            "would cost time for nothing; leave it out, or quantize layers to nvfp4"
        )
    return [
        replace(entry, smoothing=True, rule=f"{entry.rule}, smoothing") if entry.layer.name in solved else entry
        for entry in plan
    ]


def _check_rounding(component: str, precision: ComponentPrecision, plan: list[LayerPlan]) -> None:
    """Refuse to solve weights where there are none to solve."""
    if precision.rounding == "nearest" or any(FORMATS[entry.format].solves for entry in to_quantize(plan)):
        return
    formats = ", ".join(sorted(name for name, format in FORMATS.items() if format.solves))
    raise RecipeError(
        f"precision.{component}.rounding: {precision.rounding} solves weights in {formats}, and this build quantizes none of "
        f"the {component}'s layers to that; leave it out"
    )


def _check_patterns(component: str, precision: ComponentPrecision, names: list[str]) -> None:
    """Raise RecipeError with every pattern that names no layer."""
    collected = Collected()
    fields = {f"exclude[{at}]": pattern for at, pattern in enumerate(precision.exclude) if precision.exclude != "auto"}
    fields |= {f"rules[{at}].match": rule.match for at, rule in enumerate(precision.rules)}
    fields |= {f"low_rank[{at}].match": asked.match for at, asked in enumerate(precision.low_rank)}
    for field, pattern in fields.items():
        with collected.collecting():
            matching(pattern, names, f"precision.{component}.{field}")
    collected.raise_all()


def needs_calibration(plan: list[LayerPlan]) -> bool:
    """Whether the build quantizes a layer whose inputs must have been measured."""
    return any(FORMATS[entry.format].calibrated for entry in to_quantize(plan))


def to_quantize(plan: list[LayerPlan]) -> list[LayerPlan]:
    """The layers that the build quantizes itself: those neither kept nor quantized in the checkpoint."""
    return [entry for entry in plan if entry.format != "bf16" and not entry.quantized_in_source]


def fusion_groups(entries: Iterable[LayerPlan]) -> list[list[LayerPlan]]:
    """These layers by fusion group, in their order; a layer of no group is one by itself."""
    groups: dict[str, list[LayerPlan]] = {}
    for entry in entries:
        groups.setdefault(entry.layer.group or entry.layer.name, []).append(entry)
    return list(groups.values())


def summary_by_format(plan: list[LayerPlan]) -> dict[str, tuple[int, int, int, int]]:
    """For each format in the plan: (layers, parameters, bytes in the checkpoint, bytes in the bundle)."""
    table: dict[str, tuple[int, int, int, int]] = {}
    for entry in plan:
        layers, parameters, before, after = table.get(entry.format, (0, 0, 0, 0))
        table[entry.format] = (
            layers + 1,
            parameters + entry.parameters,
            before + entry.source_bytes,
            after + entry.bytes_after,
        )
    return table
