"""A toy family: klein's models under another pipeline class, which takes other layers of the text encoder."""

from __future__ import annotations

from fluxc.families.base import Family, Prompts, register

TOY = Family(
    "ToyPipeline",
    text_layers=(4, 11, 20),
    prompts=Prompts({"add_generation_prompt": True, "enable_thinking": False}),
    diffusers_class="Flux2KleinPipeline",
)

register(TOY)
