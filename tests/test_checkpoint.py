"""Damaged and foreign checkpoints are refused by name, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import QUICK, compile_into, copy_checkpoint
from fluxc.base.errors import CheckpointError, FluxError
from fluxc.base.safetensors import read_header
from fluxc.checkpoint.source import open_checkpoint

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


def test_a_size_that_is_not_whole_tokens_is_refused(damaged: Path) -> None:
    refused(damaged, "multiples of 8", "sizes=[[60, 64]]")


def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint("./nowhere", None, tmp_path)


def test_a_hub_id_that_cannot_be_fetched_says_both_places_it_looked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"not a local folder .* and the hub did not give it"):
        open_checkpoint("owner/name-that-is-nowhere", None, tmp_path)


def test_a_sharded_component_reads_as_one(damaged: Path) -> None:
    import json

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
