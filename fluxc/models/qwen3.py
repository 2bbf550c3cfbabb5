"""Qwen3ForCausalLM as a text encoder, by its config: Linears and tensors, names and shapes as in transformers."""

from __future__ import annotations

from typing import Any

from fluxc.models.base import Linear, Shape


def text_linears(config: dict[str, Any], layers: int) -> list[Linear]:
    """The Linears of the first `layers` layers of a Qwen3 text encoder, in forward order."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found = []
    for number in range(layers):
        block = f"model.layers.{number}"
        qkv, gate_up = f"{block}.self_attn.qkv_proj", f"{block}.mlp.gate_up_proj"
        found += [
            Linear(f"{block}.self_attn.q_proj", queries, width, qkv),
            Linear(f"{block}.self_attn.k_proj", keys, width, qkv),
            Linear(f"{block}.self_attn.v_proj", keys, width, qkv),
            Linear(f"{block}.self_attn.o_proj", width, queries),
            Linear(f"{block}.mlp.gate_proj", hidden, width, gate_up),
            Linear(f"{block}.mlp.up_proj", hidden, width, gate_up),
            Linear(f"{block}.mlp.down_proj", width, hidden),
        ]
    return found


def text_tensors(config: dict[str, Any], layers: int) -> dict[str, Shape]:
    """The tensors of the first `layers` layers of a Qwen3 text encoder, with the embedding and the final norm."""
    width = config["hidden_size"]
    head_dim = config.get("head_dim") or width // config["num_attention_heads"]
    tensors: dict[str, Shape] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in text_linears(config, layers):
        tensors[f"{layer.name}.weight"] = (layer.out_features, layer.in_features)
    for number in range(layers):
        block = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = (width,)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{block}.self_attn.{norm}.weight"] = (head_dim,)
    return tensors
