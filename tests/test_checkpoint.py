"""Damaged and foreign checkpoints are refused by name, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import NANO, RECIPE, RecordingProgress, compile_into, copy_checkpoint
from fluxc.base.errors import BuildError, CheckpointError, FluxError, RecipeError
from fluxc.base.safetensors import read_header
from fluxc.build.job import open_job
from fluxc.checkpoint.exact_folder import exact_folder
from fluxc.checkpoint.source import open_checkpoint
from fluxc.recipe.load import load_recipe
from quick import QUICK

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "checkpoint")


def change(folder: Path, file: str, edit) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def refused(folder: Path, message: str, *changes: str) -> str:
    out = folder.parent / "out"
    with pytest.raises(FluxError, match=message) as raised:
        compile_into(out, f"model.source={folder}", *QUICK, *changes)
    assert not out.exists()
    beside = folder.parent / ".fluxc"
    assert not beside.exists() or [p for p in beside.iterdir() if p.is_dir()] == []
    return str(raised.value)


def test_a_missing_tensor_is_named(damaged: Path) -> None:
    change(damaged, TRANSFORMER, lambda t: t.pop("transformer_blocks.1.attn.to_k.weight"))
    refused(damaged, r"missing: transformer_blocks\.1\.attn\.to_k\.weight")


def test_a_surplus_tensor_is_named(damaged: Path) -> None:
    change(damaged, TRANSFORMER, lambda t: t.update(stray=torch.zeros(2)))
    refused(damaged, r"not part of the model: stray")


def test_a_misshapen_tensor_is_named(damaged: Path) -> None:
    change(damaged, TRANSFORMER, lambda t: t.update({"proj_out.weight": torch.zeros(8, 128)}))
    refused(damaged, r"proj_out\.weight is \[8, 128\], expected \[32, 128\]")


def test_a_surplus_vae_tensor_is_named(damaged: Path) -> None:
    change(damaged, VAE, lambda t: t.update({"decoder.stray": torch.zeros(2)}))
    refused(damaged, r"not part of the model: decoder\.stray")


def test_a_nan_weight_is_named_with_its_position(damaged: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["single_transformer_blocks.2.attn.to_out.weight"][5, 7] = float("nan")

    change(damaged, TRANSFORMER, poison)
    # The model would generate nothing with it, so calibration is skipped to let the writer meet it.
    refused(
        damaged,
        r"single_transformer_blocks\.2\.attn\.to_out\.weight.*\[5, 7\]",
        "precision.transformer={default: bf16}",
    )


def test_a_nan_weight_stops_calibration_too(damaged: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["x_embedder.weight"][0, 0] = float("inf")

    change(damaged, TRANSFORMER, poison)
    refused(damaged, "NaN or infinity|one flat colour")


def test_a_truncated_file_is_named(damaged: Path) -> None:
    path = damaged / TRANSFORMER
    path.write_bytes(path.read_bytes()[:-1000])
    assert TRANSFORMER in refused(damaged, "truncated")
    path.write_bytes(path.read_bytes()[:6])
    refused(damaged, "truncated")


def test_a_file_that_is_not_safetensors_is_named(damaged: Path) -> None:
    (damaged / TRANSFORMER).write_bytes((20).to_bytes(8, "little") + b"x" * 40)
    refused(damaged, "not a safetensors file")


def test_another_pipeline_is_refused(damaged: Path) -> None:
    index = damaged / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "FluxPipeline"))
    refused(damaged, "pipeline class 'FluxPipeline' is not supported")


def test_another_schedule_is_refused(damaged: Path) -> None:
    config = damaged / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"use_dynamic_shifting": true', '"use_dynamic_shifting": false'))
    refused(damaged, "use_dynamic_shifting is False")


def test_another_number_of_training_steps_is_refused(damaged: Path) -> None:
    edit_json(damaged / "scheduler" / "scheduler_config.json", lambda config: config.update(num_train_timesteps=500))
    refused_at_once(damaged, "num_train_timesteps is 500")


def test_a_config_that_names_other_weights_for_transformers_is_refused(damaged: Path) -> None:
    edit_json(damaged / "text_encoder" / "config.json", lambda c: c.update(transformers_weights="other.safetensors"))
    refused_at_once(damaged, "transformers_weights names 'other.safetensors'.*remove the field")


def test_without_a_temporary_folder_the_way_out_is_named(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(damaged / "gone"))
    checkpoint = open_checkpoint(str(damaged), None, damaged)
    with pytest.raises(BuildError, match=r"no temporary folder can be made.*set TMPDIR"), exact_folder(checkpoint):
        pass


def test_a_size_that_is_not_whole_tokens_is_refused(damaged: Path) -> None:
    refused(damaged, "multiples of 8", "sizes=[[60, 64]]")


def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.source: .*no such folder"):
        open_checkpoint("./nowhere", None, tmp_path)


def test_a_sharded_component_reads_as_one(damaged: Path) -> None:
    tensors = load_file(damaged / TRANSFORMER)
    whole = read_header(damaged / TRANSFORMER)
    (damaged / TRANSFORMER).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, damaged / "transformer" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (damaged / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    found = open_checkpoint(str(damaged), None, damaged).components["transformer"].tensors
    assert {n: (r.dtype, r.shape) for n, r in found.items()} == {n: (r.dtype, r.shape) for n, r in whole.items()}
    name = names[3]
    assert found[name].bytes_view().tobytes() == tensors[name].view(torch.uint8).numpy().tobytes()


def planned(folder: Path, *changes: str) -> None:
    """All that `fluxc plan`, and a build before its first stage, look at."""
    open_job(load_recipe(RECIPE, (*QUICK, f"model.source={folder}", *changes)), folder.parent / "cache")


def refused_at_once(folder: Path, message: str, *changes: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        planned(folder, *changes)


def shard(folder: Path, file: str, names: tuple[str, str], index: str = "") -> Path:
    """Split the weights `file` into two files called `names`, with an index; its path."""
    tensors = load_file(folder / file)
    (folder / file).unlink()
    ordered = sorted(tensors)
    parts = {names[0]: ordered[: len(ordered) // 2], names[1]: ordered[len(ordered) // 2 :]}
    for name, part in parts.items():
        save_file({tensor: tensors[tensor] for tensor in part}, (folder / file).with_name(name))
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    path = (folder / file).with_name(index or f"{Path(file).name}.index.json")
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def loaded_from(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """Every parameter of the transformer, the text encoder and the VAE as diffusers' pipeline has them."""
    from fluxc.checkpoint.reference import load_pipeline

    pipeline = load_pipeline(open_checkpoint(str(folder), None, folder, variant), torch.bfloat16)
    parts = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "vae")}
    return {f"{name}/{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def changed_weights(file: Path) -> dict[str, torch.Tensor]:
    return {name: value + 1 if value.is_floating_point() else value for name, value in load_file(file).items()}


ENCODER = "text_encoder/model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("file", [ENCODER, TRANSFORMER])
def test_a_weights_file_beside_an_index_that_does_not_name_it_is_refused(damaged: Path, file: str) -> None:
    """transformers would take the file, diffusers the index."""
    stray = changed_weights(damaged / file)
    shard(damaged, file, SHARDS)
    planned(damaged)
    save_file(stray, damaged / file, metadata={"format": "pt"})
    refused_at_once(damaged, rf"{Path(file).name} is not in {Path(file).name}\.index\.json.*remove it")


def test_several_weights_files_that_no_index_joins_are_refused(damaged: Path) -> None:
    index = shard(damaged, ENCODER, SHARDS)
    index.unlink()
    refused_at_once(damaged, r"text_encoder: 2 weights files, model-00001.* and no index")
    (damaged / "text_encoder" / SHARDS[1]).unlink()
    refused_at_once(damaged, r"text_encoder: one shard, model-00001-of-00002\.safetensors, and no index")


def test_two_indexes_are_refused(damaged: Path) -> None:
    index = shard(damaged, ENCODER, SHARDS)
    index.with_name("other.safetensors.index.json").write_text(index.read_text())
    refused_at_once(damaged, r"text_encoder: two indexes, model.*, other.* remove one")


def test_diffusers_is_given_the_files_that_fluxc_reads(damaged: Path) -> None:
    """Files under names that it does not look for, a shard named as a whole file is, files of a variant, a pickle."""
    plain = loaded_from(damaged)
    shard(damaged, ENCODER, ("model.safetensors", "z.safetensors"), "text.safetensors.index.json")
    shard(damaged, TRANSFORMER, ("a.safetensors", "b.safetensors"))
    (damaged / VAE).rename(damaged / "vae" / "flux2-vae.safetensors")
    save_file(changed_weights(NANO / VAE), damaged / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(changed_weights(NANO / VAE), damaged / "vae" / "diffusion_pytorch_model.bin")
    (damaged / "vae" / "._flux2-vae.safetensors").write_bytes(b"a resource fork")
    planned(damaged)
    found = loaded_from(damaged)
    assert found.keys() == plain.keys()
    assert [name for name, value in found.items() if not torch.equal(value, plain[name])] == []


def test_a_variant_is_taken_where_the_recipe_names_it(damaged: Path) -> None:
    for file in (TRANSFORMER, VAE):
        tensors = changed_weights(damaged / file)
        (damaged / file).unlink()
        save_file(tensors, (damaged / file).with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    refused_at_once(
        damaged, r"transformer: its weights are there as the variant 'fp16' alone; set model\.variant: fp16"
    )
    refused_at_once(damaged, r"model\.variant: no component has weights of the variant 'bf16'", "model.variant=bf16")
    planned(damaged, "model.variant=fp16")
    found = loaded_from(damaged, "fp16")
    expected = {
        f"{Path(file).parent}/{name}": value
        for file in (TRANSFORMER, VAE)
        for name, value in load_file((damaged / file).with_suffix(".fp16.safetensors")).items()
    }
    expected |= {f"text_encoder/{name}": value for name, value in load_file(damaged / ENCODER).items()}
    assert [name for name, value in expected.items() if not torch.equal(found[name], value.to(found[name].dtype))] == []


def test_a_sharded_variant_reads_as_one(damaged: Path) -> None:
    expected = loaded_from(damaged)
    names = ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
    shard(damaged, ENCODER, names, "model.safetensors.index.fp16.json")
    refused_at_once(damaged, r"set model\.variant: fp16")
    planned(damaged, "model.variant=fp16")
    found = loaded_from(damaged, "fp16")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "it lacks `weight_map`"),
        ([], "holds a JSON list, not an object"),
        (None, "holds a JSON NoneType"),
        ({"weight_map": ["model.safetensors"]}, "Expected `object`, got `array`"),
        ({"weight_map": None}, "Expected `object`, got `null`"),
        ({"weight_map": {"model.norm.weight": 3}}, "Expected `str`, got `int`"),
        ({"weight_map": {}}, "its weight_map is empty"),
        (
            {"weight_map": {"model.norm.weight": "../vae/diffusion_pytorch_model.safetensors"}},
            "no safetensors file of this",
        ),
        ({"weight_map": {"model.norm.weight": "/etc/passwd"}}, "no safetensors file of this"),
        ({"weight_map": {"model.norm.weight": ".."}}, "no safetensors file of this"),
        ({"weight_map": {"model.norm.weight": "a\0.safetensors"}}, "no safetensors file of this"),
        ({"weight_map": {"model.norm.weight": f"{'a' * 300}.safetensors"}}, "cannot be reached"),
        ({"weight_map": {"model.norm.weight": "gone.safetensors"}}, r"gone\.safetensors: is not there"),
        ({"weight_map": {"gone.weight": "model.safetensors"}}, "it lacks tensor 'gone.weight', which the index places"),
    ],
)
def test_a_damaged_index_is_refused(damaged: Path, index: Any, says: str) -> None:
    (damaged / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_at_once(damaged, f"text_encoder.*{says}")


def test_a_folder_in_place_of_a_weights_file_is_refused(damaged: Path) -> None:
    (damaged / VAE).unlink()
    (damaged / VAE).mkdir()
    refused_at_once(damaged, r"diffusion_pytorch_model\.safetensors: is a folder, not a weights file")


ENTRY = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"a": ' + json.dumps(ENTRY) + ', "a": ' + json.dumps(ENTRY) + "}", "'a' is in its header twice"),
        ({"\ud800": ENTRY}, "not JSON"),
        ({"a": []}, "the entry of tensor 'a' is no JSON object"),
        ({"a": None}, "the entry of tensor 'a' is no JSON object"),
        ({"a": {**ENTRY, "dtype": ["BF16"]}}, "the dtype of tensor 'a'"),
        ({"a": {**ENTRY, "shape": "22"}}, "the shape of tensor 'a'"),
        ({"a": {**ENTRY, "shape": ["2", "2"]}}, "the shape of tensor 'a'"),
        ({"a": {**ENTRY, "shape": None}}, "the shape of tensor 'a'"),
        ({"a": {**ENTRY, "shape": [-2, -2]}}, "the shape of tensor 'a'"),
        ({"a": {**ENTRY, "shape": [2.0, 2]}}, "the shape of tensor 'a'"),
        ({"a": {**ENTRY, "shape": [True, 4]}}, "the shape of tensor 'a'"),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, "the data_offsets of tensor 'a'"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "the data_offsets of tensor 'a'"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "the data_offsets of tensor 'a'"),
        ({"a": {**ENTRY, "data_offsets": {"0": 8}}}, "the data_offsets of tensor 'a'"),
        ({"a": {**ENTRY, "data_offsets": [0, 1 << 70]}}, "the data_offsets of tensor 'a'"),
        ({"a": {**ENTRY, "data_offsets": [0, 80]}}, "truncated: tensor 'a' ends at byte"),
        ({"a": {**ENTRY, "data_offsets": [1, 8]}}, "does not lie where its shape says"),
        ({"a": {**ENTRY, "shape": [3, 3]}}, "does not lie where its shape says"),
        ({"a": {**ENTRY, "dtype": "Q9"}}, "dtype Q9"),
    ],
)
def test_a_damaged_safetensors_header_is_refused_and_named(tmp_path: Path, header: Any, says: str) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=says) as raised:
        read_header(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("component", "field", "value", "says"),
    [
        ("transformer", "num_layers", None, "got `null` - at `num_layers`"),
        ("transformer", "num_layers", -1, "Expected `int` >= 0 - at `num_layers`"),
        ("transformer", "num_layers", 10**12, "Expected `int` <= 4096 - at `num_layers`"),
        ("transformer", "num_attention_heads", 0, "Expected `int` >= 1 - at `num_attention_heads`"),
        ("transformer", "attention_head_dim", 32.0, "got `float` - at `attention_head_dim`"),
        ("transformer", "mlp_ratio", "3", "got `str` - at `mlp_ratio`"),
        ("transformer", "mlp_ratio", float("nan"), "at `mlp_ratio`"),
        ("transformer", "axes_dims_rope", [8, 8], "at `axes_dims_rope`"),
        ("transformer", "axes_dims_rope", [8, 8, 8, 10], "axes_dims_rope is .*add up to attention_head_dim, 32"),
        ("transformer", "rope_theta", "2000", "at `rope_theta`"),
        ("transformer", "eps", [], "at `eps`"),
        ("text_encoder", "hidden_size", "32", "got `str` - at `hidden_size`"),
        ("text_encoder", "rms_norm_eps", None, "at `rms_norm_eps`"),
        ("text_encoder", "num_key_value_heads", 3, "num_key_value_heads is 3, which does not divide"),
        ("text_encoder", "layer_types", ["full_attention"], "layer_types names 1 layers, and num_hidden_layers is 28"),
        ("text_encoder", "rope_parameters", 10000.0, "at `rope_parameters`"),
        ("vae", "block_out_channels", [], "at `block_out_channels`"),
        ("vae", "patch_size", 2, "at `patch_size`"),
        ("vae", "norm_num_groups", 5, "norm_num_groups is 5, which does not divide 32 channels"),
        ("vae", "down_block_types", ["DownEncoderBlock2D"], "down_block_types names 1 blocks.* 3"),
    ],
)
def test_a_config_whose_field_does_not_fit_is_refused_at_once(
    damaged: Path, component: str, field: str, value: Any, says: str
) -> None:
    edit_json(damaged / component / "config.json", lambda config: config.update({field: value}))
    refused_at_once(damaged, rf"{component}/config\.json: .*{says}")


