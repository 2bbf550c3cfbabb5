"""How large the inputs of FLUX.2's Linears are, for builds that run no model: a published table, and a constant.

The table is reduced from NVIDIA's FP8 checkpoint of FLUX.2 [dev] (Apache-2.0, see NOTICE): `input_scale` times 448, the
largest over the blocks, by kind of layer. It was calibrated there on random inputs, so a margin belongs on it. klein's layers
have the same names and the same places in the same blocks; there is no published table of klein's own.
"""

from __future__ import annotations

import re

from fluxc.models.published import MODELS

DEV: dict[str, float] = {
    "transformer_blocks.*.attn.to_q": 49.75,
    "transformer_blocks.*.attn.to_k": 49.75,
    "transformer_blocks.*.attn.to_v": 49.75,
    "transformer_blocks.*.attn.to_out.0": 19.0,
    "transformer_blocks.*.attn.add_q_proj": 58.0,
    "transformer_blocks.*.attn.add_k_proj": 58.0,
    "transformer_blocks.*.attn.add_v_proj": 58.0,
    "transformer_blocks.*.attn.to_add_out": 25.625,
    "transformer_blocks.*.ff.linear_in": 6.9375,
    "transformer_blocks.*.ff.linear_out": 25.375,
    "transformer_blocks.*.ff_context.linear_in": 26.5,
    "transformer_blocks.*.ff_context.linear_out": 1224.0,
    "single_transformer_blocks.*.attn.to_qkv_mlp_proj": 14.5625,
    "single_transformer_blocks.*.attn.to_out": 87.0,
}
"""The largest input magnitude of any block, by kind of layer."""

ANY_INPUT = 4096.0
"""A range for any layer: over three times the largest of the table; blocks of 16 keep NVFP4's precision in it down to a
largest magnitude of ANY_INPUT / 28672 = 0.14, FP8 single values (docs/calibration.md has the derivation and measurements)."""

WIDTHS = frozenset(config["num_attention_heads"] * config["attention_head_dim"] for config in MODELS.values())
"""Of the transformers that the table is taken for: klein 4B's, klein 9B's and dev's."""


def kind_of_layer(layer: str) -> str:
    """A layer's name with a star for the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", layer, count=1)


def published_range(layer: str, width: int) -> float | None:
    """The largest input magnitude that the table has for `layer` of a transformer of this width; None where it has none."""
    return DEV.get(kind_of_layer(layer)) if width in WIDTHS else None
