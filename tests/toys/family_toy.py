"""A toy family: klein's models under another pipeline class, which takes other layers of the text encoder."""

from __future__ import annotations

from fluxc.families.base import Family, register

TOY = Family(
    "ToyPipeline",
    text_layers=(4, 11, 20),
    template_options={"enable_thinking": False},
    diffusers_class="Flux2KleinPipeline",
)

register(TOY)
