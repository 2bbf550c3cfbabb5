"""klein: a Qwen3 reads the prompt, hidden states of three of its layers are the embedding; distilled, or with a CFG batch."""

from __future__ import annotations

from fluxc.families.base import Family, Prompts

KLEIN = Family("Flux2KleinPipeline", (9, 18, 27), Prompts({"add_generation_prompt": True, "enable_thinking": False}))
