"""`fluxc init` and `fluxc schema`: every recipe that it can write loads, is valid by the schema, and plans for its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from conftest import NANO, ROOT, copy_checkpoint
from fluxc.cli.main import main
from fluxc.predict.gpus import GPUS
from fluxc.recipe.load import load_recipe
from fluxc.recipe.reference import written_anew
from fluxc.recipe.schema import FILE, recipe_schema, schema_text
from hub_server import Repository, served
from test_recipes import checkpoints

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
__all__ = ["checkpoints"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def init(*arguments: object) -> str:
    result = invoke("init", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def plain(path: Path) -> Any:
    return YAML(typ="safe").load(path)


MATRIX = [
    (model, on, gpus)
    for model in ("flux2-nano", "klein-4b", "klein-9b")
    for on in ("cpu", *GPUS)
    for gpus in ((1, 2) if on in ("cpu", "h100", "b200", "rtx-5090") else (1,))
]
"""Recipes for GPUs of one generation differ in a number alone; those for two of them are tried with one of each."""


@pytest.mark.parametrize(("model", "on", "gpus"), MATRIX)
def test_every_recipe_that_it_writes_plans(
    model: str, on: str, gpus: int, here: Path, checkpoints: dict[str, Path]
) -> None:
    said = init(model, "--for", on, "--gpus", gpus)
    (recipe,) = here.glob("*.yaml")
    jsonschema.validate(plain(recipe), recipe_schema())
    assert recipe.read_text().startswith(f"# yaml-language-server: $schema={FILE}\n")
    assert (here / FILE).read_text() == schema_text()
    for command in ("plan", "build"):
        assert f"fluxc {command} {recipe.name}\n" in said
    assert ("fluxc finish" in said) == (on != "cpu" and not on.startswith("rtx"))
    source = checkpoints[model if model in checkpoints else f"flux2-{model}"]
    planned = invoke("plan", recipe, "--json", "--set", f"model.source={source}")
    assert planned.exit_code == 0, planned.stderr
    plan = json.loads(planned.stdout)
    kinds = {target.partition("-")[0] for target in plan["targets"]}
    expected = {"cpu": set(), "rtx": {"tensorrt_rtx"}}.get(on.partition("-")[0], {"tensorrt"})
    assert kinds == {"onnxruntime", *expected}
    assert [plan["ranks"][target][0]["ranks"] for target in plan["ranks"]] == ([gpus] if gpus > 1 else [])
    formats = plan["formats"]["transformer"]
    assert formats["fp8" if on in ("h100", "h200") else "nvfp4"]["share"] > 0.8


def test_flux2_nanos_recipe_is_the_one_of_the_repository(here: Path) -> None:
    init()
    ours, theirs = (
        msgspec.to_builtins(load_recipe(path).recipe)
        for path in (here / "flux2-nano.yaml", ROOT / "recipes" / "flux2-nano.yaml")
    )
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ <= {"name", "model", "precision", "targets"}
    loaded = load_recipe(here / "flux2-nano.yaml")
    assert (loaded.folder / loaded.recipe.model.source).resolve() == NANO.resolve()


def test_a_local_folder_is_recognized_and_named_from_where_the_recipe_is(
    here: Path, checkpoints: dict[str, Path]
) -> None:
    copy_checkpoint(here / "My Nano")
    init("My Nano", "--out", "recipes/mine.yaml")
    assert plain(here / "recipes" / "mine.yaml")["model"] == {"source": "../My Nano"}
    assert load_recipe(here / "recipes" / "mine.yaml").recipe.sampling.steps == 24
    init(checkpoints["flux2-klein-4b"], "--for", "rtx-5090")
    sampling = plain(here / "klein-4b-rtx-5090.yaml")["sampling"]
    assert sampling == {"steps": 4, "guidance": 1.0}


def test_a_model_that_is_not_distilled_takes_many_steps(here: Path, checkpoints: dict[str, Path]) -> None:
    base = here / "klein-base"
    base.mkdir()
    for entry in checkpoints["flux2-klein-4b"].iterdir():
        (base / entry.name).symlink_to(entry)
    (base / "model_index.json").unlink()
    index = json.loads((checkpoints["flux2-klein-4b"] / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    init("klein-base")
    assert plain(here / "klein-base.yaml")["sampling"] == {"steps": 50, "guidance": 4.0}


def test_dev_is_started_from_with_one_pass_a_step(here: Path) -> None:
    init("dev", "--for", "b200", "--gpus", "4")
    text = (here / "flux2-dev-b200.yaml").read_text()
    assert "The scale of the guidance is an input of this transformer: one pass a step." in text
    recipe = plain(here / "flux2-dev-b200.yaml")
    assert recipe["model"] == {"source": "black-forest-labs/FLUX.2-dev"}
    assert recipe["sampling"] == {"steps": 50, "guidance": 4.0}
    assert [target.get("gpus", 1) for target in recipe["targets"]] == [1, 4, 1]
    assert (recipe["sizes"], recipe["fidelity"]["size"]) == ([[1024, 1024], [256, 256]], [256, 256])
    init("flux2-nano-dev")
    assert plain(here / "flux2-nano-dev.yaml")["text"] == {"length": 64}


def test_a_bundle_is_started_from_as_it_is_quantized(here: Path, quick_bundle: Path) -> None:
    init(quick_bundle, "--out", "again.yaml")
    assert plain(here / "again.yaml")["precision"] == {"transformer": {"default": "bf16"}}
    planned = invoke("plan", "again.yaml", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["formats"]["transformer"]["nvfp4"]["layers"] == 36


def test_a_hub_id_is_known_or_its_configs_are_fetched(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init("black-forest-labs/FLUX.2-klein-9B")
    assert plain(here / "flux2-klein-9b.yaml")["model"] == {"source": "black-forest-labs/FLUX.2-klein-9B"}
    with served(monkeypatch, here / "cache") as hub:
        hub.repositories["someone/Nano-2"] = Repository.of(copy_checkpoint(here / "nano"))
        init("someone/Nano-2")
    assert plain(here / "nano-2.yaml")["model"] == {"source": "someone/Nano-2"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["klien-4b"], "did you mean 'klein-4b'"),
        (["."], "there is no model_index.json"),
        (["mine.yaml"], "names a recipe"),
        (["klein-4b", "--for", "rtx-4090"], "'rtx-4090' is not one of"),
        (["klein-4b", "--gpus", "0"], "0 is not in the range"),
        (["klein-4b", "--gpus", "-1"], "-1 is not in the range"),
        (["klein-4b", "--for", "b200", "--gpus", "5"], "--gpus: among 5 GPUs the 24 attention heads cannot be shared"),
        (["klein-4b", "--out", "/proc/none/x.yaml"], "no file can be made in this folder"),
        (["klein-4b", "--out", "file"], "file: exists already, and is not overwritten"),
    ],
)
def test_what_it_cannot_start_from_is_refused_and_nothing_written(arguments: list[str], said: str, here: Path) -> None:
    (here / "file").write_text("mine")
    result = invoke("init", *arguments)
    assert result.exit_code == (1 if said.startswith("no file can") else 2), result.output
    assert said in " ".join(result.stderr.split())
    assert [path.name for path in here.rglob("*")] == ["file"]
    assert (here / "file").read_text() == "mine"


def test_it_overwrites_nothing(here: Path) -> None:
    init("klein-4b")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert invoke("init", "klein-4b").exit_code == 2
    prompts = here / "prompts" / "natural-held-out.txt"
    prompts.write_text("mine\n")
    other = invoke("init", "klein-9b")
    assert other.exit_code == 2
    assert "natural-held-out.txt: exists already with other prompts" in other.stderr
    assert prompts.read_text() == "mine\n"
    prompts.write_bytes(before[prompts])
    init("klein-9b")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_flux2_nano_is_asked_for_where_there_is_no_repository(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fluxc

    monkeypatch.setattr(fluxc, "__file__", str(here / "site-packages" / "fluxc" / "__init__.py"))
    result = invoke("init")
    assert result.exit_code == 2
    assert "is part of fluxc's repository, which this fluxc was not installed from" in result.stderr


def test_prompts_that_it_writes_are_those_of_the_recipes() -> None:
    for path in (ROOT / "fluxc" / "build" / "prompts").iterdir():
        assert path.read_bytes() == (ROOT / "recipes" / "prompts" / path.name).read_bytes()


def test_the_schema_is_printed_and_kept_beside_the_recipes() -> None:
    result = invoke("schema")
    assert result.exit_code == 0
    assert result.stdout == (ROOT / "recipes" / FILE).read_text(), "run `fluxc schema > recipes/recipe.schema.json`"
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_by_the_schema_and_name_it(recipe: Path) -> None:
    jsonschema.validate(plain(recipe), recipe_schema())
    first = recipe.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (recipe.parent / first.partition("=")[2]).samefile(ROOT / "recipes" / FILE)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": ["96x64"]},
        {"sizes": []},
        {"sampling": {"steps": 0}},
        {"sampling": {"guidance": -1}},
        {"gatez": {}},
        {"targets": [{"kind": "onnxruntime", "memory_gib": 8}]},
        {"targets": [{"kind": "tensorrt", "gpus": -1}]},
        {"targets": [{}]},
        {"precision": {"transformer": {"default": "nvfp5"}}},
    ],
)
def test_the_schema_refuses_what_loading_refuses(change: dict[str, Any], tmp_path: Path) -> None:
    recipe = plain(ROOT / "recipes" / "flux2-nano.yaml") | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, recipe_schema())
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert invoke("plan", path).exit_code == 2


def test_the_schema_takes_short_forms() -> None:
    allow = [
        {"kind": "tensorrt", "allow": ["proj_out", {"layer": "*", "kind": "copy"}]},
        {"kind": "visual_gen", "gpus": 2},
    ]
    jsonschema.validate(plain(ROOT / "recipes" / "flux2-nano.yaml") | {"targets": allow}, recipe_schema())


def test_the_tables_of_the_documentation_are_current() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text()
    assert written_anew(page) == page, "run `python -m fluxc.recipe.reference docs/recipe.md`"
    assert page.count("<!-- fields:") == page.count("<!-- end -->") == 23


PLAN_FIELDS = [
    "name",
    "family",
    "commits",
    "downloads",
    "presets",
    "precision",
    "formats",
    "widened",
    "input_scales",
    "weights_bytes",
    "targets",
    "ranks",
    "sampling",
    "stages",
    "budget",
    "unused",
    "lacking_here",
]
PREDICTION_FIELDS = [
    "predicted",
    "model",
    "gpu",
    "size",
    "steps",
    "skipped",
    "efficiency",
    "gpus",
    "at_once",
    "impossible",
    "points",
    "teacache_steps_implied",
]


def test_json_for_scripts_has_the_fields_that_are_documented(here: Path) -> None:
    plan = json.loads(invoke("plan", ROOT / "recipes" / "flux2-nano.yaml", "--json").stdout)
    assert list(plan) == PLAN_FIELDS
    page = (ROOT / "docs" / "recipe.md").read_text()
    assert all(f"`{name}`" in page for name in PLAN_FIELDS)
    stage = plan["stages"][0]
    assert (list(stage), stage["part"]) == (["name", "part", "result"], "graphs")
    (alone,) = plan["sampling"].pop("at_once").items()
    assert (alone[0], set(alone[1])) == ("1", {"working", "buffers"})
    assert plan["sampling"] == {
        "sizes": [[64, 64]],
        "text_length": 32,
        "steps": 24,
        "guidance": 1.5,
        "passes": 2,
        "tiles": None,
    }
    prediction = json.loads(invoke("predict", "--on", "b300", "--gpus", "1", "--json").stdout)
    assert list(prediction) == PREDICTION_FIELDS
    page = (ROOT / "docs" / "multi-gpu.md").read_text()
    assert all(f"`{name}`" in page for name in PREDICTION_FIELDS)
