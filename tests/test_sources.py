"""Components from elsewhere than the checkpoint: files in either layout and folders; what reads them, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from bfl import transformer_in_bfl, vae_in_bfl, write
from conftest import NANO, RECIPE, compile_into, copy_checkpoint
from fluxc.checkpoint.source import open_checkpoint
from fluxc.cli.main import main
from fluxrt.bundle import open_bundle
from quick import QUICK

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """flux2-nano without weights."""
    folder = copy_checkpoint(tmp_path / "config-only")
    for file in (TRANSFORMER, VAE, ENCODER):
        (folder / file).unlink()
    return folder


@pytest.fixture
def singles(tmp_path: Path) -> dict[str, str]:
    """The weights of flux2-nano as one file each: transformer and VAE in Black Forest Labs' layout."""
    shutil.copyfile(NANO / ENCODER, tmp_path / "qwen.safetensors")
    return {
        "transformer": str(write(tmp_path / "flux-2.safetensors", transformer_in_bfl(NANO / TRANSFORMER))),
        "vae": str(write(tmp_path / "ae.safetensors", vae_in_bfl(NANO / VAE))),
        "text_encoder": str(tmp_path / "qwen.safetensors"),
    }


def sets(parts: dict[str, str], source: Path) -> list[str]:
    return [f"model.source={source}", *(f"model.{name}={place}" for name, place in parts.items())]


def plan(*changes: str, recipe: Path = RECIPE) -> Result:
    arguments = [argument for change in (*QUICK, *changes) for argument in ("--set", change)]
    return CliRunner().invoke(main, ["plan", str(recipe), "--no-layers", *arguments])


