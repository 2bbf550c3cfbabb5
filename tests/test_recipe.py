"""Reading recipes: errors name the file, the field and the nearest valid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import RECIPE, ROOT
from fluxc.base.errors import RecipeError
from fluxc.build.job import open_job
from fluxc.recipe.load import load_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.prompts("calibration.prompts", loaded.recipe.calibration.prompts)
    assert loaded.prompts("fidelity.prompts", loaded.recipe.fidelity.prompts)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("precison={}", r"unknown field 'precison'; did you mean 'precision'"),
        ("precision.transformer.keep=[a]", r"the field 'precision\.transformer\.keep' is called 'exclude' now"),
        ("step_cache={longest_run: 2}", r"'step_cache\.longest_run' is called 'max_consecutive_skips' now"),
        ("step_cache={elsewhere: warn}", r"'step_cache\.elsewhere' is called 'on_mismatch' now"),
        ("precision.transformer.exclud=[a]", r"unknown field 'precision\.transformer\.exclud'; did you mean 'exclude'"),
        ("targets=[{kind: onnxruntime, activation: none}]", r"'targets\[0\]\.activation'; did you mean 'activations'"),
        (
            "precision.transformer.rules=[{mtch: a, format: fp8}]",
            r"'precision\.transformer\.rules\.mtch'; did you mean 'match'",
        ),
        ("sampling.steps=many", r"Expected `int`, got `str` - at `sampling\.steps`"),
        ("sampling.steps=0", r"sampling\.steps: must be at least 1"),
        ("sizes=[]", r"sizes: give at least one"),
        ("sizes=[[64]]", r"at `sizes\[0\]`"),
        ("calibration.size=[32, 32]", r"calibration\.size: \[32, 32\] is not one of sizes"),
        ("targets=[]", r"targets: give at least one"),
        ("targets=[{kind: onnxruntime}, {kind: onnxruntime}]", r"targets: 'onnxruntime' appears twice"),
        ("name=a/b", r"name: 'a/b' becomes a folder name"),
        (
            "targets=[{kind: tensorrt_rtx}, {kind: tensorrt, activations: none}]",
            r"targets\[1\]\.activations: a target of kind tensorrt has no such option, those of kind onnxruntime have\. Its "
            r"options are: gpus, compute_capabilities, ",
        ),
        (
            "targets=[{kind: onnxruntime, memory_gib: 8}]",
            r"targets\[0\]\.memory_gib: .* no such option, those of kind tensorrt_rtx and tensorrt have",
        ),
        (
            "targets=[{kind: visual_gen, dtype: float16}]",
            r"kind visual_gen has no such option, those of kind onnxruntime",
        ),
        (
            "targets=[{kind: tensorrt, memory_gib: much}]",
            r"Expected `float`, got `str` - at `targets\[0\]\.memory_gib`",
        ),
        (
            "targets=[{kind: tensorrt, compute_capabilities: []}]",
            r"compute_capabilities: give at least one, or leave it",
        ),
        ("targets=[{kind: tensorrt, allow: [{layr: a}]}]", r"'targets\[0\]\.allow\.layr'; did you mean 'layer'"),
        ("targets=[{gpus: 2}]", r"targets\[0\]\.kind: say what kind of target it is\. It can be onnxruntime, "),
        ("targets=[{kind: [a]}]", r"targets\[0\]\.kind: \['a'\] is not possible\. It can be onnxruntime, "),
        ("targets=[onnxruntime]", r"Expected `object`, got `str` - at `targets\[0\]`"),
        ("targets=onnxruntime", r"Expected `array`, got `str` - at `targets`"),
        ("nonsense", r"write it as field\.sub_field=value"),
        ("name.first=a", r"'name' is not a mapping"),
    ],
)
def test_a_wrong_field_is_named(change: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected) as raised:
        load_recipe(RECIPE, (change,))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("precision.transformer.default=int4", r"precision\.transformer\.default: there is no format 'int4'"),
        (
            "precision.transformer.preset=nvidia_blog",
            r"precision\.transformer\.preset: there is no preset 'nvidia_blog'; did you mean 'nvidia-blog'\?.*trtllm-auto",
        ),
        (
            "precision.text_encoder.preset=nvidia-blog",
            r"precision\.text_encoder\.preset: .*'nvidia-blog' names layers of the transformer, not of the text_encoder",
        ),
        (
            "precision.transformer.rules=[{match: '*.to_q', format: int3}]",
            r"transformer\.rules\[0\]\.format: there is no format 'int3'.* It can be nvfp4, fp8, mxfp4, bf16",
        ),
    ],
)
def test_a_format_or_preset_that_there_is_not_is_named_before_any_work(change: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected) as raised:
        open_job(load_recipe(RECIPE, (change,)), ROOT / "unused")
    assert raised.value.exit_code == 2


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\n")
    with pytest.raises(RecipeError, match="missing required field `model`"):
        load_recipe(path)


def test_a_field_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(RecipeError, match="'name' appears twice"):
        load_recipe(path)


def test_a_file_that_is_not_yaml_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(path)
    path.write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)
    path.write_text("- a")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(path)


def test_prompt_files_must_hold_prompts(tmp_path: Path) -> None:
    loaded = load_recipe(RECIPE, (f"calibration.prompts={tmp_path / 'none.txt'}",))
    with pytest.raises(RecipeError, match=r"calibration\.prompts: cannot read"):
        loaded.prompts("calibration.prompts", loaded.recipe.calibration.prompts)
    (tmp_path / "none.txt").write_text("# only a comment\n\n")
    with pytest.raises(RecipeError, match="holds no prompts"):
        loaded.prompts("calibration.prompts", loaded.recipe.calibration.prompts)


def test_changes_replace_fields() -> None:
    loaded = load_recipe(RECIPE, ("sampling.steps=7", "precision.text_encoder.default=fp8"))
    assert loaded.recipe.sampling.steps == 7
    assert loaded.recipe.precision.text_encoder.default == "fp8"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "precision.transformer.scales=four-over-five",
            r"'four-over-five' is not possible; did you mean 'four-over-six'\?",
        ),
        (
            "precision.transformer.exclude=automatic",
            r"exclude: 'automatic' is not possible.* It can be auto, or a list",
        ),
        (
            "targets=[{kind: onnxruntim}]",
            r"targets\[0\]\.kind: 'onnxruntim' is not possible; did you mean 'onnxruntime'",
        ),
    ],
)
def test_a_word_that_is_not_possible_is_refused_with_those_that_are(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(RECIPE, (change,))
