"""NVFP4 numerics against modelopt, diffusers' NVFP4 reader, ONNX's reference evaluator, and the grid itself."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fluxc.formats import nvfp4
from fluxc.targets.onnxruntime.lower import fake_quantize_function

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def gaussian(
    rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.05
) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def by_modelopt(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scales, _ = NVFP4QTensor.quantize(weight.clone(), 16, weights_scaling_factor_2=scale)
    return packed._quantized_data, scales


SHAPES = [
    (1, 16),
    (3, 32),
    (128, 128),
    (768, 128),
    (128, 384),
    (1152, 128),
    (128, 512),
    (17, 48),
    (256, 1024),
    (64, 3072),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_modelopt_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = gaussian(*shape, seed=shape[0], dtype=dtype)
    scale = nvfp4.tensor_scale(weight.abs().amax())
    assert torch.equal(scale, NVFP4QTensor.get_weights_scaling_factor_2(weight))
    codes, scales, _ = nvfp4.quantize(weight, scale)
    their_codes, their_scales = by_modelopt(weight, scale)
    assert torch.equal(codes, their_codes)
    assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))


def test_edge_blocks_equal_modelopt_bit_for_bit() -> None:
    ties = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0]
    )
    tiny = torch.full((16,), 1e-6)
    negative_zero = torch.tensor([-0.0, 0.0] * 8)
    lone = torch.zeros(16)
    lone[5] = -3.0
    weight = torch.stack([torch.cat([ties, tiny]), torch.cat([negative_zero, lone]), torch.zeros(32)])
    scale = nvfp4.tensor_scale(weight.abs().amax())
    codes, scales, _ = nvfp4.quantize(weight, scale)
    their_codes, their_scales = by_modelopt(weight, scale)
    assert torch.equal(codes, their_codes)
    assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))


def test_ties_round_to_the_even_code() -> None:
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert nvfp4.round_to_e2m1(midpoints).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_all_zero_tensor_gives_zeros_not_nan() -> None:
    weight = torch.zeros(4, 32)
    scale = nvfp4.tensor_scale(weight.abs().amax())
    codes, scales, _ = nvfp4.quantize(weight, scale)
    assert nvfp4.dequantize(codes, scales, scale).abs().max() == 0


def test_low_nibble_holds_the_even_column() -> None:
    weight = torch.zeros(1, 16)
    weight[0, 0], weight[0, 1] = 6.0, -6.0
    codes = nvfp4.quantize(weight, nvfp4.tensor_scale(torch.tensor(6.0))).codes
    assert codes[0, 0].item() & 15 == 7
    assert codes[0, 0].item() >> 4 == 15


def test_width_not_divisible_by_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 16, got 24"):
        nvfp4.quantize(torch.zeros(2, 24), torch.tensor(1.0))


def test_diffusers_reader_dequantizes_to_the_same_values() -> None:
    from diffusers.quantizers.bfl.utils import dequantize_nvfp4

    weight = gaussian(96, 256, seed=5)
    scale = nvfp4.tensor_scale(weight.abs().amax())
    codes, scales, _ = nvfp4.quantize(weight, scale)
    assert torch.equal(dequantize_nvfp4(codes, scales, scale), nvfp4.dequantize(codes, scales, scale))


def test_onnx_reference_evaluator_dequantizes_to_the_same_values() -> None:
    weight = gaussian(8, 64, seed=6)
    scale = nvfp4.tensor_scale(weight.abs().amax())
    codes, scales, _ = nvfp4.quantize(weight, scale)
    assert np.array_equal(onnx_dequantize(codes, scales, scale), nvfp4.dequantize(codes, scales, scale).numpy())


def onnx_dequantize(codes: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The two-level form TensorRT reads, run by ONNX's reference evaluator on the packed bytes as they lie."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    raw = [
        helper.make_tensor("weight", TensorProto.FLOAT4E2M1, [rows, columns], codes.numpy().tobytes(), raw=True),
        helper.make_tensor(
            "weight_scale",
            TensorProto.FLOAT8E4M3FN,
            list(scales.shape),
            scales.view(torch.uint8).numpy().tobytes(),
            raw=True,
        ),
        helper.make_tensor("weight_scale_2", TensorProto.FLOAT, [], [scale.item()]),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["weight_scale", "weight_scale_2"], ["scale"]),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["y"], axis=-1, block_size=16),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])
    model = helper.make_model(
        helper.make_graph(nodes, "dequantize", [], [output], raw), opset_imports=[helper.make_opsetid("", 23)]
    )
    return ReferenceEvaluator(model).run(None, {})[0]


def brute_force_activation(x: np.ndarray, input_scale: float) -> np.ndarray:
    """NVFP4 activation rounding by searching the grid, block scales by ml_dtypes' E4M3; nothing of ours."""
    import ml_dtypes

    out = np.empty_like(x)
    for row, values in enumerate(x):
        for start in range(0, len(values), 16):
            block = values[start : start + 16]
            exact = np.float32(np.abs(block).max()) / np.float32(6) / np.float32(input_scale)
            step = np.float32(np.clip(exact, 2**-9, 448).astype(ml_dtypes.float8_e4m3fn)) * np.float32(input_scale)
            for at, value in enumerate(block):
                scaled = np.float32(abs(value)) / step
                distance = np.abs(GRID - min(scaled, 6))
                best = np.flatnonzero(distance == distance.min())
                even = [i for i in best if i % 2 == 0] or list(best)
                out[row, start + at] = np.sign(value) * np.float32(GRID[even[0]]) * step
    return out


