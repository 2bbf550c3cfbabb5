"""The recipes in recipes/: each is planned on a checkpoint of the shapes it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conftest import NANO, NANO_DEV, ROOT, hollow_checkpoint, write_hollow
from fluxc.cli.main import main
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.published import DEV, KLEIN_4B, KLEIN_9B, MISTRAL_SMALL, QWEN3_4B, QWEN3_8B
from fluxc.recipe.load import load_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what a recipe's file name begins with: a checkpoint of that model's shapes."""
    folder = tmp_path_factory.mktemp("klein")
    found = {"flux2-nano-dev": NANO_DEV, "flux2-nano": NANO}
    for name, transformer, encoder, small, distilled in (
        ("klein-4b", KLEIN_4B, QWEN3_4B, NANO, {"is_distilled": True}),
        ("klein-9b", KLEIN_9B, QWEN3_8B, NANO, {"is_distilled": True}),
        ("klein-base-4b", KLEIN_4B, QWEN3_4B, NANO, {"is_distilled": False}),
        ("klein-base-9b", KLEIN_9B, QWEN3_8B, NANO, {"is_distilled": False}),
        ("dev", DEV, MISTRAL_SMALL, NANO_DEV, {}),
    ):
        root = found[f"flux2-{name}"] = hollow_checkpoint(folder / name, transformer, encoder, small)
        index = json.loads((root / "model_index.json").read_text())
        (root / "model_index.json").write_text(json.dumps(index | distilled))
        (root / "vae" / "config.json").write_text("{}")
        write_hollow(root / "vae" / "diffusion_pytorch_model.safetensors", Flux2VAE.read({}).tensors)
    return found


