"""The compiled CPU path against torch's operators bit for bit, better scales against their targets, and format properties."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from shutil import ignore_patterns

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fluxc
import fluxrt
from conftest import NANO
from fluxc.formats import cpu, fp8, mxfp4, nvfp4
from fluxc.formats.constants import E2M1_VALUES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALES = ["max", "four-over-six", "mse"]


def awkward(seed: int, dtype: torch.dtype, rows: int = 37, columns: int = 224, spread: float = 0.05) -> torch.Tensor:
    """Gaussian weights with a zero row, a zero block, negative zeros, a row of tiny values, and an outlier."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread
    weight[3], weight[4, :16], weight[5, 7], weight[6] = 0, 0, -0.0, weight[6] * 1e-6
    weight[7, 100] = weight.abs().max() * 50
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", SCALES)
def test_the_kernel_equals_torch_bit_for_bit(dtype: torch.dtype, scales: cpu.Scales) -> None:
    for seed, spread in enumerate((1e-4, 0.05, 30.0)):
        weight = awkward(seed, dtype, spread=spread)
        ours, theirs = nvfp4.quantize(weight, scales=scales), nvfp4.quantize_by_torch(weight, scales=scales)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.block_scales.view(torch.uint8), theirs.block_scales.view(torch.uint8))
        assert torch.equal(ours.tensor_scale, theirs.tensor_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", SCALES)
def test_the_mxfp4_kernels_equal_torch_bit_for_bit(dtype: torch.dtype, scales: cpu.Scales) -> None:
    for seed, spread in enumerate((1e-4, 0.05, 30.0)):
        weight = awkward(seed, dtype, spread=spread)
        ours, theirs = mxfp4.quantize(weight, scales), mxfp4.quantize_by_torch(weight, scales)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fp8_kernels_equal_torch_bit_for_bit(dtype: torch.dtype) -> None:
    weight = awkward(0, dtype)
    for scale in (fp8.tensor_scale(weight.abs().amax()), fp8.row_scales(weight)):
        expected = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(fp8.quantize(weight, scale).view(torch.uint8), expected.view(torch.uint8))


def test_a_scale_a_row_beats_a_scale_a_tensor_in_fp8() -> None:
    weight = awkward(1, torch.bfloat16)
    rows, tensor = fp8.row_scales(weight), fp8.tensor_scale(weight.abs().amax())
    assert rows.shape == (len(weight), 1)
    errors = [(fp8.dequantize(fp8.quantize(weight, s), s) - weight.float()).square().sum() for s in (rows, tensor)]
    assert errors[0] < errors[1]


def test_every_e4m3_code_and_every_e2m1_code_survives_a_round_trip() -> None:
    codes = np.arange(127, dtype=np.uint8)
    assert np.array_equal(cpu.E4M3_VALUES, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    both = np.concatenate([codes, codes | 128])[None]
    values = cpu.fp8_values(both, np.ones(1, np.float32))
    assert np.array_equal(cpu.fp8(values.view(np.uint32), "F32", np.ones(1, np.float32)), both)
    block = torch.tensor(E2M1_VALUES)[None]
    packed, scales, _ = nvfp4.quantize(block, torch.tensor(1.0))
    assert scales.float().item() == 1.0
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten().tolist()
    # Minus zero is stored as zero, as modelopt does.
    assert nibbles == [0 if code == 8 else code for code in range(16)]


def test_every_block_scale_is_stored_as_it_is() -> None:
    """A block whose largest value is 6 times an E4M3 number, under tensor scale 1, gets that number."""
    values = cpu.E4M3_VALUES[1:]
    weight = torch.from_numpy(np.repeat(6 * values[:, None], 16, 1))
    assert torch.equal(nvfp4.quantize(weight, torch.tensor(1.0)).block_scales.float()[:, 0], torch.from_numpy(values))


def test_not_finite_weights_are_refused_with_their_position() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for quantize in (nvfp4.quantize, mxfp4.quantize, lambda w: fp8.quantize(w, torch.tensor(1.0))):
            for dtype in DTYPES:
                weight = torch.ones(70, 128)
                weight[66, 77] = weight[67, 2] = bad
                with pytest.raises(cpu.NotFiniteError, match=r"not finite \(NaN or infinity\) at \[66, 77\]"):
                    quantize(weight.to(dtype))


def test_columns_that_blocks_do_not_divide_are_refused() -> None:
    for quantize, columns in ((nvfp4.quantize, 40), (mxfp4.quantize, 48)):
        with pytest.raises(ValueError, match=f"divisible by .*, got {columns}"):
            quantize(torch.ones(2, columns))
    with pytest.raises(ValueError, match="divisible by 16, got 8"):
        nvfp4.fake_quantize(torch.ones(2, 8), torch.tensor(1.0))


def test_dtypes_that_are_no_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only bf16, fp16 and fp32 can be quantized, got torch\.float64"):
        nvfp4.quantize(torch.ones(2, 16, dtype=torch.float64))


def relative_error(weight: torch.Tensor, scales: cpu.Scales) -> float:
    restored = nvfp4.dequantize(*nvfp4.quantize(weight, scales=scales))
    return ((restored - weight.float()).double().square().sum() / weight.double().square().sum()).item()


def nano_weights() -> list[torch.Tensor]:
    tensors = load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")
    return [weight for name, weight in tensors.items() if weight.ndim == 2 and "_blocks." in name]


@pytest.mark.parametrize("what", ["gaussian", "flux2-nano"])
def test_better_scales_reach_their_targets(what: str) -> None:
    """At least 15 % (four-over-six) and 25 % (mse) less squared error than `max`."""
    gaussian = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    weights = [gaussian] if what == "gaussian" else nano_weights()
    plain, four_over_six, mse = (np.mean([relative_error(w, scales) for w in weights]) for scales in SCALES)
    assert four_over_six <= 0.85 * plain
    assert mse <= 0.75 * plain


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-5, 0.05, 100.0]), st.sampled_from([1.0, 2.0, 4.0]))
def test_a_wider_search_is_never_worse_in_any_block(seed: int, spread: float, tail: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 64, generator=generator).sign() * torch.rand(8, 64, generator=generator) ** tail * spread
    scale = nvfp4.tensor_scale(weight.abs().amax())
    errors = []
    for scales in SCALES:
        restored = nvfp4.dequantize(*nvfp4.quantize(weight, scale, scales))
        errors.append((restored - weight).double().reshape(8, 4, 16).square().sum(-1))
    # A block's error is found in fp32 with the reciprocal of its scale, so equal ones may differ in the last bits.
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[2] <= errors[0] * (1 + 1e-5)).all()
    assert errors[2].sum() <= errors[1].sum() * 1.01


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SCALES), st.sampled_from([1e-5, 0.05, 100.0]))
def test_what_was_quantized_is_quantized_to_itself(seed: int, scales: cpu.Scales, spread: float) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * spread
    once = nvfp4.quantize(weight, scales=scales)
    restored = nvfp4.dequantize(*once)
    steps = once.block_scales.float() * once.tensor_scale
    twice = nvfp4.round_to_e2m1((restored.reshape(4, 4, 16) / steps[..., None]).abs()) * steps[..., None]
    assert torch.equal(twice, restored.reshape(4, 4, 16).abs())
    mx = mxfp4.quantize(weight)
    values = mxfp4.dequantize(*mx)
    assert torch.equal(mxfp4.dequantize(*mxfp4.quantize(values)), values)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_a_larger_tensor_scale_never_gives_larger_block_scales(seed: int, factor: float) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    scale = nvfp4.tensor_scale(weight.abs().amax())
    small, large = sorted([scale, scale * factor], key=float)
    first, second = (nvfp4.quantize(weight, s).block_scales.float() for s in (small, large))
    assert (second <= first).all()


