"""klein: a Qwen3 reads the prompt, hidden states of three of its layers are the embedding; distilled, or with a CFG batch."""

from __future__ import annotations

from fluxc.families.base import Family

KLEIN = Family("Flux2KleinPipeline", (9, 18, 27), {"enable_thinking": False})
