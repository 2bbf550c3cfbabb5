"""Qwen3ForCausalLM as a text encoder, by its config: Linears and tensors, names and shapes as in transformers 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec

from fluxc.models.base import Linear, Shape
from fluxc.models.config import Factor, Layers, Size, read_config


class Qwen3(msgspec.Struct, frozen=True):
    """The fields of the config that decide about tensors and sizes, with transformers' defaults."""

    class_name: ClassVar[str] = "Qwen3ForCausalLM"

    vocab_size: Size = 151936
    hidden_size: Size = 4096
    intermediate_size: Size = 22016
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = 32
    head_dim: Size | None = 128
    hidden_act: str = "silu"
    rms_norm_eps: Factor = 1e-6
    layer_types: tuple[str, ...] | None = None
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, which does not divide num_attention_heads, "
                f"{self.num_attention_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, and num_hidden_layers is {self.num_hidden_layers}"
            )

    @classmethod
    def read(cls, config: dict[str, Any], where: Path = Path()) -> Qwen3:
        """From config.json's fields; CheckpointError naming `where` and the field that does not fit."""
        return read_config(cls, config, where)

    @property
    def head_width(self) -> int:
        """Features of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def linears(self, layers: int) -> list[Linear]:
        """The Linears of the first `layers` layers, in forward order."""
        width, hidden = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_width
        keys = (self.num_key_value_heads or self.num_attention_heads) * self.head_width
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

    def tensors(self, layers: int) -> dict[str, Shape]:
        """The tensors of the first `layers` layers, with the embedding and the final norm."""
        tensors: dict[str, Shape] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        for layer in self.linears(layers):
            tensors[f"{layer.name}.weight"] = (layer.out_features, layer.in_features)
        for number in range(layers):
            block = f"model.layers.{number}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{block}.{norm}.weight"] = (self.hidden_size,)
            for norm in ("q_norm", "k_norm"):
                tensors[f"{block}.self_attn.{norm}.weight"] = (self.head_width,)
        return tensors