def test_members_of_a_fusion_group_share_the_scale_of_least_joint_error() -> None:
    members = [
        awkward(seed, torch.float32, spread=spread).numpy().view(np.uint32) for seed, spread in ((0, 0.05), (1, 0.2))
    ]
    amax = max(np.abs(m.view(np.float32)).max() for m in members)
    pairs = [(m, "F32") for m in members]
    assert cpu.joint_tensor_scale(pairs, amax, "nvfp4", "max") == np.float32(amax) / np.float32(2688)
    chosen = cpu.joint_tensor_scale(pairs, amax, "nvfp4", "mse")

    def joint(scale: np.float32) -> float:
        found = [cpu.nvfp4(m, "F32", cpu.block_amax(m, "F32"), scale, "mse") for m in members]
        return sum(cpu.nvfp4_error(m, "F32", q, scale)[1] for m, q in zip(members, found, strict=True))

    candidates = [np.float32(amax) / np.float32(2688) * np.float32(f) for f in cpu.TENSOR_SCALE_FACTORS]
    assert chosen in candidates
    assert joint(chosen) == min(map(joint, candidates))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_the_writer_reports_is_the_error(dtype: torch.dtype) -> None:
    from fluxc.formats.tensors import patterns_of

    weight = awkward(3, dtype)
    ours = nvfp4.quantize(weight)
    arrays = cpu.Quantized(ours.codes.numpy(), ours.block_scales.view(torch.uint8).numpy())
    signal, noise = cpu.nvfp4_error(*patterns_of(weight), arrays, np.float32(ours.tensor_scale.item()))
    exact = weight.double()
    assert signal == pytest.approx(exact.square().sum().item(), rel=1e-5)
    assert noise == pytest.approx((exact - nvfp4.dequantize(*ours).double()).square().sum().item(), rel=1e-5)


