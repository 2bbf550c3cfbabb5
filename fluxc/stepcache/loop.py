"""Lets diffusers keep sigma in fp32 while its model computes in bf16, as the runtime does; fp32 latents are given to it.

In a bf16 pipeline the latents, and sigma inside the model, are rounded to bf16. Of 50 steps the first are closer together than
that: neighbours become one, and others twice as far apart, so that changes from step to step would be those of the rounding.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

SIGMA: ContextVar[torch.Tensor | None] = ContextVar("SIGMA", default=None)
"""Of the pass that has begun and not embedded it yet; passes that go side by side have contexts of their own."""


class FullPrecisionLoop:
    """Hooks on a transformer; `remove` takes them off."""

    def __init__(self, transformer: Any) -> None:
        def on_pass(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            SIGMA.set(kwargs["timestep"])

        def on_sinusoids(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # The same layer embeds the guidance afterwards.
            sigma = SIGMA.get()
            SIGMA.set(None)
            return None if sigma is None else (sigma.float() * 1000,)

        self._handles = [
            transformer.register_forward_pre_hook(on_pass, with_kwargs=True),
            transformer.time_guidance_embed.time_proj.register_forward_pre_hook(on_sinusoids),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
