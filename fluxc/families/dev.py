"""dev: a Mistral3 reads the prompt after a system message, padded on the left; the scale of the guidance is embedded.

Read in diffusers 0.42.1 (pipeline_flux2.py, system_messages.py).
"""

from __future__ import annotations

from fluxc.families.base import Family, Prompts
from fluxc.models.mistral3 import Mistral3

DEV = Family(
    "Flux2Pipeline",
    (10, 20, 30),
    Prompts(
        {"add_generation_prompt": False},
        system="diffusers.pipelines.flux2.system_messages:SYSTEM_MESSAGE",
        removed=("[IMG]",),
        padding="left",
        special_tokens=False,
        parts=True,
    ),
    text_encoder=Mistral3,
)
