"""Mistral3ForConditionalGeneration as a text encoder, by its config: its language model alone, no head and no vision tower.

Names as in the published files, which transformers 5 writes too: `language_model.model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fluxc.base.errors import CheckpointError
from fluxc.models.config import Factor, Layers, Size
from fluxc.models.text_encoder import TextEncoder, first_layers

TEXT = "text_config"


class Mistral3(TextEncoder, frozen=True):
    """The fields of the config's text part that decide about tensors and sizes, with the defaults of transformers' Mistral."""

    class_name: ClassVar[str] = "Mistral3ForConditionalGeneration"
    model_class: ClassVar[str] = "MistralModel"
    prefix: ClassVar[str] = "language_model.model."
    unread: ClassVar[tuple[str, ...]] = ("language_model.lm_head.", "vision_tower.", "multi_modal_projector.")
    head_norms: ClassVar[bool] = False

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 14336
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = 8
    head_dim: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Factor = 1e-6
    sliding_window: Size | None = 4096

    @classmethod
    def of_text(cls, config: dict[str, Any], where: Path = Path()) -> dict[str, Any]:
        """`text_config`, which must be a Mistral's."""
        found = config.get(TEXT)
        if not isinstance(found, dict) or found.get("model_type", "mistral") != "mistral":
            kind = found.get("model_type") if isinstance(found, dict) else None
            raise CheckpointError(
                f"{where / 'config.json'}: its {TEXT} is {f'of the type {kind!r}' if kind else 'missing'}, expected that of a "
                "Mistral; use the text encoder as published"
            )
        return found

    @classmethod
    def with_layers(cls, config: dict[str, Any], kept: int) -> dict[str, Any]:
        """config.json for the first `kept` layers of the language model, and no head: tied, it needs no tensor."""
        text = first_layers(config[TEXT], kept) | {"tie_word_embeddings": True}
        return config | {TEXT: text, "tie_word_embeddings": True}

    @property
    def window(self) -> int | None:
        """How many tokens back attention reaches; None if all."""
        return self.sliding_window
