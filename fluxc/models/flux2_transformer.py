"""Flux2Transformer2DModel by its config: Linears and tensors, names and shapes as in diffusers 0.42."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec

from fluxc.models.base import Linear, Shape
from fluxc.models.config import Factor, Layers, Size, read_config


class Flux2Transformer(msgspec.Struct, frozen=True):
    """The fields of the config that decide about tensors, sizes and rotary embeddings, with diffusers' defaults."""

    class_name: ClassVar[str] = "Flux2Transformer2DModel"

    patch_size: Size = 1
    in_channels: Size = 128
    out_channels: Size | None = None
    num_layers: Layers = 8
    num_single_layers: Layers = 48
    attention_head_dim: Size = 128
    num_attention_heads: Size = 48
    joint_attention_dim: Size = 15360
    timestep_guidance_channels: Size = 256
    mlp_ratio: Factor = 3.0
    axes_dims_rope: tuple[Size, Size, Size, Size] = (32, 32, 32, 32)
    rope_theta: Factor = 2000
    eps: Factor = 1e-6
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(size % 2 for size in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {list(self.axes_dims_rope)}: even numbers that add up to attention_head_dim, "
                f"{self.attention_head_dim}, are needed"
            )

    @classmethod
    def read(cls, config: dict[str, Any], where: Path = Path()) -> Flux2Transformer:
        """From config.json's fields; CheckpointError naming `where` and the field that does not fit."""
        return read_config(cls, config, where)

    @property
    def width(self) -> int:
        """Features of a token between blocks."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Features of a token inside a feed-forward."""
        return int(self.width * self.mlp_ratio)

    @property
    def blocks(self) -> int:
        """Blocks of both kinds."""
        return self.num_layers + self.num_single_layers

    @property
    def linears(self) -> list[Linear]:
        """Every Linear, in forward order."""
        width, hidden = self.width, self.mlp_width
        out_channels = (self.out_channels or self.in_channels) * self.patch_size**2
        time = self.timestep_guidance_channels
        layers = [
            Linear("time_guidance_embed.timestep_embedder.linear_1", width, time),
            Linear("time_guidance_embed.timestep_embedder.linear_2", width, width),
        ]
        if self.guidance_embeds:
            layers += [
                Linear("time_guidance_embed.guidance_embedder.linear_1", width, time),
                Linear("time_guidance_embed.guidance_embedder.linear_2", width, width),
            ]
        layers += [
            Linear("double_stream_modulation_img.linear", 6 * width, width),
            Linear("double_stream_modulation_txt.linear", 6 * width, width),
            Linear("single_stream_modulation.linear", 3 * width, width),
            Linear("x_embedder", width, self.in_channels),
            Linear("context_embedder", width, self.joint_attention_dim),
        ]
        for number in range(self.num_layers):
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
        for number in range(self.num_single_layers):
            block = f"single_transformer_blocks.{number}.attn"
            layers += [
                Linear(f"{block}.to_qkv_mlp_proj", 3 * width + 2 * hidden, width),
                Linear(f"{block}.to_out", width, width + hidden),
            ]
        return [*layers, Linear("norm_out.linear", 2 * width, width), Linear("proj_out", out_channels, width)]

    @property
    def tensors(self) -> dict[str, Shape]:
        """Every tensor of the checkpoint and its shape: the Linears' weights and the Q/K norms."""
        tensors: dict[str, Shape] = {
            f"{layer.name}.weight": (layer.out_features, layer.in_features) for layer in self.linears
        }
        for number in range(self.num_layers):
            for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                tensors[f"transformer_blocks.{number}.attn.{norm}.weight"] = (self.attention_head_dim,)
        for number in range(self.num_single_layers):
            for norm in ("norm_q", "norm_k"):
                tensors[f"single_transformer_blocks.{number}.attn.{norm}.weight"] = (self.attention_head_dim,)
        return tensors