@pytest.mark.parametrize(
    ("component", "field"), [("transformer", "num_layers"), ("text_encoder", "vocab_size"), ("vae", "latent_channels")]
)
def test_a_config_that_lacks_a_field_is_held_against_the_tensors(damaged: Path, component: str, field: str) -> None:
    """The libraries' defaults stand in for it, and do not fit this model."""
    edit_json(damaged / component / "config.json", lambda config: config.pop(field))
    refused_at_once(damaged, f"{component}: its tensors do not match its config")


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", "", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_what_is_no_json_object_is_refused(damaged: Path, file: str, content: str) -> None:
    (damaged / file).write_text(content)
    refused_at_once(damaged, f"{file}: (holds a JSON|cannot be read as JSON)")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda i: i.update(vae=[None, None]), "vae is .*expected the names of a library and a class"),
        (lambda i: i.update(vae={"a": 1, "b": 2}), "component 'vae' is missing"),
        (lambda i: i.update(vae="AutoencoderKLFlux2"), "component 'vae' is missing"),
        (lambda i: i.update(vae=[["diffusers"], "AutoencoderKLFlux2"]), "expected the names of a library"),
        (lambda i: i.update(vae=["os", "AutoencoderKLFlux2"]), "takes vae from 'os', expected 'diffusers'"),
        (lambda i: i.update(_class_name=["pipeline.py", "Flux2KleinPipeline"]), "pipeline class .* is not supported"),
        (lambda i: i.update(is_distilled="false"), "is_distilled is 'false', expected true or false"),
        (lambda i: i.pop("tokenizer"), "component 'tokenizer' is missing"),
    ],
)
def test_an_odd_model_index_is_refused(damaged: Path, edit: Callable[[dict[str, Any]], Any], says: str) -> None:
    edit_json(damaged / "model_index.json", edit)
    refused_at_once(damaged, says)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("chat_template.jinja", None, r"no chat_template\.jinja, nor a chat_template in tokenizer_config"),
        ("chat_template.jinja", b"{% for m in messages %}", "chat template is damaged"),
        ("chat_template.jinja", b"\xff\xfe", "cannot be read"),
        ("tokenizer.json", None, r"there is no tokenizer\.json"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: it is not a tokenizer"),
        ("tokenizer.json", b'{"version": "1.0", "model": 3}', r"tokenizer\.json: it is not a tokenizer"),
        ("tokenizer.json", b"\x00", r"tokenizer\.json: it is not a tokenizer"),
    ],
)
def test_a_tokenizer_that_prompts_cannot_be_read_with_is_refused_at_once(
    damaged: Path, file: str, content: bytes | None, says: str
) -> None:
    path = damaged / "tokenizer" / file
    path.unlink() if content is None else path.write_bytes(content)
    refused_at_once(damaged, says)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("chat_template.jinja", "{{ messages[7].content }}", "chat template cannot be rendered"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "chat template cannot be rendered"),
        ("chat_template.jinja", "{{ messages[0].content | upper }}", "changes the message"),
        ("tokenizer_config.json", '{"pad_token": 3}', "transformers cannot read the tokenizer|must have a pad token"),
    ],
)
def test_a_tokenizer_that_transformers_cannot_use_is_refused_before_the_first_stage(
    damaged: Path, file: str, content: str, says: str
) -> None:
    (damaged / "tokenizer" / file).write_text(content)
    progress = RecordingProgress()
    with pytest.raises(CheckpointError, match=says):
        compile_into(damaged.parent / "out", f"model.source={damaged}", *QUICK, progress=progress)
    assert progress.ran == []


def test_a_tokenizer_class_that_transformers_does_not_have_is_refused(damaged: Path) -> None:
    edit_json(damaged / "model_index.json", lambda index: index.update(tokenizer=["transformers", "NoTokenizer"]))
    refused(damaged, "transformers cannot read the tokenizer as NoTokenizer")


def test_a_model_that_its_library_cannot_make_is_refused(damaged: Path) -> None:
    edit_json(damaged / "text_encoder" / "config.json", lambda config: config.update(hidden_act="no such function"))
    refused(damaged, r"text_encoder/config\.json: its model cannot be made \(")


def test_a_config_with_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    damaged = copy_checkpoint(tmp_path / "damaged")
    file = damaged / "text_encoder" / "config.json"
    file.write_text(file.read_text().replace("{", '{"\\ud800": 1, ', 1))
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        open_job(load_recipe(RECIPE, (f"model.source={damaged}",)), tmp_path / "cache")
