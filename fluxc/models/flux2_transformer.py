"""Flux2Transformer2DModel by its config: Linears and tensors, names and shapes as in diffusers."""

from __future__ import annotations

from typing import Any

from fluxc.models.base import Linear, Shape


def transformer_linears(config: dict[str, Any]) -> list[Linear]:
    """Every Linear of Flux2Transformer2DModel in forward order."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    width = heads * head_dim
    hidden = int(width * config["mlp_ratio"])
    channels = config["in_channels"]
    out_channels = (config.get("out_channels") or channels) * config.get("patch_size", 1) ** 2
    time = config.get("timestep_guidance_channels", 256)
    layers = [
        Linear("time_guidance_embed.timestep_embedder.linear_1", width, time),
        Linear("time_guidance_embed.timestep_embedder.linear_2", width, width),
    ]
    if config.get("guidance_embeds", True):
        layers += [
            Linear("time_guidance_embed.guidance_embedder.linear_1", width, time),
            Linear("time_guidance_embed.guidance_embedder.linear_2", width, width),
        ]
    layers += [
        Linear("double_stream_modulation_img.linear", 6 * width, width),
        Linear("double_stream_modulation_txt.linear", 6 * width, width),
        Linear("single_stream_modulation.linear", 3 * width, width),
        Linear("x_embedder", width, channels),
        Linear("context_embedder", width, config["joint_attention_dim"]),
    ]
    for number in range(config["num_layers"]):
        block = f"transformer_blocks.{number}"
        image, text = f"{block}.attn.to_qkv", f"{block}.attn.to_added_qkv"
        layers += [Linear(f"{block}.attn.to_{part}", width, width, image) for part in "qkv"]
        layers += [Linear(f"{block}.attn.add_{part}_proj", width, width, text) for part in "qkv"]
        layers += [
            Linear(f"{block}.attn.to_out.0", width, width),
            Linear(f"{block}.attn.to_add_out", width, width),
            Linear(f"{block}.ff.linear_in", 2 * hidden, width),
            Linear(f"{block}.ff.linear_out", width, hidden),
            Linear(f"{block}.ff_context.linear_in", 2 * hidden, width),
            Linear(f"{block}.ff_context.linear_out", width, hidden),
        ]
    for number in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{number}.attn"
        layers += [
            Linear(f"{block}.to_qkv_mlp_proj", 3 * width + 2 * hidden, width),
            Linear(f"{block}.to_out", width, width + hidden),
        ]
    return [*layers, Linear("norm_out.linear", 2 * width, width), Linear("proj_out", out_channels, width)]


def transformer_tensors(config: dict[str, Any]) -> dict[str, Shape]:
    """Every tensor of the transformer's checkpoint and its shape: the Linears' weights and the Q/K norms."""
    head_dim = (config["attention_head_dim"],)
    tensors: dict[str, Shape] = {
        f"{layer.name}.weight": (layer.out_features, layer.in_features) for layer in transformer_linears(config)
    }
    for number in range(config["num_layers"]):
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            tensors[f"transformer_blocks.{number}.attn.{norm}.weight"] = head_dim
    for number in range(config["num_single_layers"]):
        for norm in ("norm_q", "norm_k"):
            tensors[f"single_transformer_blocks.{number}.attn.{norm}.weight"] = head_dim
    return tensors