def test_a_weight_that_is_not_contiguous_is_quantized_as_its_copy() -> None:
    weight = awkward(4, torch.bfloat16)[::2, :96]
    assert json.dumps(nvfp4.quantize(weight).codes.tolist()) == json.dumps(
        nvfp4.quantize(weight.clone()).codes.tolist()
    )


@pytest.mark.parametrize("torch_first", [False, True])
def test_kernels_leave_the_number_of_threads_that_torch_rounds_by(torch_first: bool) -> None:
    """An image decoded after a layer was quantized, in the same process, is that of a process of its own."""
    work = ["import numpy, fluxc.formats.cpu as cpu", 'cpu.row_amax(numpy.ones((64, 64), numpy.uint16), "BF16")']
    load = ["import torch", "torch.get_num_threads()"]
    code = "\n".join([*(load + work if torch_first else work + load), "print(torch.get_num_threads())"])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert process.stdout.split() == [b"1"]


def test_kernels_are_kept_in_a_temporary_folder_where_neither_package_nor_home_can_be_written(tmp_path: Path) -> None:
    package = Path(
        shutil.copytree(Path(fluxc.__file__).parent, tmp_path / "fluxc", ignore=ignore_patterns("__pycache__"))
    )
    # Where a file has the folder's name, root cannot write either.
    (package / "formats" / "__pycache__").write_text("")
    (tmp_path / "tmp").mkdir()
    code = "from fluxc.formats import kernels, kernel_cache; print(*kernel_cache.kernel_folder(), sep='|')"
    environment = os.environ | {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "TMPDIR": str(tmp_path / "tmp")}
    environment["PYTHONPATH"] = f"{tmp_path}:{Path(fluxrt.__file__).parent.parent}"

    def run(**more: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout.strip()

    folder = tmp_path / "tmp" / f"fluxc-kernels-{os.getuid()}"
    assert run().startswith(f"{folder}|compiled kernels are kept in {folder}: neither fluxc's own folder nor")
    folder.chmod(0o777)
    assert run().startswith("None|kernels are compiled anew by each command")
    assert "NUMBA_CACHE_DIR" not in run(NUMBA_CACHE_DIR=str(tmp_path / "chosen"))
