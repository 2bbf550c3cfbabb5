"""NVFP4 and MXFP4 against independent code: what others write for the same weights, and what they read from our bytes.

diffusers' reader and ONNX's reference evaluator are in test_nvfp4.py.
"""

from __future__ import annotations

import random

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from fluxc.formats import mxfp4, nvfp4
from fluxc.graph import LINEAR_DOMAIN
from fluxc.graph.export import make_model
from fluxc.models.base import Linear
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.onnxruntime.lower import lower

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# OCP MX v1.0, section 5.3.3: sign, two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal.
OCP_MAGNITUDES = [2.0 ** (e - 1) * (1 + m / 2) if e else m / 2 for e in range(4) for m in range(2)]
OCP_E2M1 = [*OCP_MAGNITUDES, *(-value for value in OCP_MAGNITUDES)]


def gaussian(rows: int, columns: int, seed: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def random_cases(count: int, block: int, dtypes: list[torch.dtype]) -> list:
    """`count` cases (rows, columns, dtype, scale): rows up to 300, columns up to 2048, scales from 1e-6 to 1e3."""
    rng = random.Random(0)
    cases = []
    for number in range(count):
        rows, columns = rng.randint(1, 300), block * rng.randint(1, 2048 // block)
        dtype, scale = dtypes[number % len(dtypes)], 10 ** rng.uniform(-6, 3)
        cases.append(pytest.param(rows, columns, dtype, scale, id=f"{rows}x{columns}-{dtype}-{scale:.1e}"))
    return cases


def assert_modelopt_writes_the_same(weight: torch.Tensor, scale: torch.Tensor) -> nvfp4.Quantized:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    ours = nvfp4.quantize(weight, scale)
    theirs, their_scales, _ = NVFP4QTensor.quantize(weight.clone(), 16, weights_scaling_factor_2=scale)
    assert torch.equal(ours.block_scales.view(torch.uint8), their_scales.view(torch.uint8))
    assert torch.equal(ours.codes, theirs._quantized_data)
    return ours


@pytest.mark.parametrize(("rows", "columns", "dtype", "scale"), random_cases(48, 16, DTYPES))
def test_modelopt_writes_the_same_bits(rows: int, columns: int, dtype: torch.dtype, scale: float) -> None:
    weight = gaussian(rows, columns, rows, dtype, scale)
    assert_modelopt_writes_the_same(weight, nvfp4.tensor_scale(weight.abs().amax()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-10, -3, 0, 5])
def test_modelopt_writes_the_same_bits_on_ties_of_both_signs(exponent: int, dtype: torch.dtype) -> None:
    """Quarters up to 6 under block scale 1: every tie of the grid, and every value of it."""
    quarters = torch.arange(-24, 25).float() / 4
    blocks = torch.cat([quarters, torch.zeros(15)]).reshape(4, 16)
    blocks[:, -1] = 6.0
    scale = torch.tensor(2.0**exponent)
    ours = assert_modelopt_writes_the_same((blocks * scale).to(dtype), scale)
    assert (ours.block_scales.float() == 1).all()


def test_modelopt_writes_the_same_bits_on_values_of_few_bits() -> None:
    """Small integers meet ties under many block scales, where one more rounding on the way would show."""
    generator = torch.Generator().manual_seed(0)
    for largest in range(2, 256):
        weight = torch.randint(-largest, largest + 1, (8, 64), generator=generator).to(torch.bfloat16)
        weight[0, 0] = largest
        assert_modelopt_writes_the_same(weight, nvfp4.tensor_scale(weight.abs().amax()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_modelopt_writes_the_same_bits_on_zero_blocks_and_negative_zeros(dtype: torch.dtype) -> None:
    weight = gaussian(6, 64, 1, dtype, 0.05)
    weight[0], weight[1], weight[2, 16:32], weight[3, ::2] = 0.0, -0.0, -0.0, -0.0
    ours = assert_modelopt_writes_the_same(weight, nvfp4.tensor_scale(weight.abs().amax()))
    assert (ours.codes[:2] == 0).all()
    assert (ours.block_scales[:2].float() == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_modelopt_writes_the_same_bits_for_a_zero_tensor(dtype: torch.dtype) -> None:
    """Under our tensor scale, 1: modelopt's own for a zero tensor is 0, and its block scales are then NaN."""
    ours = assert_modelopt_writes_the_same(torch.zeros(3, 32, dtype=dtype), nvfp4.tensor_scale(torch.tensor(0.0)))
    assert (ours.codes == 0).all()


def test_modelopt_writes_the_same_bits_for_every_subnormal_bfloat16() -> None:
    patterns = torch.arange(128, dtype=torch.int16)
    patterns = torch.cat([patterns, patterns | -0x8000]).reshape(4, 64)
    weight = patterns.view(torch.bfloat16)
    assert 0 < weight.abs().amax() < torch.finfo(torch.bfloat16).tiny
    assert_modelopt_writes_the_same(weight, nvfp4.tensor_scale(weight.abs().amax()))


def test_modelopt_writes_the_same_bits_for_every_finite_bfloat16() -> None:
    patterns = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16)
    weight = torch.cat([patterns, patterns | -0x8000]).reshape(-1, 128).view(torch.bfloat16)
    assert weight.isfinite().all()
    assert_modelopt_writes_the_same(weight, nvfp4.tensor_scale(weight.abs().amax()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_modelopt_writes_the_same_bits_beside_a_lone_outlier(dtype: torch.dtype) -> None:
    """The outlier's tensor scale drives the other blocks' scales under 2^-9, E4M3's smallest, where they are held."""
    weight = gaussian(16, 64, 2, dtype, 1e-3)
    weight[3, 5] = -6e4
    scale = nvfp4.tensor_scale(weight.abs().amax())
    assert (weight[0].abs().amax() / (6 * scale)) < 2**-9
    ours = assert_modelopt_writes_the_same(weight, scale)
    assert (ours.block_scales.float() == 2**-9).sum() == ours.block_scales.numel() - 1


@pytest.mark.parametrize("factor", [1e-3, 0.1, 3.0, 1e4])
def test_modelopt_writes_the_same_bits_under_another_tensors_scale(factor: float) -> None:
    """A fusion group shares one tensor scale, usually larger than a member's own; a smaller one saturates."""
    weight = gaussian(64, 256, 3, torch.bfloat16, 0.05)
    assert_modelopt_writes_the_same(weight, nvfp4.tensor_scale(weight.abs().amax() * factor))


@pytest.fixture(params=[(96, 256, 0.05), (1, 16, 30.0), (33, 80, 1e-5)], ids=lambda case: f"{case[0]}x{case[1]}")
def stored(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, block scales and tensor scale as the weights file holds them."""
    rows, columns, spread = request.param
    weight = gaussian(rows, columns, 4, torch.bfloat16, spread)
    scale = nvfp4.tensor_scale(weight.abs().amax())
    return nvfp4.quantize(weight, scale)


Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def test_modelopt_reads_the_same_values(stored: Stored) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    codes, scales, scale = stored
    tensor = NVFP4QTensor(torch.Size([codes.shape[0], codes.shape[1] * 2]), torch.float32, codes)
    values = tensor.dequantize(scale=scales, double_scale=scale, block_sizes={-1: 16})
    assert torch.equal(values, nvfp4.dequantize(*stored))


@pytest.mark.parametrize("swizzled", [False, True])
def test_torchao_reads_the_same_values(stored: Stored, swizzled: bool) -> None:
    """torchao reads the codes and the row-major scales as they lie; its fast path wants the scales swizzled by it."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.mx_formats.utils import hp_data_dims_to_swizzled_scale_dims_nvfp4, to_blocked

    codes, scales, scale = stored
    if swizzled:
        scales = to_blocked(scales).view(hp_data_dims_to_swizzled_scale_dims_nvfp4(codes.shape[0], codes.shape[1] * 2))
    tensor = NVFP4Tensor(codes, scales, 16, torch.float32, per_tensor_scale=scale, is_swizzled_scales=swizzled)
    assert torch.equal(tensor.dequantize(torch.float32), nvfp4.dequantize(*stored))


def renamed(stored: Stored) -> dict[str, torch.Tensor]:
    """Our tensors after compressed-tensors' own conversion from ModelOpt's names: weight_global_scale = 1/weight_scale_2."""
    from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

    names = ("layer.weight", "layer.weight_scale", "layer.weight_scale_2")
    tensors = ModelOptNvfp4Converter(targets=["layer"]).validate(dict(zip(names, stored, strict=True)))
    return {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}


def test_compressed_tensors_reads_the_same_values_to_the_rounding_of_its_inverted_scale(stored: Stored) -> None:
    """(block scale / (1 / scale)) * code rounds three times and ours twice: at most 5 * 2^-24 apart, relatively."""
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    state, ours = renamed(stored), nvfp4.dequantize(*stored)
    values = dequantize(
        x_q=unpack_fp4_from_uint8(state["weight_packed"], *ours.shape, torch.float32),
        scale=state["weight_scale"].float(),
        args=preset_name_to_scheme("NVFP4A16", ["Linear"]).weights,
        global_scale=state["weight_global_scale"],
    )
    assert ((values - ours).abs() <= 5 * 2**-24 * ours.abs()).all()


def test_compressed_tensors_reads_exactly_the_same_values_under_a_power_of_two() -> None:
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scale = torch.tensor(2.0**-14)
    stored = nvfp4.quantize(gaussian(48, 128, 5, torch.bfloat16, 0.05), scale)
    values = NVFP4PackedCompressor.decompress(renamed(stored), preset_name_to_scheme("NVFP4A16", ["Linear"]))["weight"]
    assert torch.equal(values.float(), nvfp4.dequantize(*stored))


def test_compressed_tensors_decompresses_the_same_values_to_bfloat16(stored: Stored) -> None:
    """Its decompressor works in bf16: the tensor scale, the block's scale and the product are each rounded to 2^-9."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    ours = nvfp4.dequantize(*stored)
    values = NVFP4PackedCompressor.decompress(renamed(stored), preset_name_to_scheme("NVFP4A16", ["Linear"]))["weight"]
    assert ((values.float() - ours).abs() <= ((1 + 2**-9) ** 3 - 1 + 2**-20) * ours.abs()).all()


@pytest.mark.parametrize("weights_in_memory", ["8-bit", "4-bit"])
def test_onnxruntime_reads_the_same_values(stored: Stored, weights_in_memory: str) -> None:
    """A lowered Linear (MatMulNBits and GatherBlockQuantized) over the bytes as they lie, applied to the identity."""
    codes, scales, scale = stored
    rows, columns = codes.shape[0], codes.shape[1] * 2
    node = helper.make_node("Linear", ["x", "layer.weight"], ["y"], domain=LINEAR_DOMAIN)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])
    weight = helper.make_tensor_value_info("layer.weight", TensorProto.FLOAT, [rows, columns])
    planned = LayerPlan("transformer", Linear("layer", rows, columns), "nvfp4", "default", 2 * rows * columns)
    dtypes = {"layer.weight": "U8", "layer.weight_scale": "F8_E4M3", "layer.weight_scale_2": "F32"}
    neutral = make_model(helper.make_graph([node], "linear", [x, weight], [y]))
    lowered = lower(neutral, {"x"}, dtypes, {"layer": planned}, weights_in_memory=weights_in_memory)
    values = onnxruntime_run(bound(lowered, codes, scales, scale), np.eye(columns, dtype=np.float32))
    assert np.array_equal(values.T, nvfp4.dequantize(*stored).numpy())


def bound(model: onnx.ModelProto, codes: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor) -> onnx.ModelProto:
    """`model` with the layer's tensors held in it; packed codes are [out, in/2] bytes or [out, in] FP4 numbers."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    packed = kinds["layer.weight"] == TensorProto.UINT8
    held = {
        "layer.weight": (kinds["layer.weight"], [codes.shape[0], codes.shape[1] * (1 if packed else 2)], codes),
        "layer.weight_scale": (TensorProto.FLOAT8E4M3FN, list(scales.shape), scales.view(torch.uint8)),
        "layer.weight_scale_2": (TensorProto.FLOAT, [], scale),
    }
    for name, (kind, shape, tensor) in held.items():
        model.graph.initializer.append(helper.make_tensor(name, kind, shape, tensor.numpy().tobytes(), raw=True))
    x = next(value for value in model.graph.input if value.name == "x")
    kept = onnx.ValueInfoProto.FromString(x.SerializeToString())
    del model.graph.input[:]
    model.graph.input.append(kept)
    return model


def onnxruntime_run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(("rows", "columns", "dtype", "scale"), random_cases(24, 32, [torch.bfloat16, torch.float32]))
def test_torchao_writes_the_same_mxfp4_bits(rows: int, columns: int, dtype: torch.dtype, scale: float) -> None:
    weight = gaussian(rows, columns, rows, dtype, scale)
    ours = mxfp4.quantize(weight)
    their_scales, their_codes = torchao_to_mx(weight)
    assert torch.equal(ours.scales, their_scales)
    assert torch.equal(ours.codes, their_codes)


def torchao_to_mx(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    scales, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
    return scales.view(torch.uint8), codes.view(torch.uint8)


@pytest.mark.parametrize("exponent", [-120, -30, -2, -1, 0, 1, 2, 10, 100, 127])
def test_mxfp4_scale_is_exact_at_and_just_below_a_power_of_two(exponent: int) -> None:
    """Section 6.3's floor(log2(amax)) - 2; a logarithm rounded to fp32 would be one too high just below the power."""
    power = torch.tensor(2.0**exponent)
    below = torch.nextafter(power, torch.tensor(0.0))
    weight = torch.zeros(2, 32)
    weight[0, 7], weight[1, 7] = -power, below
    ours = mxfp4.quantize(weight)
    assert ours.scales.flatten().tolist() == [exponent - 2 + 127, exponent - 3 + 127]
    assert torch.equal(ours.scales, torchao_to_mx(weight)[0])
    # 2^exponent is 4 under its scale; just below it, 8 less a bit, which saturates.
    assert mxfp4.dequantize(*ours)[:, 7].tolist() == [-power.item(), 6 * 2.0 ** (exponent - 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_rounds_every_value_to_the_nearest_of_the_ocp_table_ties_to_even(dtype: torch.dtype) -> None:
    """Eighths from -8 to 8 under scale 1, searched by distance; beyond 6 the table ends and values saturate."""
    eighths = torch.arange(-63, 64).float() / 8
    weight = torch.zeros(len(eighths), 32, dtype=dtype)
    weight[:, 0], weight[:, 31] = 4.0, eighths.to(dtype)
    codes, scales = mxfp4.quantize(weight)
    assert (scales == 127).all()
    for value, code in zip(eighths.tolist(), (codes[:, 15] >> 4).tolist(), strict=True):
        distances = [abs(abs(value) - magnitude) for magnitude in OCP_MAGNITUDES]
        nearest = [at for at, distance in enumerate(distances) if distance == min(distances)]
        expected = next((at for at in nearest if at % 2 == 0), nearest[0])
        assert code & 7 == expected, value
        assert value >= 0 or code >> 3 == 1 or expected == 0, value


def test_mxfp4_reads_every_code_as_the_ocp_table_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(13, 1)
    scales = torch.arange(0, 247, 19, dtype=torch.uint8).reshape(13, 1).repeat(1, 16)
    values = mxfp4.dequantize(codes, scales)
    nibbles = np.stack([codes.numpy() & 15, codes.numpy() >> 4], axis=-1).reshape(13, 512)
    expected = np.array(OCP_E2M1)[nibbles] * 2.0 ** (scales[:, :1].numpy().astype(np.float64) - 127)
    assert np.array_equal(values.numpy(), expected.astype(np.float32))


def test_mxfp4_zero_blocks_read_as_zeros() -> None:
    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    weight[0, 0], weight[1] = 3.0, -0.0
    codes, scales = mxfp4.quantize(weight)
    assert mxfp4.dequantize(codes, scales).tolist() == weight.tolist()


@pytest.mark.parametrize(
    "draw", [torch.distributions.Normal(0.0, 1.0), torch.distributions.StudentT(3.0)], ids=["normal", "t3"]
)
def test_no_power_of_two_beats_the_better_of_mxfp4s_two(draw: torch.distributions.Distribution) -> None:
    """Every scale from a quarter of OCP's to eight times it, with the nearest of the table by distance."""
    torch.manual_seed(0)
    weight = draw.sample((64, 256)).float()
    ours, first = mxfp4.quantize(weight, "mse"), mxfp4.quantize(weight).scales.int()
    blocks, table = weight.reshape(64, 8, 32), torch.tensor(OCP_MAGNITUDES)
    found = (mxfp4.dequantize(*ours).reshape(blocks.shape) - blocks).square().sum(-1)
    assert (ours.scales > first).float().mean() > 0.1
    for above in range(-2, 4):
        scaled = blocks.abs() / torch.exp2(first + above - 127.0)[..., None]
        nearest = table[(scaled[..., None] - table).abs().argmin(-1)]
        error = ((nearest - scaled) * torch.exp2(first + above - 127.0)[..., None]).square().sum(-1)
        assert (found <= error * (1 + 1e-5)).all()


def test_modelopt_reads_the_same_mxfp4_values_and_rounds_up_only_where_a_block_would_saturate() -> None:
    """ModelOpt's scale is 2^ceil(log2(amax / 6)): OCP's, or twice it where the largest value is above 6 under OCP's."""
    from modelopt.torch.quantization.qtensor import MXFP4QTensor

    weight = gaussian(40, 256, 6, torch.float32, 0.05)
    ours = mxfp4.quantize(weight)
    read = MXFP4QTensor(weight.shape, torch.float32, ours.codes)
    values = read.dequantize(torch.float32, scale=ours.scales.reshape(-1, 1), block_sizes={-1: 32})
    assert torch.equal(values, mxfp4.dequantize(*ours))
    _, theirs = MXFP4QTensor.quantize(weight, 32)
    largest = weight.reshape(40, 8, 32).abs().amax(-1) / torch.exp2(ours.scales.float() - 127)
    assert torch.equal(theirs.reshape(40, 8).int() - ours.scales.int(), (largest > 6).int())


def test_compressed_tensors_reads_the_same_mxfp4_values() -> None:
    """Exactly: a power of two times one of eight magnitudes is a bf16 number."""
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    ours = mxfp4.quantize(gaussian(40, 256, 6, torch.bfloat16, 0.05))
    state = {"weight_packed": ours.codes, "weight_scale": ours.scales}
    values = MXFP4PackedCompressor.decompress(state, preset_name_to_scheme("MXFP4A16", ["Linear"]))["weight"]
    assert torch.equal(values.float(), mxfp4.dequantize(*ours))