@pytest.mark.parametrize("recipe", ["flux2-dev-b200", "flux2-klein-4b-b200", "flux2-dev-rtx-5090"])
@pytest.mark.parametrize("tile", [None, "vae={tile: [1024, 1024]}"])
def test_a_range_up_to_four_megapixels_is_planned(recipe: str, tile: str | None, checkpoints: dict[str, Path]) -> None:
    """Portrait, landscape and square, in batches of 1 and 4; with tiles the decoder takes that of a quarter."""
    model = next(name for name in checkpoints if recipe.startswith(name))
    sizes = "sizes={min: [256, 256], max: [2048, 2048]}"
    changes = [f"model.source={checkpoints[model]}", sizes, "batches=[1, 4]", *([tile] if tile else [])]
    arguments = [word for change in changes for word in ("--set", change)]
    path = str(ROOT / "recipes" / f"{recipe}.yaml")
    result = CliRunner().invoke(main, ["plan", path, "--json", *arguments])
    too_little = re.search(r"GiB of (memory|disk)", result.stderr)
    assert result.exit_code == 0 or too_little, result.output
    plan = json.loads(result.stdout)
    assert plan["sampling"]["sizes"] == [[1024, 1024], [256, 256], [2048, 2048]]
    taken = [plan["sampling"]["at_once"][images] for images in ("1", "4")]
    assert all(3.5 < taken[1][part] / taken[0][part] < 4.01 for part in ("working", "buffers"))
    predicted = CliRunner().invoke(main, ["predict", path, "--on", "b200", "--gpus", "1", "--json", *arguments])
    found = json.loads(predicted.stdout)
    (one,), (four,) = found["gpus"], found["at_once"]
    assert four["images"] == 4
    assert 3.5 < four["step_seconds"] / one["step_seconds"] < 4
    working = one["first_rank_bytes"]["working"] / 2**30
    # bf16 activations of the decoder at 2048x2048, or at 1024x1024.
    assert working == pytest.approx(7.1 if tile is None else 1.8, abs=0.4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_plans_for_its_model(recipe: Path, checkpoints: dict[str, Path]) -> None:
    model = next(name for name in checkpoints if recipe.stem.startswith(name))
    result = CliRunner().invoke(main, ["plan", str(recipe), "--json", "--set", f"model.source={checkpoints[model]}"])
    # dev's comparison takes about what a machine of 24 GB has free, and its bundle and cache 80 GB of disk.
    too_little = "flux2-dev" in recipe.stem and re.search(r"GiB of (memory|disk)", result.stderr)
    assert result.exit_code == 0 or too_little, result.output
    plan = json.loads(result.stdout)
    four_bits = "mxfp4" if recipe.stem.endswith("mxfp4") else "nvfp4"
    assert plan["formats"]["transformer"][four_bits]["share"] > 0.8
    if four_bits == "mxfp4":
        # Its inputs have no scales.
        assert plan["input_scales"] is None
        return
    scales = plan["input_scales"]
    measured = (16, 24, [64, 64]) if "nano" in model else (4, 4, [256, 256])
    assert (scales["prompts"], scales["steps"], scales["size"]) == measured
    assert scales["margins"]["nvfp4"] == 8
    assert scales["ranges"] == {}
    for target, shares in plan["ranks"].items():
        assert {share["ranks"] for share in shares} == {int(target.rpartition("-")[2].removesuffix("gpus"))}
        assert all(share["padding"] == 0 for share in shares)
    if recipe.stem.endswith("b200"):
        assert list(plan["ranks"]) == ["tensorrt-2gpus", "tensorrt-4gpus", "tensorrt-8gpus"]


def test_the_budget_of_dev_is_said_whole(checkpoints: dict[str, Path]) -> None:
    """18 GiB of transformer and of text encoder, calibrated layer by layer in a third of a machine with 24 GB."""
    recipe, options = ROOT / "recipes" / "flux2-dev-b200.yaml", ["--memory", "14GiB"]
    options += ["--set", f"model.source={checkpoints['flux2-dev']}"]
    result = CliRunner().invoke(main, ["plan", str(recipe), "--json", *options])
    plan = json.loads(result.stdout)
    stages = {stage["name"]: stage for stage in plan["budget"]["stages"]}
    assert stages["calibrate"]["runs"] == "layer by layer"
    assert stages["calibrate"]["memory_bytes"] < 9 << 30
    assert stages["weights-transformer"]["disk_bytes"] == pytest.approx(17.97 * 2**30, rel=0.01)
    assert stages["weights-text_encoder"]["disk_bytes"] == pytest.approx(17.81 * 2**30, rel=0.01)
    assert result.exit_code == 1
    assert "stage compare needs" in result.stderr


def test_klein_without_calibration_is_planned_with_published_ranges(checkpoints: dict[str, Path]) -> None:
    recipe, options = ROOT / "recipes" / "flux2-klein-4b.yaml", ["--set", "calibration={engine: none}"]
    options += ["--set", f"model.source={checkpoints['flux2-klein-4b']}"]
    result = CliRunner().invoke(main, ["plan", str(recipe), "--json", *options])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    scales = plan["input_scales"]
    assert (scales["engine"], scales["prompts"], scales["size"]) == ("none", None, None)
    assert scales["ranges"]["transformer"]["transformer_blocks.4.attn.to_q"] == 8 * 49.75
    assert scales["ranges"]["transformer"]["single_transformer_blocks.19.attn.to_qkv_mlp_proj"] == 8 * 14.5625
    assert set(scales["ranges"]["text_encoder"].values()) == {4096}
    assert next(stage["result"] for stage in plan["stages"] if stage["name"] == "calibrate") == "nothing to do"
    result = CliRunner().invoke(main, ["plan", str(recipe), "--no-layers", *options], terminal_width=200)
    assert "no model is run: a published range times 8 where a layer's kind has one, otherwise 4096" in result.output


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_prompt_is_both_calibrated_on_and_held_out(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    fields: dict[str, Any] = {"calibration": loaded.recipe.calibration, "fidelity": loaded.recipe.fidelity}
    calibrated, held_out = (set(loaded.prompts(name, field.prompts)) for name, field in fields.items())
    assert not calibrated & held_out
    assert min(len(calibrated), len(held_out)) >= 8