def loaded(folder: Path, parts: dict[str, str]) -> dict[str, torch.Tensor]:
    """Every tensor of the models that diffusers' pipeline is made of."""
    from fluxc.checkpoint.reference import load_pipeline

    pipeline = load_pipeline(open_checkpoint(str(folder), None, folder, None, parts), torch.bfloat16)
    models = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "vae")}
    return {f"{name}/{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def test_the_reference_has_the_weights_of_the_files(config_only: Path, singles: dict[str, str]) -> None:
    expected, found = loaded(NANO, {}), loaded(config_only, singles)
    counted = "vae/bn.num_batches_tracked"
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected if name != counted)
    plain = {**singles, "transformer": str(NANO / TRANSFORMER), "vae": str(NANO / VAE)}
    found = loaded(config_only, plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bundle_of_single_files_is_that_of_the_folder(
    config_only: Path, singles: dict[str, str], quick_bundle: Path, tmp_path: Path
) -> None:
    bundle = compile_into(tmp_path / "single", *QUICK, *sets(singles, config_only))
    ours, theirs = open_bundle(bundle).manifest, open_bundle(quick_bundle).manifest
    for name in ("transformer", "text_encoder"):
        weights = f"{name}/{Path(ours.components[name]).name}"
        assert ours.files[weights] == theirs.files[weights], name
    assert ours.fidelity == theirs.fidelity
    digests = ours.provenance.checkpoint
    assert set(digests["transformer"]) == {"config.json", "flux-2.safetensors"}
    assert set(digests["vae"]) == {"config.json", "ae.safetensors"}
    assert (
        digests["text_encoder"]["qwen.safetensors"] == theirs.provenance.checkpoint["text_encoder"]["model.safetensors"]
    )
    assert ours.recipe["model"]["transformer"] == singles["transformer"]
    assert "Taken from elsewhere" not in (quick_bundle / "README.md").read_text()
    assert "vae (ae.safetensors)" in (bundle / "README.md").read_text()


def test_other_weights_in_the_file_are_other_measurements(singles: dict[str, str], tmp_path: Path) -> None:
    file = Path(singles["transformer"])
    tensors = load_file(file)
    tensors["final_layer.linear.weight"] *= 2
    save_file(tensors, file)
    opened = open_checkpoint(str(NANO), None, tmp_path, None, {"transformer": str(file)})
    whole = open_checkpoint(str(NANO), None, tmp_path)
    doubled = opened.components["transformer"].tensors["proj_out.weight"].bytes_view()
    assert doubled.tobytes() != whole.components["transformer"].tensors["proj_out.weight"].bytes_view().tobytes()


def test_folders_stand_in_for_components_and_the_checkpoint_needs_none_of_its_own(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "source")
    parts = {}
    for name in ("transformer", "text_encoder", "vae", "tokenizer"):
        parts[name] = str(shutil.move(source / name, tmp_path / f"my-{name}"))
    checkpoint = open_checkpoint(str(source), None, tmp_path, None, parts)
    assert {name: component.folder.name for name, component in checkpoint.components.items()} == {
        **{name: f"my-{name}" for name in parts},
        "scheduler": "scheduler",
    }
    shown = plan(*sets(parts, source))
    assert shown.exit_code == 0, shown.output


def test_paths_are_relative_to_the_recipe(singles: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "single.yaml"
    recipe.parent.mkdir()
    text = RECIPE.read_text().replace("../models/flux2-nano", str(NANO))
    recipe.write_text(text.replace("prompts/", f"{RECIPE.parent}/prompts/"))
    prompts = f"{RECIPE.parent.parent}/tests/data/two-prompts.txt"
    both = (f"calibration.prompts={prompts}", f"fidelity.prompts={prompts}")
    shown = plan(*both, "model.transformer=../flux-2.safetensors", recipe=recipe)
    assert shown.exit_code == 0, shown.output
    assert "transformer from ../flux-2.safetensors" in shown.output
    away = plan(*both, "model.transformer=../gone.safetensors", recipe=recipe)
    assert away.exit_code == 2
    assert "model.transformer:" in away.output


def spoilt(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> str:
    tensors = transformer_in_bfl(NANO / TRANSFORMER)
    edit(tensors)
    return str(write(tmp_path / "spoilt.safetensors", tensors))


def lacks(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["double_blocks.0.txt_mlp.0.weight"]


def of_flux_1(tensors: dict[str, torch.Tensor]) -> None:
    tensors["double_blocks.0.img_mod.lin.weight"] = torch.zeros(2, 2)
    tensors["vector_in.in_layer.weight"] = torch.zeros(2, 2)


def quantized(tensors: dict[str, torch.Tensor]) -> None:
    name = "single_blocks.0.linear1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lacks,
            r"spoilt\.safetensors: its tensors do not match .*config\.json: missing: transformer_blocks\.0\.ff_context",
        ),
        (of_flux_1, r"not part of the model: double_blocks\.0\.img_mod\.lin\.weight, vector_in"),
        (quantized, r"quantized \(tensor 'single_blocks\.0\.linear1\.weight' is F8_E4M3\)"),
        (dict.clear, r"these are not the weights of a Flux2Transformer2DModel"),
    ],
    ids=["lacks a tensor", "FLUX.1", "fp8", "empty"],
)
def test_a_file_of_other_weights_is_refused_by_name(
    edit: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    shown = plan(f"model.transformer={spoilt(tmp_path, edit)}")
    assert shown.exit_code == 1, shown.output
    assert re.search(message, " ".join(shown.output.split())), shown.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("transformer=gone.safetensors", "no such file"),
        ("transformer=gone", "no such file or folder"),
        ("transformer=weights.gguf", "GGUF files hold weights quantized in other formats"),
        ("vae=weights.pt", "does not read pickled weights"),
        ("vae=weights.ckpt", "does not read pickled weights"),
        ("tokenizer=tokenizer.json", "give a tokenizer's folder"),
        (f"vae={NANO}", "is a whole checkpoint, not the folder of its vae"),
        (f"vae={NANO / 'tokenizer'}", "there is no config.json"),
        ("source=weights.safetensors", "a file of weights goes into model.transformer"),
    ],
)
def test_what_is_no_component_is_refused_as_the_recipe_s_fault(change: str, message: str, tmp_path: Path) -> None:
    for name in ("weights.gguf", "weights.pt", "weights.ckpt", "weights.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    field, _, place = change.partition("=")
    shown = plan(f"model.{field}={tmp_path / place}")
    assert shown.exit_code == 2, shown.output
    assert f"model.{field}" in shown.output
    assert message in " ".join(shown.output.split())


def test_a_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(NANO / "transformer", tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    shown = plan(f"model.transformer={folder}")
    assert shown.exit_code == 1
    assert "is a FluxTransformer2DModel" in " ".join(shown.output.split())


def test_a_file_of_plain_weights_goes_with_a_checkpoint_that_is_quantized(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "quantized")
    config = source / "transformer" / "config.json"
    said = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    file = str(NANO / TRANSFORMER)
    assert plan(f"model.source={source}").exit_code == 1
    assert plan(f"model.source={source}", f"model.transformer={file}").exit_code == 0
    assert "transformer/proj_out.weight" in loaded(source, {"transformer": file})
