"""Lets diffusers keep sigma and latents in fp32 while its model computes in bf16, as the runtime does.

In a bf16 pipeline the latents, and sigma inside the model, are rounded to bf16. Of 50 steps the first are closer together than
that: neighbours become one, and others twice as far apart, so that changes from step to step would be those of the rounding.
"""

from __future__ import annotations

from typing import Any

import torch


class FullPrecisionLoop:
    """Hooks on a pipeline that is then given fp32 `latents`; `remove` takes them off."""

    def __init__(self, pipeline: Any) -> None:
        transformer, vae = pipeline.transformer, pipeline.vae
        embed = transformer.time_guidance_embed
        self._sigma: torch.Tensor | None = None

        def on_pass(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            self._sigma = kwargs["timestep"]

        def on_sinusoids(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # The same layer embeds the guidance afterwards.
            sigma, self._sigma = self._sigma, None
            return None if sigma is None else (sigma.float() * 1000,)

        def on_decode(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].to(vae.dtype), *args[1:])

        self._handles = [
            transformer.register_forward_pre_hook(on_pass, with_kwargs=True),
            embed.time_proj.register_forward_pre_hook(on_sinusoids),
            (vae.post_quant_conv or vae.decoder).register_forward_pre_hook(on_decode),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
