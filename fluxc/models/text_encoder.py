"""A decoder-only language model that reads prompts, by its config: what Qwen3 and Mistral have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec

from fluxc.models.base import Linear, Shape
from fluxc.models.config import Factor, Layers, Size, read_config


class TextEncoder(msgspec.Struct, frozen=True):
    """The fields of the config that decide about tensors and sizes.

    `class_name` is the component's class in transformers, `model_class` that of its layers, without a head. The names of the
    tensors of these begin with `prefix`, in the checkpoint and in a bundle; tensors that begin with one of `unread` may be
    there, and are never read. `head_norms`: whether queries and keys have norms of their own.
    """

    class_name: ClassVar[str]
    model_class: ClassVar[str]
    prefix: ClassVar[str]
    unread: ClassVar[tuple[str, ...]]
    head_norms: ClassVar[bool]

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None
    hidden_act: str
    rms_norm_eps: Factor

    def __post_init__(self) -> None:
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, which does not divide num_attention_heads, "
                f"{self.num_attention_heads}"
            )

    @classmethod
    def read(cls, config: dict[str, Any], where: Path = Path()) -> Self:
        """From config.json's fields; CheckpointError naming `where` and the field that does not fit."""
        return read_config(cls, cls.of_text(config, where), where)

    @classmethod
    def of_text(cls, config: dict[str, Any], where: Path = Path()) -> dict[str, Any]:
        """The part of config.json that describes the language model."""
        return config

    @classmethod
    def with_layers(cls, config: dict[str, Any], kept: int) -> dict[str, Any]:
        """config.json for the first `kept` layers, and no language-model head: tied, it needs no tensor."""
        return first_layers(config, kept) | {"tie_word_embeddings": True}

    @property
    def window(self) -> int | None:
        """How many tokens back attention reaches; None if all."""
        return None

    @property
    def head_width(self) -> int:
        """Features of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def embedding(self) -> str:
        """The name of the table of embeddings."""
        return f"{self.prefix}embed_tokens.weight"

    def linears(self, layers: int) -> list[Linear]:
        """The Linears of the first `layers` layers, in forward order."""
        width, hidden = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_width
        keys = (self.num_key_value_heads or self.num_attention_heads) * self.head_width
        found = []
        for number in range(layers):
            block = f"{self.prefix}layers.{number}"
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
            self.embedding: (self.vocab_size, self.hidden_size),
            f"{self.prefix}norm.weight": (self.hidden_size,),
        }
        for layer in self.linears(layers):
            tensors[f"{layer.name}.weight"] = (layer.out_features, layer.in_features)
        for number in range(layers):
            block = f"{self.prefix}layers.{number}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{block}.{norm}.weight"] = (self.hidden_size,)
            for norm in ("q_norm", "k_norm") if self.head_norms else ():
                tensors[f"{block}.self_attn.{norm}.weight"] = (self.head_width,)
        return tensors


def first_layers(config: dict[str, Any], kept: int) -> dict[str, Any]:
    """A language model's config for its first `kept` layers."""
    config = config | {"num_hidden_layers": kept}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:kept]
    return config
