"""Runs diffusers' pipeline over the calibration prompts and records the largest input magnitude of every Linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fluxc.checkpoint.source import Checkpoint
from fluxc.errors import BuildError
from fluxc.reference import draw, load_pipeline


class AmaxObserver:
    """Forward pre-hooks on every Linear of a module; `amax` holds the largest |input| by module name."""

    def __init__(self, module: nn.Module) -> None:
        self.amax: dict[str, float] = {}
        self._handles = [
            child.register_forward_pre_hook(self._hook(name))
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def record(_: nn.Module, inputs: Any) -> None:
            seen = inputs[0].detach().abs().amax().item()
            known = self.amax.get(name, 0.0)
            # max() may drop a NaN; once seen it stays, so that it is reported.
            self.amax[name] = known if math.isnan(known) or known >= seen else seen

        return record

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def calibrate(
    checkpoint: Checkpoint,
    prompts: list[str],
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    seed: int,
    text_length: int,
    text_layers: tuple[int, ...],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """{component: {layer: amax}} over all prompts, steps and guidance branches, in bfloat16 as the model is served.

    Prompt i starts from the runtime's noise for `seed` + i.
    """
    pipeline = load_pipeline(checkpoint, torch.bfloat16)
    observers = {name: AmaxObserver(getattr(pipeline, name)) for name in ("transformer", "text_encoder")}
    for number, prompt in enumerate(prompts):
        picture = draw(
            pipeline,
            checkpoint,
            prompt,
            size=size,
            steps=steps,
            guidance=guidance,
            seed=seed + number,
            text_length=text_length,
            text_layers=text_layers,
        )
        if picture.max() == picture.min():
            raise BuildError(
                f"calibration: the model draws one flat colour for {prompt!r}; "
                "the checkpoint is damaged, or guidance and steps do not suit it"
            )
        if on_progress:
            on_progress(number + 1, len(prompts))
    for observer in observers.values():
        observer.remove()
    return {name: observer.amax for name, observer in observers.items()}
