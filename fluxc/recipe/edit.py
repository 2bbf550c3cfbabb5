"""Writes a recipe anew with other formats of layers, steps at which inputs are left as they are, and skipped steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from fluxc.base.output import write_complete
from fluxc.recipe.checks import OF_STEP_CACHE
from fluxc.recipe.document import read_document

WIDTH = 120


def write_with_formats(
    recipe: Path,
    changes: tuple[str, ...],
    formats: dict[str, str],
    out: Path,
    steps: Sequence[Mapping[str, Any]] = (),
    skip: int | None = None,
) -> None:
    """Write `out`: `recipe` with `changes` and with `formats` of layers as rules, which go before its own, with `steps` as
    `precision.steps`, and with a step cache that skips so many steps (0: with none; None: with its own). Everything else stays
    as it is written there, comments too. It appears when complete."""
    yaml = YAML()
    yaml.width = WIDTH
    data = yaml.load(recipe.read_text(encoding="utf-8-sig"))
    for change in changes:
        where, _, value = change.partition("=")
        *parents, last = where.split(".")
        place = data
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = CommentedMap()
            place = place[parent]
        place[last] = read_document(value, where)
    precision = data.setdefault("precision", CommentedMap()).setdefault("transformer", CommentedMap())
    rules = CommentedSeq()
    for layer, format in formats.items():
        rule = CommentedMap(match=layer, format=format)
        rule.fa.set_flow_style()
        rules.append(rule)
    # The first that matches counts; those of before still decide about layers that were not to be chosen.
    rules.extend(precision.get("rules") or ())
    precision["rules"] = rules
    for field in ("budget", *(("exclude",) if precision.get("exclude") == "auto" else ())):
        precision.pop(field, None)
    if steps:
        written = CommentedSeq(CommentedMap(rule) for rule in steps)
        for rule in written:
            rule.fa.set_flow_style()
        data["precision"]["steps"] = written
    if skip == 0:
        data.pop("step_cache", None)
        for field in OF_STEP_CACHE:
            part, _, name = field.partition(".")
            (data.get(part) or {}).pop(name, None)
    elif skip is not None:
        if data.get("step_cache") is None:
            data["step_cache"] = CommentedMap()
        data["step_cache"].pop("max_error", None)
        data["step_cache"]["skip"] = skip
    text = io.StringIO()
    yaml.dump(data, text)
    write_complete(out, text.getvalue())
