"""What is wrong with a recipe comes in one report, in words, with the line or the --set of each; and nothing else comes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect
from ruamel.yaml import YAML

from conftest import RECIPE, ROOT
from fluxc.base.errors import RecipeError
from fluxc.formats.registry import FORMATS
from fluxc.quantize.presets import PRESETS
from fluxc.recipe import fields
from fluxc.recipe.conform import Conform, fields_of
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import Recipe
from fluxc.recipe.targets import TARGETS
from fluxc.recipe.words import flow
from fluxrt.request import Request

WRONG = """\
nam: a
model: {source: ../models/flux2-nano}
sizes:
  - [64, 64]
  - 96x64
sampling: {steps: 0, guidance: -2}
calibration: {prompts: 5}
fidelity: {prompts: held-out.txt, refrence: bfloat16}
precision:
  transformer: {default: nvfp5}
targets:
  - {kind: onnxruntime, device: gpu}
  - {kind: tensorrt, gpus: -1}
"""


def report_of(path: Path, *changes: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, changes)
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_all_faults_of_a_recipe_come_in_one_report_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    report = report_of(path, "gates.step_cosine=2", "step_cache={degree: 9}")
    assert report.splitlines() == [
        f"{path}: 11 things are wrong:",
        "  line 1: unknown field 'nam'; did you mean 'name'? The fields here are: name, model, sizes, calibration, fidelity, "
        "targets, batches, text, sampling, precision, vae, weights, step_cache, gates.",
        "  line 5: sizes[1]: must be a list of 2 whole numbers, got '96x64'; for example [[1024, 1024]]",
        "  line 6: sampling.steps: must be at least 1 and at most 1000, got 0",
        "  line 6: sampling.guidance: must be at least 0 and at most 1000, got -2",
        "  line 7: calibration.prompts: must be text, got 5; write it in quotes; for example prompts/natural-calibration.txt",
        "  line 8: unknown field 'fidelity.refrence'; did you mean 'reference'? The fields here are: prompts, level, "
        "max_prompts, steps, size, seed, reference, lpips, attribution, image_text.",
        "  line 10: precision.transformer.default: there is no format 'nvfp5'; did you mean 'nvfp4', "
        "'nvfp4-w4a16', 'fp8'? It can be nvfp4, nvfp4-w4a16, fp8, mxfp4, bf16",
        "  line 12: targets[0].device: 'gpu' is not possible; did you mean 'cpu'? It can be cpu, cuda",
        "  line 13: targets[1].gpus: must be at least 1, got -1",
        "  --set gates.step_cosine=2: gates.step_cosine: must be at least -1 and at most 1, got 2",
        "  --set step_cache={degree: 9}: step_cache.degree: must be at least 1 and at most 5, got 9",
    ]


def test_fields_that_do_not_go_together_are_in_the_same_report() -> None:
    report = report_of(
        RECIPE, "sampling.stepz=3", "calibration.algorithm=awq_lite", "precision.transformer.exclude=auto"
    )
    assert "--set sampling.stepz=3: unknown field 'sampling.stepz'; did you mean 'steps'" in report
    assert "calibration.algorithm: 'awq_lite' is modelopt's" in report
    assert "precision.transformer.budget: goes with `exclude: auto`" in report


def test_what_hangs_on_a_field_that_is_wrong_is_not_judged_by_another_value() -> None:
    report = report_of(RECIPE, "sampling.steps=none", "step_cache={skip: 900}")
    assert report.count("\n") == 0
    assert report.startswith("--set sampling.steps=none: sampling.steps: must be a whole number, got 'none'")


def test_one_fault_is_one_paragraph_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(RECIPE.read_text().replace("steps: 24", "steps: '24'"))
    assert re.fullmatch(
        rf"{path}, line \d+: sampling\.steps: must be a whole number, got '24'; for example 4", report_of(path)
    )


def test_a_change_of_one_entry_of_a_list_says_how_to_give_the_list() -> None:
    report = report_of(RECIPE, "targets[0].gpus=2")
    assert report.endswith("an entry of a list cannot be changed by itself; give the whole list, --set 'targets=[...]'")


def test_what_is_no_recipe_is_answered_with_what_to_do(tmp_path: Path, quick_bundle: Path) -> None:
    assert "is a checkpoint, not a recipe; `fluxc init " in report_of(ROOT / "models" / "flux2-nano")
    assert "is a bundle, which is built already; `fluxrt generate" in report_of(quick_bundle)
    assert "is a folder, not a recipe" in report_of(tmp_path)
    assert "if it is a model, `fluxc init black-forest-labs/FLUX.2-klein-4B` writes" in report_of(
        Path("black-forest-labs/FLUX.2-klein-4B")
    )
    assert "give one of recipes/; `fluxc init MODEL` writes a recipe" in report_of(tmp_path / "none.yaml")


def test_names_that_a_recipe_knows_are_those_that_there_are() -> None:
    assert set(fields.FORMATS) == {*FORMATS, "bf16"}
    assert set(fields.PRESETS) == set(PRESETS)


def test_what_a_recipe_allows_of_a_request_the_runtime_allows() -> None:
    Request("a", seed=fields.LARGEST_SEED, steps=fields.MOST_STEPS, guidance=float(fields.MOST_GUIDANCE))


def structs_of(kind: Any) -> list[type[msgspec.Struct]]:
    if isinstance(kind, inspect.StructType):
        return [kind.cls, *(s for field in kind.fields for s in structs_of(field.type))]
    parts = [getattr(kind, name) for name in ("type", "item_type") if hasattr(kind, name)]
    return [s for part in [*parts, *getattr(kind, "types", ())] for s in structs_of(part)]


STRUCTS = [
    *structs_of(inspect.type_info(Recipe)),
    *(s for kind in TARGETS.values() for s in structs_of(inspect.type_info(kind))),
]
STRUCTS = [struct for struct in dict.fromkeys(STRUCTS) if struct.__name__ != "Target"]
FIELDS = [(struct, field) for struct in STRUCTS for field in fields_of(struct)]


@pytest.mark.parametrize(("struct", "field"), FIELDS, ids=[f"{s.__name__}.{f.name}" for s, f in FIELDS])
def test_every_field_says_what_it_means_and_gives_values_it_can_have(struct: type[msgspec.Struct], field: Any) -> None:
    assert isinstance(field.type, inspect.Metadata)
    about = field.type.extra_json_schema
    assert about["description"]
    for example in about["examples"]:
        conform = Conform()
        conform.value(field.type, example, field.name)
        assert conform.faults == []
        assert YAML(typ="safe").load(flow(example)) == example


def paths_of(kind: type[msgspec.Struct], outer: str = "") -> list[str]:
    found = []
    for field in fields_of(kind):
        name = f"{outer}{field.name}"
        inner = [s for s in structs_of(field.type) if s.__name__ != "Target" and s in STRUCTS]
        found += [name, *(paths_of(inner[0], f"{name}.") if inner and "tuple" not in str(field.type).lower() else [])]
    return found


PATHS = paths_of(Recipe)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 5_000_000, 1.5, -0.0, 1e300, math.inf, math.nan]),
    st.sampled_from(
        ["", "auto", "max", "nvfp4", "96x64", "yes", "1:30", "~", "../models/flux2-nano", "\u2028", "a/b", "é"]
    ),
    st.text(max_size=8),
    st.floats(),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "gpus", "layer", "match", "format", "share", "x"]) | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def only_recipe_errors(*changes: str) -> None:
    try:
        load_recipe(RECIPE, changes)
    except RecipeError as error:
        text = str(error)
        assert text.strip() == text
        assert "\n\n" not in text
        for phrase in ("Expected `", "Object ", "at `$", "Traceback", "msgspec"):
            assert phrase not in text, text


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_in_any_field_is_taken_or_refused_in_words(path: str, value: Any) -> None:
    only_recipe_errors(f"{path}={flow(value)}")


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=30))
def test_any_text_after_set_is_taken_or_refused_in_words(text: str) -> None:
    only_recipe_errors(text)
    only_recipe_errors(f"sizes={text}")


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*TARGETS["tensorrt"].__struct_fields__, "kind", "device", "gpu"]), VALUES, max_size=4
    )
)
def test_any_target_is_taken_or_refused_in_words(options: dict[str, Any]) -> None:
    only_recipe_errors(f"targets=[{flow({'kind': 'tensorrt', **options})}]")
    only_recipe_errors(f"targets=[{flow(options)}]")
