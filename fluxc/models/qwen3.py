"""Qwen3ForCausalLM as a text encoder, by its config: names and shapes as in transformers 5."""

from __future__ import annotations

from typing import Any, ClassVar

from fluxc.models.config import Factor, Layers, Size
from fluxc.models.text_encoder import TextEncoder


class Qwen3(TextEncoder, frozen=True):
    """The fields of the config that decide about tensors and sizes, with transformers' defaults."""

    class_name: ClassVar[str] = "Qwen3ForCausalLM"
    model_class: ClassVar[str] = "Qwen3Model"
    prefix: ClassVar[str] = "model."
    unread: ClassVar[tuple[str, ...]] = ("lm_head.",)
    head_norms: ClassVar[bool] = True

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
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, and num_hidden_layers is {self.num_hidden_layers}"
            )

    @property
    def window(self) -> int | None:
        """How many tokens back attention reaches in the layers where that is bounded; None if there are none."""
        slides = self.use_sliding_window if self.layer_types is None else "sliding_attention" in self.layer_types
        return self.sliding_window if slides else None
