"""The precision schedule over steps: which steps leave the inputs of some layers as they are, and the plans that then hold.

Weights are the same at every step. A layer whose format has a twin with the same weights and inputs that are not rounded
(Format.weights_alone) computes in that twin at the steps of a rule that names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fluxc.base.errors import RecipeError
from fluxc.formats.registry import FORMATS
from fluxc.quantize.patterns import matching
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.faults import Collected
from fluxc.recipe.structs import Precision, StepRule
from fluxrt.stepprecision import BODY, Body, StepPrecision

EXACT = f"{BODY}-exact"
"""The body of the first rule; those of rules for other layers have a number behind it."""
FIELD = "precision.steps"
AUTO_SHARE = 0.5
"""The part that `auto` takes away of the squared error that rounded inputs add."""


def rules_of(precision: Precision) -> tuple[StepRule, ...]:
    """The rules of a recipe; `auto` is one that leaves the number of steps open."""
    return (StepRule(),) if precision.steps == "auto" else precision.steps


def measures_steps(precision: Precision) -> bool:
    """Whether a rule leaves it to a measurement which steps it is for."""
    return any(rule.is_measured for rule in rules_of(precision))


def bodies_of(precision: Precision) -> dict[str, tuple[str, ...]]:
    """The bodies beside `body` that a recipe asks for, and the patterns of layers whose inputs they do not round."""
    patterns = dict.fromkeys(rule.layers for rule in rules_of(precision))
    return {EXACT if number == 1 else f"{EXACT}{number}": layers for number, layers in enumerate(patterns, start=1)}


def body_plans(precision: Precision, plan: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """By body the transformer's plan as it is at the steps that run it; fusion groups change as a whole."""
    return {body: _with_exact_inputs(plan, layers) for body, layers in bodies_of(precision).items()}


def check_steps(precision: Precision, plan: Sequence[LayerPlan]) -> None:
    """Refuse patterns that match no layer, and layers whose inputs are not rounded anyway: RecipeError."""
    collected = Collected()
    names = [entry.layer.name for entry in plan]
    for number, rule in enumerate(rules_of(precision)):
        field = FIELD if precision.steps == "auto" else f"{FIELD}[{number}].layers"
        with collected.collecting():
            for at, pattern in enumerate(rule.layers):
                matching(pattern, names, field if precision.steps == "auto" else f"{field}[{at}]")
            _check_changes(rule, plan, field)
    collected.raise_all()


def _check_changes(rule: StepRule, plan: Sequence[LayerPlan], field: str) -> None:
    changed = [old for old, new in zip(plan, _with_exact_inputs(plan, rule.layers), strict=True) if old != new]
    if not changed:
        able = " and ".join(name for name, format in FORMATS.items() if format.weights_alone)
        raise RecipeError(
            f"{field}: none of these layers has rounded inputs that can be left as they are, so this would change nothing; "
            f"layers in {able} have"
        )
    if rule.is_measured and not to_quantize(changed):
        raise RecipeError(
            f"{field}: which steps are worst is measured on layers that this build quantizes, and the checkpoint holds these "
            "quantized already; give first, last or at"
        )


def schedule_of(
    precision: Precision, plan: Sequence[LayerPlan], steps: int, gains: Mapping[str, Sequence[float]] | None = None
) -> StepPrecision | None:
    """Which body each of `steps` steps runs, where `plan` is the transformer's: the first rule that has a step decides. None
    where all run the same.

    `gains` holds by body how much of the squared error of every step goes away with it: a rule that leaves its steps open takes
    those of the largest gains among the steps that no rule before it has, and none without a gain.
    """
    of_layers = {layers: body for body, layers in bodies_of(precision).items()}
    taken: dict[int, str] = {}
    for rule in rules_of(precision):
        body = of_layers[rule.layers]
        numbers: Iterable[int] = rule.numbers(steps)
        if rule.is_measured:
            assert gains is not None
            left = {step: gain for step, gain in enumerate(gains[body]) if step not in taken and gain > 0}
            numbers = _of_largest_gain(left, rule.worst)
        for number in numbers:
            taken.setdefault(number, body)
    found = {}
    for body, changed in body_plans(precision, plan).items():
        numbers = sorted(number for number, of in taken.items() if of == body)
        if numbers:
            layers = [new.layer.name for old, new in zip(plan, changed, strict=True) if old.format != new.format]
            found[body] = Body(tuple(numbers), tuple(layers))
    return StepPrecision(steps, found) if found else None


def _of_largest_gain(gains: Mapping[int, float], count: int | None) -> list[int]:
    """`count` steps, or the fewest whose gains add up to AUTO_SHARE of all."""
    ranked = sorted(gains, key=lambda step: (-gains[step], step))
    if count is None:
        reached = list(itertools.accumulate(gains[step] for step in ranked))
        count = next((at for at, sum in enumerate(reached, start=1) if sum >= AUTO_SHARE * reached[-1]), 0)
    return ranked[:count]


def _with_exact_inputs(plan: Sequence[LayerPlan], patterns: Sequence[str]) -> list[LayerPlan]:
    names = [entry.layer.name for entry in plan]
    wanted = {name for pattern in patterns for name in matching(pattern, names, FIELD)}
    groups = {entry.layer.group for entry in plan if entry.layer.name in wanted and entry.layer.group}
    return [
        replace(entry, format=FORMATS[entry.format].weights_alone)
        if (entry.layer.name in wanted or entry.layer.group in groups) and _has_twin(entry.format)
        else entry
        for entry in plan
    ]


def _has_twin(format: str) -> bool:
    return format in FORMATS and bool(FORMATS[format].weights_alone)
