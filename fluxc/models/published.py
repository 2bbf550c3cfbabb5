"""The models of FLUX.2 as their config.json files describe them, for what needs shapes and no checkpoint."""

from __future__ import annotations

from typing import Any

from fluxc.models.mistral3 import Mistral3
from fluxc.models.qwen3 import Qwen3
from fluxc.models.text_encoder import TextEncoder

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

QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN3_8B: dict[str, Any] = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288}
MISTRAL_SMALL: dict[str, Any] = {
    "text_config": {
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
        "max_position_embeddings": 131072,
    }
}
"""Mistral-Small 3.2's language model."""
TEXT_ENCODERS: dict[str, tuple[TextEncoder, int]] = {
    "klein-4b": (Qwen3.read(QWEN3_4B), 27),
    "klein-9b": (Qwen3.read(QWEN3_8B), 27),
    "dev": (Mistral3.read(MISTRAL_SMALL), 30),
}
"""The text encoders of MODELS, and how many of their layers are used."""
