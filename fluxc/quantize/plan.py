"""The precision plan: every Linear with its format and the rule that decided it.

1. A layer that a `keep` pattern matches stays bf16, and so does one that `keep: auto` chose.
2. Otherwise the first of `rules` that matches decides.
3. Otherwise a layer that `preset` keeps stays bf16.
4. Otherwise `default` does.
5. A decision for one member of a fusion group holds for the whole group (in the order above, earlier before later), and the
   rule says that it was widened.
6. A pattern that matches no layer is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxc.checkpoint.flux2 import Linear
from fluxc.errors import RecipeError
from fluxc.quantize.formats import BLOCK, stored_bytes
from fluxc.quantize.patterns import matching
from fluxc.quantize.presets import find_preset, kept_by
from fluxc.recipe import ComponentPrecision

WIDENED = ", widened to the fusion group"


@dataclass(frozen=True)
class LayerPlan:
    """One Linear, its format, and why.

    `widened`: the rule matched another member of its fusion group. `quantized_in_source`: the checkpoint holds it in this
    format already, and its tensors are copied.
    """

    component: str
    layer: Linear
    format: str
    rule: str
    source_bytes: int
    widened: bool = False
    quantized_in_source: bool = False

    @property
    def parameters(self) -> int:
        return self.layer.out_features * self.layer.in_features

    @property
    def bytes_after(self) -> int:
        """Bytes of the layer's tensors in the bundle; a layer that is kept is copied as it lies in the checkpoint."""
        copied = self.format == "bf16" or self.quantized_in_source
        return self.source_bytes if copied else stored_bytes(self.format, self.parameters)


def precision_plan(
    component: str,
    layers: list[Linear],
    precision: ComponentPrecision,
    source_bytes: dict[str, int] | None = None,
    chosen_by_auto: dict[str, str] | None = None,
) -> list[LayerPlan]:
    """The plan of one component, in the order of `layers`; `source_bytes` holds their bytes in the checkpoint (else bf16).

    `chosen_by_auto` is what `keep: auto` came to: layer to the reason; without it, the plan is that of keeping nothing.
    Raises RecipeError for a pattern that matches nothing and for a format a layer's shape cannot have.
    """
    field = f"precision.{component}"
    names = [layer.name for layer in layers]
    decisions: list[tuple[str, str, set[str]]] = [
        ("bf16", f"keep {pattern!r}", set(matching(pattern, names, f"{field}.keep[{i}]")))
        for i, pattern in enumerate(() if precision.keep == "auto" else precision.keep)
    ]
    decisions += [("bf16", f"keep auto: {reason}", {name}) for name, reason in (chosen_by_auto or {}).items()]
    decisions += [
        (rule.format, f"rule {rule.match!r}", set(matching(rule.match, names, f"{field}.rules[{i}].match")))
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
        chosen: str = precision.default
        rule = "default"
        widened = False
        for wanted, label, matched in decisions:
            if matched.intersection(group):
                chosen = wanted
                widened = layer.name not in matched
                rule = f"{label}{WIDENED}" if widened else label
                break
        if chosen == "nvfp4" and layer.in_features % BLOCK:
            raise RecipeError(
                f"{field}: {layer.name} has {layer.in_features} inputs, not a multiple of {BLOCK}, so it cannot be "
                f"nvfp4; add {layer.name!r} to {field}.keep"
            )
        bf16_bytes = 2 * layer.out_features * layer.in_features
        in_source = (source_bytes or {}).get(layer.name, bf16_bytes)
        plan.append(LayerPlan(component, layer, chosen, rule, in_source, widened))
    return plan


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
