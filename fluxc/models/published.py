"""The transformers of FLUX.2 as their config.json files describe them, for what needs shapes and no checkpoint."""

from __future__ import annotations

from typing import Any

KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 7680,
    "in_channels": 128,
    "mlp_ratio": 3.0,
    "guidance_embeds": False,
}
KLEIN_9B: dict[str, Any] = {
    **KLEIN_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
DEV: dict[str, Any] = {
    **KLEIN_9B,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
MODELS = {"klein-4b": KLEIN_4B, "klein-9b": KLEIN_9B, "dev": DEV}
