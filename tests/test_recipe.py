"""Reading recipes: errors name the file, the field and the nearest valid one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import NANO, RECIPE, ROOT
from fluxc.base.errors import RecipeError
from fluxc.build.bundle_writer import resolved_recipe
from fluxc.build.job import open_job
from fluxc.recipe.document import read_document
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
            r"'precision\.transformer\.rules\[0\]\.mtch'; did you mean 'match'",
        ),
        ("sampling.steps=many", r"sampling\.steps: must be a whole number, got 'many'; for example 4$"),
        ("sampling.steps=0", r"sampling\.steps: must be at least 1"),
        ("sizes=[]", r"sizes: give at least one"),
        ("sizes=[[64]]", r"sizes\[0\]: must be a list of 2 whole numbers, got 1 of them"),
        ("fidelity.size=[32, 32]", r"fidelity\.size: \[32, 32\] is not one of sizes"),
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
            r"targets\[0\]\.memory_gib: must be a number, got 'much'",
        ),
        (
            "targets=[{kind: tensorrt, compute_capabilities: []}]",
            r"compute_capabilities: give at least one; for example",
        ),
        (
            "targets=[{kind: tensorrt, compute_capabilities: [12.0]}]",
            r"compute_capabilities\[0\]: must be text, got 12\.0; write it in quotes; for example \[\"12\.0\"\]",
        ),
        ("targets=[{kind: tensorrt, allow: [{layr: a}]}]", r"'targets\[0\]\.allow\[0\]\.layr'; did you mean 'layer'"),
        ("targets=[{gpus: 2}]", r"targets\[0\]\.kind: say what kind of target it is\. It can be onnxruntime, "),
        ("targets=[{kind: [a]}]", r"targets\[0\]\.kind: \[a\] is not possible\. It can be onnxruntime, "),
        (
            "targets=[onnxruntime]",
            r"targets\[0\]: must be a mapping of fields, got 'onnxruntime'; for example \[\{kind: onnxruntime\}\]",
        ),
        ("targets=onnxruntime", r"targets: must be a list of mappings of fields, got 'onnxruntime'"),
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
            r"transformer\.rules\[0\]\.format: there is no format 'int3'.* It can be nvfp4, nvfp4-w4a16, fp8, mxfp4, bf16",
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
    with pytest.raises(
        RecipeError, match=r"\n  model: is missing, and required: the checkpoint; for example \{source: "
    ):
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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("sampling.guidance=.nan", r"sampling\.guidance: must be a finite number, got \.nan$"),
        ("sampling={guidance: .inf}", r"sampling\.guidance: must be a finite number"),
        ("sampling.guidance=-1", r"sampling\.guidance: must be at least 0"),
        ("sampling.guidance=1e999", r"sampling\.guidance: must be a finite number"),
        ("calibration.guidance=1e9", r"calibration\.guidance: must be at least 0 and at most 1000"),
        ("calibration.seed=-1", r"calibration\.seed: must be at least 0"),
        ("fidelity.seed=-5", r"fidelity\.seed: must be at least 0, got -5"),
        (f"fidelity.seed={1 << 64}", r"fidelity\.seed: 18446744073709551616 has more than 64 bits"),
        ("sampling.steps=100000", r"sampling\.steps: must be at least 1 and at most 1000"),
        ("sizes=[[64, -64]]", r"sizes\[0\]\[1\]: must be at least 1 and at most 16384, got -64"),
        ("sizes=[[1048576, 64]]", r"sizes\[0\]\[0\]: must be at least 1 and at most 16384, got 1048576"),
        ("text.length=1000000", r"text\.length: must be at least 1 and at most"),
        ("weights.shard_gib=1e-12", r"weights\.shard_gib: must be at least 9\.53674e-07, got 1e-12"),
        ("gates.step_cosine=1.5", r"gates\.step_cosine: must be at least -1 and at most 1, got 1\.5"),
        ("gates.image_psnr_db=200", r"gates\.image_psnr_db: must be at most 120, got 200"),
        ("step_cache={max_error: .inf}", r"step_cache\.max_error: must be a finite number"),
        ("step_cache={min_r2: 2}", r"step_cache\.min_r2: must be at most 1"),
        (f"name={'a' * 300}", r"name: 'a+'\.\.\. becomes a folder name; use at most 200"),
        (f"calibration.prompts={'a' * 300}", r"calibration\.prompts: no file has so long a name"),
        ("model.source=''", r"model\.source: is empty"),
        ('model.source="a\\0b"', r"model\.source: 'a\\x00b' holds a control character"),
        ("targets=[{kind: tensorrt, memory_gib: .inf}]", r"targets\[0\]\.memory_gib: must be a finite number"),
    ],
)
def test_a_number_or_word_that_no_build_could_use_is_refused(change: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(RECIPE, (change,))


def test_too_few_steps_between_first_and_last_are_refused() -> None:
    changes = ("sampling.steps=20", "step_cache={first: 10, last: 10}")
    with pytest.raises(RecipeError, match=r"step_cache: first and last compute all of the 20 steps"):
        load_recipe(RECIPE, changes)


@pytest.mark.parametrize("field", ["calibration", "fidelity"])
def test_the_seed_of_the_last_prompt_has_64_bits_too(field: str) -> None:
    loaded = load_recipe(RECIPE, (f"{field}.seed={(1 << 64) - 2}",))
    with pytest.raises(RecipeError, match=rf"{field}\.seed: \d+ prompts start from the seeds .* less than 2\^64"):
        open_job(loaded, ROOT / "unused")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("010", 10),
        ("0o10", 8),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("2026-01-01", "2026-01-01"),
        ("[&a x, *a]", ["x", "x"]),
        ("~", None),
        ("", None),
    ],
)
def test_a_document_is_yaml_1_2(text: str, value: object) -> None:
    assert read_document(text) == value
    assert type(read_document(text)) is type(value)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("? [a]\n: 1", r"a list cannot be the name of a field \(line 1, column 3\)"),
        ("? {a: b}\n: 1", "a mapping cannot be the name of a field"),
        ("1: 2", "'1' cannot be the name of a field, which is a word"),
        ("a: &x {b: 1}\nc: {<<: *x}", r"`<<` \(a merge key\) is not YAML 1\.2; write the fields out \(line 2"),
        ("a: 1\nb: {c: 1, c: 2}", r"the field 'c' appears twice \(line 2, column 11\)"),
        ("a: !!python/object:os.system x", "a tag .* means nothing in a recipe"),
        ("%YAML 1.1\n---\na: yes", "recipes are YAML 1.2"),
        ("a: 1\n---\nb: 2", "not valid YAML: .*another document"),
        ("a: " + "[" * 5000, "nested more than 20 levels"),
        ("- " * 5000 + "a", "nested more than 20 levels"),
        (BOMB, "with its aliases written out it is more than 20,000 values"),
        ("a: &a [*a]", "with its aliases written out"),
        ("a: *b", "not valid YAML: found undefined alias 'b'"),
        ("a: b\x07", r"not valid YAML: the character '\\x07' \(line 1\)"),
        ('a: "\\ud800"', "a: .* holds a control character"),
        ("a: {b: [1, .nan]}", r"a\.b\[1\]: must be a finite number"),
        ("a: " + "9" * 400, "a: 9+ has more than 64 bits"),
        ("x" * (1 << 20) + "x", "too many to be a recipe"),
    ],
)
def test_a_document_that_could_mean_something_else_is_refused_where_it_stands(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read_document(text)


def test_steps_written_as_a_time_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(re.sub(r"steps: \d+", "steps: 1:30", RECIPE.read_text(), count=1))
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml, line \d+: sampling\.steps: must be a whole number, got '1:30'"
    ):
        load_recipe(path)


def test_prompts_start_after_a_byte_order_mark_and_comments_may_be_indented(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        b"\xef\xbb\xbf# a comment\r\n\xef\xbb\xbfa red circle\r\n   # another\n\ta blue ring \n" + "a\u2028b\n".encode()
    )
    loaded = load_recipe(RECIPE, (f"calibration.prompts={path}",))
    assert loaded.prompts("calibration.prompts", str(path)) == ["a red circle", "a blue ring", "a\u2028b"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a red circle".encode("utf-16"), r"cannot read .*it is not UTF-8 text"),
        (b"a red\x00circle\n", r"line 1: holds the control character '\\x00'"),
        (b"", "holds no prompts"),
        (None, "is not a file; give a text file, one prompt a line"),
    ],
)
@pytest.mark.parametrize("field", ["calibration", "fidelity", "step_cache"])
def test_prompt_files_are_read_before_the_checkpoint(
    field: str, content: bytes | None, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    steps = ("sampling.steps=20", "step_cache={skip: auto}") if field == "step_cache" else ()
    loaded = load_recipe(RECIPE, (*steps, f"{field}.prompts={path}", "model.source=./none"))
    with pytest.raises(RecipeError, match=rf"{field}\.prompts: .*{expected}"):
        open_job(loaded, tmp_path)


def test_a_prompt_file_is_read_once(tmp_path: Path) -> None:
    """The bundle records the prompts it was made with, whatever became of the file since."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n")
    loaded = load_recipe(RECIPE, (f"fidelity.prompts={path}",))
    assert loaded.prompts("fidelity.prompts", str(path)) == ["a red circle"]
    path.write_text("a blue ring\n")
    assert resolved_recipe(loaded)["fidelity"]["prompts"] == ["a red circle"]


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "nano").symlink_to(NANO)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    loaded = load_recipe(RECIPE, ("model.source=~/nano", "fidelity.prompts=~/prompts.txt"))
    job = open_job(loaded, tmp_path)
    assert job.original.checkpoint.root == NANO.resolve()
    assert job.fidelity.prompts == ["a red circle"]
    with pytest.raises(RecipeError, match=r"fidelity\.prompts: ~nobody-here/a: .*write the whole path"):
        loaded.prompts("fidelity.prompts", "~nobody-here/a")


@pytest.mark.parametrize("field", ["calibration.file", "step_cache.trace"])
def test_given_measurements_are_read_before_the_checkpoint(field: str, tmp_path: Path) -> None:
    changes = ("sampling.steps=20", "step_cache={skip: auto}", f"{field}={tmp_path / 'none'}", "model.source=./none")
    with pytest.raises(RecipeError, match=r"none: there is no such (calibration|trace) file"):
        open_job(load_recipe(RECIPE, changes), tmp_path)


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
