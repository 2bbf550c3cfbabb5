"""FP8 numerics against modelopt."""

from __future__ import annotations

import pytest
import torch

from fluxc.formats import fp8


@pytest.mark.parametrize("shape", [(1, 16), (96, 32), (128, 512)])
def test_codes_equal_modelopt_bit_for_bit(shape: tuple[int, int]) -> None:
    from modelopt.torch.quantization.qtensor import FP8QTensor

    weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.1).to(torch.bfloat16)
    scale = fp8.tensor_scale(weight.abs().amax())
    theirs, their_scale = FP8QTensor.quantize(weight.float(), scales=scale)
    assert torch.equal(their_scale.reshape(()), scale)
    assert torch.equal(fp8.quantize(weight, scale).view(torch.uint8), theirs._quantized_data.view(torch.uint8))


def test_all_zero_tensor_gives_zeros() -> None:
    weight = torch.zeros(4, 4)
    scale = fp8.tensor_scale(weight.abs().amax())
    assert fp8.dequantize(fp8.quantize(weight, scale), scale).abs().max() == 0
