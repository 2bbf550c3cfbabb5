"""GPTQ in NVFP4 against the method as it is derived: column by column, with the inverse of what is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxc.formats import cpu, nvfp4
from fluxc.formats.gptq import SingularError, factor, order_of, solve
from fluxc.recipe.structs import Scales

RNG = np.random.default_rng(0)
SCALES: tuple[Scales, ...] = ("max", "four-over-six", "mse")


def inputs(tokens: int, columns: int) -> np.ndarray:
    """Correlated inputs with some channels far larger than the rest."""
    mixing = RNG.standard_normal((columns // 4, columns)) / 4
    x = RNG.standard_normal((tokens, columns // 4)) @ mixing + 0.3 * RNG.standard_normal((tokens, columns))
    x[:, ::17] *= 6
    return x


def restored(found: cpu.Quantized, scale: np.float32) -> np.ndarray:
    """By torch, from the stored tensors."""
    codes, scales = (torch.from_numpy(array.copy()) for array in found)
    kept = nvfp4.Quantized(codes, scales.view(torch.float8_e4m3fn), torch.tensor(scale))
    values = torch.tensor(nvfp4.E2M1_VALUES)[torch.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).long()]
    dense = values.reshape(len(codes), -1, 16) * (kept.block_scales.float() * scale).unsqueeze(-1)
    return dense.reshape(len(codes), -1).numpy()


def nearest(weight: np.ndarray, scale: np.float32, scales: Scales) -> cpu.Quantized:
    patterns = weight.view(np.uint32)
    return cpu.nvfp4(patterns, "F32", cpu.block_amax(patterns, "F32"), scale, scales)


def loss(weight: np.ndarray, found: cpu.Quantized, scale: np.float32, moments: np.ndarray) -> float:
    off = (weight - restored(found, scale)).astype(np.float64)
    return float(np.einsum("ri,ij,rj->", off, moments, off))


def as_derived(weight: np.ndarray, moments: np.ndarray, scale: np.float32, scales: Scales) -> np.ndarray:
    """The restored weight: float64, the inverse of the moments of the columns that are left, by elimination."""
    work, out = weight.astype(np.float64), np.zeros_like(weight)
    columns = weight.shape[1]
    inverse = np.linalg.inv(moments + 0.01 * np.trace(moments) / columns * np.eye(columns))
    for column in range(columns):
        if column % 16 == 0:
            block = np.ascontiguousarray(work[:, column : column + 16].astype(np.float32)).view(np.uint32)
            codes = cpu.nvfp4_scales(block, "F32", cpu.block_amax(block, "F32"), scale, scales)
            step = (cpu.E4M3_VALUES * scale)[codes][:, 0]
        quotient = torch.from_numpy(np.abs(work[:, column].astype(np.float32)) / step)
        rounded = np.sign(work[:, column]) * nvfp4.round_to_e2m1(quotient).numpy() * step
        lost = (work[:, column] - rounded) / inverse[column, column]
        out[:, column] = rounded
        work[:, column:] -= lost[:, None] * inverse[column, column:]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return out


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("columns", [48, 304])
def test_it_is_the_method_as_it_is_derived(columns: int, scales: Scales) -> None:
    """But for quotients that lie next to a midpoint, where fp32 may fall to the other side and what follows changes."""
    x, weight = inputs(2000, columns), RNG.standard_normal((40, columns)).astype(np.float32)
    moments = x.T @ x
    scale = cpu.tensor_scale(float(np.abs(weight).max()), "nvfp4")
    found = restored(solve(weight, factor(moments), scale, scales), scale)
    expected = as_derived(weight, moments, scale, scales)
    equal = [np.allclose(one, other, rtol=1e-6, atol=0) for one, other in zip(found, expected, strict=True)]
    assert np.mean(equal) >= 0.8
    ours, theirs = (
        np.einsum("ri,ij,rj->", w - values, moments, w - values)
        for w, values in ((weight, found.astype(np.float64)), (weight, expected.astype(np.float64)))
    )
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("scales", SCALES)
def test_it_loses_less_than_rounding_to_the_nearest(scales: Scales) -> None:
    x, weight = inputs(3000, 512), RNG.standard_normal((64, 512)).astype(np.float32) / 20
    moments = x.T @ x
    scale = cpu.tensor_scale(float(np.abs(weight).max()), "nvfp4")
    before = loss(weight, nearest(weight, scale, scales), scale, moments)
    after = loss(weight, solve(weight, factor(moments), scale, scales), scale, moments)
    assert after < 0.5 * before


@pytest.mark.parametrize("scales", SCALES)
def test_inputs_that_are_not_correlated_change_nothing(scales: Scales) -> None:
    """To the bit what the quantizer makes: nothing can be made up for."""
    weight = RNG.standard_normal((33, 272)).astype(np.float32)
    weight[3, 16:32] = 0
    weight[4, 5] = -1e-20
    scale = cpu.tensor_scale(float(np.abs(weight).max()), "nvfp4")
    found = solve(weight, factor(np.diag(RNG.uniform(1, 2, 272))), scale, scales)
    for ours, theirs in zip(found, nearest(weight, scale, scales), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = inputs(400, 256), RNG.standard_normal((50, 256)).astype(np.float32)
    upper, scale = factor(x.T @ x), np.float32(0.002)
    whole = solve(weight, upper, scale, "mse")
    parts = [solve(part, upper, scale, "mse") for part in (weight[:7], weight[7:])]
    for at in range(2):
        joined = np.concatenate([part[at] for part in parts])
        assert np.mean(joined == whole[at]) > 0.999


def test_the_factor_is_that_of_the_inverse() -> None:
    x = inputs(900, 96)
    moments = x.T @ x
    upper = factor(moments).astype(np.float64)
    dampened = moments + 0.01 * np.diag(moments).mean() * np.eye(96)
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ dampened, np.eye(96), atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_fewer_inputs_than_channels_are_never_worse_than_the_nearest(tokens: int) -> None:
    x, weight = inputs(tokens, 320), RNG.standard_normal((32, 320)).astype(np.float32)
    moments, scale = x.T @ x, np.float32(0.0017)
    before = loss(weight, nearest(weight, scale, "max"), scale, moments)
    assert loss(weight, solve(weight, factor(moments), scale, "max"), scale, moments) < before


def test_dead_and_constant_channels() -> None:
    """A channel that was always zero is rounded to the nearest and takes nothing; a constant one is like any other."""
    x = inputs(500, 128)
    x[:, 40:48] = 0
    x[:, 100] = 3
    moments, weight, scale = x.T @ x, RNG.standard_normal((24, 128)).astype(np.float32), np.float32(0.0015)
    upper = factor(moments)
    assert np.count_nonzero(upper[40:48]) == 8
    found = solve(weight, upper, scale, "max")
    assert np.isfinite(restored(found, scale)).all()
    assert loss(weight, found, scale, moments) < loss(weight, nearest(weight, scale, "max"), scale, moments)
    np.testing.assert_array_equal(factor(np.zeros((32, 32))), np.eye(32))


def test_moments_that_cannot_be_factorized_are_refused() -> None:
    moments = np.eye(32)
    moments[3, 3] = np.nan
    with pytest.raises(SingularError, match="not finite"):
        factor(moments)
    with pytest.raises(SingularError, match="not positive definite"):
        factor(np.eye(32) - 5 * np.ones((32, 32)) + 5 * np.eye(32))
    with pytest.raises(ValueError, match="divisible by 16"):
        solve(np.ones((2, 20), np.float32), np.eye(20, dtype=np.float32), np.float32(1))


@pytest.mark.parametrize("scales", SCALES)
def test_an_order_is_the_method_on_columns_in_that_order(scales: Scales) -> None:
    x = inputs(600, 128)
    x[:, 40:60] *= 5
    moments = x.T @ x
    weight = (RNG.standard_normal((24, 128)) * 0.05).astype(np.float32)
    scale = cpu.tensor_scale(float(np.abs(weight).max()), "nvfp4")
    order = order_of(moments.diagonal())
    assert sorted(order) == list(range(128))
    assert all(len({column // 16 for column in block}) == 1 for block in order.reshape(-1, 16))
    energy = moments.diagonal()[order].reshape(-1, 16)
    assert (np.diff(energy.sum(1)) <= 0).all()
    assert (np.diff(energy, axis=1) <= 0).all()
    found = restored(solve(weight, factor(moments, order=order), scale, scales, order), scale)
    turned = np.ascontiguousarray(weight[:, order])
    expected = as_derived(turned, moments[order][:, order], scale, scales)
    assert np.mean(np.abs(found[:, order] - expected) < 1e-6) > 0.97


def test_the_largest_inputs_first_lose_less() -> None:
    lost = {"as they lie": 0.0, "ordered": 0.0}
    for _ in range(4):
        x = inputs(800, 256)
        x *= np.exp(RNG.standard_normal(256))
        moments = x.T @ x
        weight = (RNG.standard_normal((48, 256)) * 0.05).astype(np.float32)
        scale = cpu.tensor_scale(float(np.abs(weight).max()), "nvfp4")
        for name, order in (("as they lie", None), ("ordered", order_of(moments.diagonal()))):
            found = solve(weight, factor(moments, order=order), scale, "mse", order)
            lost[name] += loss(weight, found, scale, moments)
    assert lost["ordered"] < 0.9 * lost["as they lie"]


def test_the_factor_is_modelopts() -> None:
    from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse

    x = inputs(700, 192)
    moments = x.T @ x
    theirs = compute_hessian_inverse(torch.from_numpy(moments).float(), torch.ones(4, 192), 0.01).numpy()
    assert np.abs(factor(moments) - theirs).max() < 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_loses_no_more_than_modelopts_gptq(seed: int) -> None:
    """modelopt's own update of the columns, around its own rounding to NVFP4; its block scales are those of the weight as it
    was."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update

    x = inputs(900, 256)
    moments = x.T @ x
    weight = (np.random.default_rng(seed).standard_normal((96, 256)) * 0.05).astype(np.float32)
    scale = cpu.tensor_scale(float(np.abs(weight).max()), "nvfp4")

    tensor_scale = torch.tensor(scale)
    scales = NVFP4QTensor.get_weights_scaling_factor(torch.from_numpy(weight), 16, tensor_scale)[0]

    def rounded(given: torch.Tensor) -> torch.Tensor:
        stored, *_ = NVFP4QTensor.quantize(given, 16, scales, tensor_scale)
        return stored.dequantize(dtype=torch.float32, scale=scales, double_scale=tensor_scale, block_sizes={-1: 16})

    theirs = torch.from_numpy(weight.copy())
    factor_of = compute_hessian_inverse(torch.from_numpy(moments).float(), theirs, 0.01)
    gptq_blockwise_update(theirs, factor_of, 128, rounded)
    off = weight.astype(np.float64) - theirs.numpy()
    lost = float(np.einsum("ri,ij,rj->", off, moments, off))
    ours = loss(weight, solve(weight, factor(moments), scale, "max"), scale, moments)
    assert ours < 1.05 * lost
    assert ours < 0.5 * loss(weight, nearest(weight, scale, "max"), scale, moments)