def activation_model() -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "columns"])
    scale = helper.make_tensor_value_info("input_scale", TensorProto.FLOAT, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])
    node = helper.make_node("NVFP4FakeQuantize", ["x", "input_scale"], ["y"], domain="fluxc")
    return helper.make_model(
        helper.make_graph([node], "activation", [x, scale], [y]),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("fluxc", 1)],
        functions=[fake_quantize_function()],
        ir_version=11,
    )


@pytest.mark.parametrize("scale", [0.001, 0.02, 3.0])
def test_activation_rounding_equals_a_grid_search_in_torch_onnxruntime_and_reference(scale: float) -> None:
    import onnxruntime

    x = gaussian(6, 64, seed=9, dtype=torch.float32, scale=1.0)
    x[0, :16] = 0
    x[1, 3] = 40.0
    expected = brute_force_activation(x.numpy(), scale)
    ours = nvfp4.fake_quantize(x, torch.tensor(scale)).numpy()
    np.testing.assert_array_equal(ours, expected)
    feeds = {"x": x.numpy(), "input_scale": np.array(scale, dtype=np.float32)}
    session = onnxruntime.InferenceSession(activation_model().SerializeToString())
    np.testing.assert_array_equal(session.run(None, feeds)[0], expected)
    np.testing.assert_array_equal(ReferenceEvaluator(activation_model()).run(None, feeds)[0], expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 300.0]), st.integers(1, 4))
def test_error_is_bounded_and_signs_survive(seed: int, scale: float, blocks: int) -> None:
    weight = gaussian(4, 16 * blocks, seed=seed, scale=scale)
    tensor_scale = nvfp4.tensor_scale(weight.abs().amax())
    codes, scales, _ = nvfp4.quantize(weight, tensor_scale)
    restored = nvfp4.dequantize(codes, scales, tensor_scale)
    block = weight.float().reshape(4, blocks, 16)
    error = (restored.reshape(4, blocks, 16) - block).abs()
    # Half the widest grid step (2) in units of the block's scale, and saturation when the scale was rounded down (2^-4)
    # or to the smallest E4M3 number.
    unit = (scales.float() * tensor_scale)[..., None]
    assert (error <= unit * 1.0 + block.abs() * 2**-4 + 1e-12).all()
    assert (restored.reshape(block.shape) * block >= 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_quantizing_a_quantized_weight_changes_nothing(seed: int) -> None:
    weight = gaussian(4, 64, seed=seed)
    once = nvfp4.quantize(weight)
    twice = nvfp4.quantize(nvfp4.dequantize(*once), once.tensor_scale)
    assert torch.equal(nvfp4.dequantize(*once), nvfp4.dequantize(*twice))
