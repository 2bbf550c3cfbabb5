"""Files in Black Forest Labs' layout are read as diffusers' converters read them, byte for byte, without a copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file

from bfl import transformer_in_bfl, vae_in_bfl, write
from conftest import NANO, NANO_DEV
from fluxc.base.errors import CheckpointError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.checkpoint.dequantized import read
from fluxc.checkpoint.layouts import read_layout

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def check_same(refs: dict[str, TensorRef], expected: dict[str, torch.Tensor]) -> None:
    assert set(refs) == set(expected)
    for name, ref in refs.items():
        assert ref.name == name
        assert ref.shape == tuple(expected[name].shape)
        assert ref.bytes_view().tobytes() == expected[name].contiguous().view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("source", [NANO, NANO_DEV], ids=lambda path: path.name)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_transformer_reads_as_diffusers_converts_it(source: Path, prefix: str, tmp_path: Path) -> None:
    file = write(tmp_path / "flux2.safetensors", transformer_in_bfl(source / TRANSFORMER), prefix)
    refs = read_layout("transformer", read_header(file))
    check_same(refs, load_file(source / TRANSFORMER))
    assert not any(name.startswith(("single_transformer_blocks", "x_embedder")) for name in read_header(file))
    check_same(refs, convert_flux2_transformer_checkpoint_to_diffusers(transformer_in_bfl(source / TRANSFORMER)))


@pytest.mark.parametrize("source", [NANO, NANO_DEV], ids=lambda path: path.name)
@pytest.mark.parametrize("quant_inside", [True, False])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_reads_as_diffusers_converts_it(source: Path, quant_inside: bool, prefix: str, tmp_path: Path) -> None:
    file = write(tmp_path / "ae.safetensors", vae_in_bfl(source / VAE, quant_inside), prefix)
    refs = read_layout("vae", read_header(file))
    expected = load_file(source / VAE)
    del expected["bn.num_batches_tracked"]
    check_same(refs, expected)
    config = json.loads((source / "vae" / "config.json").read_text())
    converted = convert_ldm_vae_checkpoint(vae_in_bfl(source / VAE, quant_inside=False), config)
    check_same({name: ref for name, ref in refs.items() if not name.startswith("bn.")}, converted)


def test_a_file_in_diffusers_layout_reads_as_it_is(tmp_path: Path) -> None:
    for component, file in (("transformer", NANO / TRANSFORMER), ("vae", NANO / VAE)):
        assert read_layout(component, read_header(file)) == read_header(file)
        prefixed = write(tmp_path / "prefixed.safetensors", load_file(NANO / TRANSFORMER), "model.diffusion_model.")
        check_same(read_layout("transformer", read_header(prefixed)), load_file(NANO / TRANSFORMER))


def test_of_a_file_that_holds_several_models_the_one_with_the_prefix_is_read(tmp_path: Path) -> None:
    both = {f"model.diffusion_model.{n}": t for n, t in transformer_in_bfl(NANO / TRANSFORMER).items()}
    both |= {f"first_stage_model.{n}": t for n, t in vae_in_bfl(NANO / VAE).items()}
    refs = read_header(write(tmp_path / "all.safetensors", both))
    check_same(read_layout("transformer", refs), load_file(NANO / TRANSFORMER))
    assert set(read_layout("vae", refs)) == set(load_file(NANO / VAE)) - {"bn.num_batches_tracked"}


def test_rows_of_q_k_v_are_ranges_of_one_tensor_and_the_halves_of_the_modulation_turn_around(tmp_path: Path) -> None:
    file = write(tmp_path / "flux2.safetensors", transformer_in_bfl(NANO / TRANSFORMER))
    stored, refs = read_header(file), read_layout("transformer", read_header(file))
    fused = stored["double_blocks.1.txt_attn.qkv.weight"]
    thirds = [refs[f"transformer_blocks.1.attn.{name}.weight"] for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
    assert [ref.offset - fused.offset for ref in thirds] == [0, fused.nbytes // 3, 2 * fused.nbytes // 3]
    turned, whole = refs["norm_out.linear.weight"], load_file(NANO / TRANSFORMER)["norm_out.linear.weight"]
    assert turned.begins_at == turned.nbytes // 2
    assert torch.equal(read(turned), whole)
    raw = whole.view(torch.uint8).numpy().tobytes()
    for start, stop in ((0, 10), (turned.nbytes // 2 - 3, turned.nbytes // 2 + 5), (turned.nbytes - 7, turned.nbytes)):
        assert turned.bytes_view(start, stop).tobytes() == raw[start:stop]
    assert turned.bytes_view(8, 8).size == 0


def test_quantized_weights_in_their_layout_are_refused_by_name(tmp_path: Path) -> None:
    tensors = transformer_in_bfl(NANO / TRANSFORMER)
    tensors["single_blocks.0.linear1.weight"] = tensors["single_blocks.0.linear1.weight"].to(torch.float8_e4m3fn)
    file = write(tmp_path / "fp8.safetensors", tensors)
    with pytest.raises(
        CheckpointError,
        match=r"fp8\.safetensors: .*quantized \(tensor 'single_blocks\.0\.linear1\.weight' is F8_E4M3\)",
    ):
        read_layout("transformer", read_header(file))


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = transformer_in_bfl(NANO / TRANSFORMER)
    tensors["single_blocks.0.norm.key_norm.weight"] = torch.ones(32)
    file = write(tmp_path / "twice.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"holds 'single_transformer_blocks\.0\.attn\.norm_k\.weight' twice"):
        read_layout("transformer", read_header(file))
