"""What the runtime makes of stored weights: against torch, and the published tables of E2M1, E4M3 and E8M0 in ml_dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fluxc.formats.nvfp4 import quantize
from fluxrt.errors import BundleError
from fluxrt.manifest import Unfold
from fluxrt.unfold import INT8, input_names, unfold, unfolded_bytes
from fluxrt.weights import StoredTensor, read_weights

RNG = np.random.default_rng(0)


def stored(folder: Path, **tensors: torch.Tensor) -> dict[str, StoredTensor]:
    save_file({f"layer.{name}": tensor for name, tensor in tensors.items()}, folder / "weights.safetensors")
    return read_weights(folder / "weights.safetensors")


def bytes_of(shape: tuple[int, ...], top: int = 256) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(0, top, shape, np.uint8))


def e2m1(packed: torch.Tensor) -> np.ndarray:
    """The values of packed codes [rows, columns / 2], by ml_dtypes."""
    codes = np.stack([packed.numpy() & 15, packed.numpy() >> 4], axis=-1).reshape(len(packed), -1)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def case(kind: str, rows: int, columns: int, folder: Path) -> tuple[Unfold, dict[str, StoredTensor], np.ndarray]:
    """(what is wanted of a weight, its tensors, its values fp32 [rows, columns])"""
    shape = (rows, columns)
    if kind == "nvfp4":
        packed, scales = bytes_of((rows, columns // 2)), bytes_of((rows, columns // 16), 127)
        tensors = stored(
            folder,
            weight=packed,
            weight_scale=scales.view(torch.float8_e4m3fn),
            weight_scale_2=torch.tensor(0.003),
        )
        block = scales.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.003)
        values = e2m1(packed) * np.repeat(block, 16, axis=1)
        return Unfold("layer", "float32", shape, "e2m1", ("weight_scale", "weight_scale_2"), 16), tensors, values
    if kind == "mxfp4":
        packed, scales = bytes_of((rows, columns // 2)), bytes_of((rows, columns // 32), 20) + 110
        tensors = stored(folder, weight=packed, weight_scale=scales)
        block = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        return (
            Unfold("layer", "float32", shape, "e2m1", ("weight_scale",), 32),
            tensors,
            e2m1(packed) * np.repeat(block, 32, axis=1),
        )
    if kind.startswith("fp8"):
        codes = bytes_of(shape, 127).view(torch.float8_e4m3fn)
        scale = torch.rand(rows, 1) + 0.1 if kind == "fp8 rows" else torch.tensor(0.02)
        tensors = stored(folder, weight=codes, weight_scale=scale)
        return Unfold("layer", "float32", shape, "e4m3", ("weight_scale",)), tensors, (codes.float() * scale).numpy()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    weight = torch.randn(shape).to(dtype)
    plain: Any = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[kind]
    return Unfold("layer", "float32", shape, plain), stored(folder, weight=weight), weight.float().numpy()


KINDS = ["nvfp4", "mxfp4", "fp8", "fp8 rows", "bf16", "fp16", "fp32"]


def as_form(entry: Unfold, form: str, rows: tuple[int, int] | None = None) -> Unfold:
    import msgspec

    return msgspec.structs.replace(entry, form=form, **({"rows": rows} if rows else {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (130, 96), (300, 4096)])
def test_values_are_those_that_are_stored(kind: str, rows: int, columns: int, tmp_path: Path) -> None:
    entry, tensors, values = case(kind, rows, columns, tmp_path)
    (found,) = unfold([entry], tensors).values()
    np.testing.assert_array_equal(found, values)
    assert unfolded_bytes([entry]) == found.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (130, 96), (300, 4096)])
def test_int8_rows_are_torchs(kind: str, rows: int, columns: int, tmp_path: Path) -> None:
    """torch quantizes per channel under the same scales; a value halfway between two may fall either way by its last bit."""
    entry, tensors, values = case(kind, rows, columns, tmp_path)
    arrays = unfold([as_form(entry, "int8")], tensors)
    codes, scales = (arrays[name] for name in input_names(as_form(entry, "int8")))
    largest = np.abs(values).max(axis=1)
    np.testing.assert_allclose(scales, largest / INT8, rtol=1e-6)
    theirs = torch.quantize_per_channel(
        torch.from_numpy(values), torch.from_numpy(scales), torch.zeros(rows, dtype=torch.int64), 0, torch.qint8
    ).int_repr()
    assert codes.dtype == np.int8
    assert codes.shape == (columns, rows)
    apart = np.abs(codes.T.astype(int) - theirs.numpy())
    assert apart.max() <= 1
    assert np.abs(codes.T - values / scales[:, None]).max() <= 0.5 + 1e-4
    assert (np.abs(codes).max(axis=0) == INT8).all()
    assert unfolded_bytes([as_form(entry, "int8")]) == codes.nbytes + scales.nbytes


def test_unsigned_rows_are_the_signed_ones_and_128(tmp_path: Path) -> None:
    entry, tensors, _ = case("nvfp4", 130, 96, tmp_path)
    signed, unsigned = (unfold([as_form(entry, "int8")], tensors, signed=way) for way in (True, False))
    name = input_names(as_form(entry, "int8"))[0]
    assert unsigned[name].dtype == np.uint8
    np.testing.assert_array_equal(unsigned[name].astype(int) - 128, signed[name])


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_rows_is_that_part_of_all(kind: str, form: str, tmp_path: Path) -> None:
    entry, tensors, _ = case(kind, 300, 64, tmp_path)
    whole = list(unfold([as_form(entry, form)], tensors).values())
    wanted = [as_form(entry, form, rows) for rows in ((0, 130), (130, 300))]
    parts = unfold(wanted, tensors, threads=3)
    assert len(parts) == 2 * len(whole)
    for at, array in enumerate(whole):
        axis = 1 if form == "int8" and at == 0 else 0
        joined = np.concatenate([parts[input_names(one)[at]] for one in wanted], axis=axis)
        np.testing.assert_array_equal(joined, array)


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    weight = torch.randn(4, 32)
    weight[2] = 0
    tensors = stored(tmp_path, weight=weight)
    codes, scales = unfold([Unfold("layer", "int8", (4, 32), "float32")], tensors).values()
    assert (codes[:, 2] == 0).all()
    assert scales[2] == 1


def test_int8_rows_of_an_nvfp4_weight_lose_little_of_what_is_left(tmp_path: Path) -> None:
    """Against the weight before it was quantized: NVFP4 itself loses nine percent, the rows on top of it a tenth of that."""
    weight = torch.randn(64, 1024).bfloat16()
    scale = weight.abs().max().float() / 2688
    packed, block_scales = quantize(weight, scale)[:2]
    tensors = stored(tmp_path, weight=packed, weight_scale=block_scales, weight_scale_2=scale)
    entry = Unfold("layer", "float32", (64, 1024), "e2m1", ("weight_scale", "weight_scale_2"), 16)
    (values,) = unfold([entry], tensors).values()
    codes, scales = unfold([as_form(entry, "int8")], tensors).values()
    exact = weight.float().numpy()

    def error(found: np.ndarray, of: np.ndarray) -> float:
        return float(np.linalg.norm(found - of) / np.linalg.norm(of))

    assert 0.08 < error(values, exact) < 0.11
    assert error(codes.T * scales[:, None], values) < 0.01


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("weight", "'layer.weight' of the weights file is missing"),
        ("weight_scale", "'layer.weight_scale' .* is missing"),
    ],
)
def test_a_tensor_that_the_file_lacks_is_named(missing: str, message: str, tmp_path: Path) -> None:
    entry, tensors, _ = case("nvfp4", 16, 32, tmp_path)
    del tensors[f"layer.{missing}"]
    with pytest.raises(BundleError, match=message):
        unfold([entry], tensors)


def test_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    entry, tensors, _ = case("nvfp4", 16, 32, tmp_path)
    with pytest.raises(BundleError, match="has 256 bytes, not 512"):
        unfold([Unfold(**{**_fields(entry), "shape": (32, 32)})], tensors)
    with pytest.raises(BundleError, match=r"block scales of 'layer' have shape \[16, 2\], not \[16, 4\]"):
        unfold([Unfold(**{**_fields(entry), "block": 8})], tensors)


def _fields(entry: Unfold) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__struct_fields__}
