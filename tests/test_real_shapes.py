"""The graphs of the published models, from their configs alone: no weights, every tensor used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from conftest import NANO, exported
from fluxc.base.safetensors import TensorRef
from fluxc.families.klein import KLEIN
from fluxc.graph.bind import argument_names, bind
from fluxc.graph.compose import compose_body, compose_text_layer
from fluxc.graph.export import trace_text_encoder
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import QWEN3_4B
from fluxc.quantize.plan import precision_plan
from fluxc.recipe.structs import ComponentPrecision
from fluxc.targets.onnxruntime.lower import lower
from test_flux2_tables import DEV, KLEIN_4B

KEEP = ("x_embedder", "context_embedder", "time_guidance_embed*", "*modulation*", "norm_out*", "proj_out")


@pytest.mark.parametrize(("config", "products"), [(KLEIN_4B, 100), (DEV, 192)], ids=["klein-4B", "dev"])
def test_every_tensor_of_a_published_model_is_bound_once(config: dict[str, Any], products: int) -> None:
    full = {**config, "axes_dims_rope": [32] * 4, "rope_theta": 2000, "eps": 1e-6, "timestep_guidance_channels": 256}
    pieces = exported("transformer", full, 512, cfg_batch=not config["guidance_embeds"])
    body = compose_body(pieces, config["num_layers"], config["num_single_layers"], 512)
    layers = Flux2Transformer.read(full).linears
    plan = {e.layer.name: e for e in precision_plan("transformer", layers, ComponentPrecision("nvfp4", KEEP))}
    quantized = [name for name, entry in plan.items() if entry.format == "nvfp4"]
    assert len(quantized) == products

    refs = {name: reference(name, "BF16", shape) for name, shape in Flux2Transformer.read(full).tensors.items()}
    for name in quantized:
        rows, columns = refs[f"{name}.weight"].shape
        refs[f"{name}.weight"] = reference(f"{name}.weight", "U8", (rows, columns // 2))
        refs[f"{name}.weight_scale"] = reference(f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16))
        refs[f"{name}.weight_scale_2"] = reference(f"{name}.weight_scale_2", "F32", ())
        refs[f"{name}.input_scale"] = reference(f"{name}.input_scale", "F32", ())
    bound: list[str] = []
    for graph, neutral in {"prologue": pieces["prologue"], "body": body, "epilogue": pieces["epilogue"]}.items():
        lowered = lower(neutral, argument_names(neutral), {n: r.dtype for n, r in refs.items()}, plan, "nvfp4")
        bound += bind(lowered, argument_names(neutral), refs)
        assert len(lowered.SerializeToString()) < 4_000_000
        # ONNX Runtime would unfold the weights of all layers before the first is computed, were they not in front.
        computed = argument_names(neutral)
        depends = []
        for node in lowered.graph.node:
            depends.append(not computed.isdisjoint(node.input))
            computed |= set(node.output) if depends[-1] else set()
        assert depends == sorted(depends)
        assert not depends[0]
        if graph == "body":
            assert sum(node.op_type == "MatMulNBits" for node in lowered.graph.node) == products
    # A fusion group rounds its common input once, with one of the members' equal input scales.
    shared = {
        f"{entry.layer.name}.input_scale"
        for entry in plan.values()
        if entry.layer.group and not entry.layer.name.endswith(("to_q", "add_q_proj"))
    }
    assert sorted(bound) == sorted(set(refs) - shared)


def test_rotary_tables_of_a_text_of_512_tokens_are_constants() -> None:
    config = json.loads((NANO / "text_encoder" / "config.json").read_text())
    qwen = {**config, "head_dim": QWEN3_4B["head_dim"]}
    pieces = trace_text_encoder(qwen, 512, KLEIN, torch.bfloat16)
    layer = compose_text_layer(pieces)
    assert [value.name for value in layer.graph.input if "." not in value.name] == ["hidden", "attends"]

    settings = Qwen3Config.from_dict(qwen)
    tables = Qwen3RotaryEmbedding(settings)(torch.empty(1, 1, 1, dtype=torch.bfloat16), torch.arange(512)[None])
    stored = {tensor.name: tensor for tensor in layer.graph.initializer}
    for name, expected in zip(("cos", "sin"), tables, strict=True):
        made = torch.frombuffer(bytearray(stored[name].raw_data), dtype=torch.bfloat16)
        assert torch.equal(made, expected.flatten())


def reference(name: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(name, dtype, shape, Path("weights.safetensors"), 0, 0)
