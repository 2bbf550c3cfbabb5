"""Weights in memory: the prediction against the bytes the writer writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import NANO
from fluxc.base.safetensors import read_header
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.memory import weights_memory
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.writer import write_weights
from fluxc.recipe.structs import ComponentPrecision, Rule
from test_flux2_tables import DEV, NANO_CONFIG


@pytest.mark.parametrize(
    "precision",
    [
        ComponentPrecision(default="bf16"),
        ComponentPrecision(default="fp8"),
        ComponentPrecision(default="nvfp4", preset="trtllm-auto", rules=(Rule(match="*.ff_context.*", format="fp8"),)),
    ],
    ids=["bf16", "fp8", "mixed"],
)
def test_predicted_bytes_equal_what_is_written(precision: ComponentPrecision, tmp_path: Path) -> None:
    tensors = read_header(NANO / "transformer" / "diffusion_pytorch_model.safetensors")
    plan = precision_plan("transformer", Flux2Transformer.read(NANO_CONFIG).linears, precision)
    memory = weights_memory({name: ref.shape for name, ref in tensors.items()}, plan)
    path = tmp_path / "weights.safetensors"
    write_weights(path, tensors, plan, {entry.layer.name: 1.0 for entry in plan})
    written = sum(ref.nbytes for ref in read_header(path).values())
    assert written == memory.planned
    if precision.default == "bf16":
        assert written == memory.bf16 == sum(ref.nbytes for ref in tensors.values())
    if precision.default == "fp8":
        assert written == memory.fp8


def test_dev_in_bf16_fp8_and_nvfp4() -> None:
    """60.0 GiB in bf16 is the published checkpoint's size; FP8 halves it, NVFP4's 4.5 bits take 4.5/16 of it."""
    plan = precision_plan("transformer", Flux2Transformer.read(DEV).linears, ComponentPrecision(default="nvfp4"))
    memory = weights_memory(Flux2Transformer.read(DEV).tensors, plan)
    assert memory.bf16 / 2**30 == pytest.approx(60.0, abs=0.05)
    assert memory.fp8_change == pytest.approx(-0.5, abs=1e-4)
    assert memory.planned_change == pytest.approx(4.5 / 16 - 1, abs=1e-4)
    assert memory.planned == by_modelopt(DEV)


def by_modelopt(config: dict[str, Any]) -> int:
    """Bytes of the transformer as diffusers makes it and modelopt stores it: 16 rows of each Linear's width are quantized."""
    from diffusers import Flux2Transformer2DModel
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(config)
    total = sum(2 * parameter.numel() for parameter in model.parameters())
    widths: dict[int, int] = {}
    for layer in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        if layer.in_features not in widths:
            packed, scales, tensor_scale = NVFP4QTensor.quantize(torch.ones(16, layer.in_features).bfloat16(), 16)
            widths[layer.in_features] = packed._quantized_data.nbytes + scales.nbytes
            scalars = 2 * tensor_scale.nbytes
        total += widths[layer.in_features] * layer.out_features // 16 + scalars - 2 * layer.weight.numel()
    return total


def test_unquantized_tensors_count_as_the_checkpoint_stores_them() -> None:
    plan = precision_plan("transformer", Flux2Transformer.read(NANO_CONFIG).linears, ComponentPrecision(default="bf16"))
    shapes = Flux2Transformer.read(NANO_CONFIG).tensors
    in_float32 = {name: 4 * shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    memory = weights_memory(shapes, plan, in_float32)
    assert memory.planned == 2 * memory.bf16
