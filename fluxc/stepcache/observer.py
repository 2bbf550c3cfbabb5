"""Records, while diffusers generates, how much each step changes, and what reusing an older residual for it would cost."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from fluxc.checkpoint.reference import guided
from fluxc.recipe.structs import LAGS
from fluxc.stepcache.trace import StepTrace


class StepObserver:
    """Hooks on a Flux2Transformer2DModel while it generates with `branches` passes a step and scale `guidance`."""

    def __init__(self, transformer: Any, branches: int, guidance: float) -> None:
        self._model, self._branches, self._guidance = transformer, branches, guidance
        self._comparing = False
        first, eps = transformer.transformer_blocks[0], transformer.config.eps

        def on_first_block(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            self._hidden = kwargs["hidden_states"].detach()
            if not self._passes:
                width = self._hidden.shape[-1]
                modulation = kwargs["temb_mod_img"].detach().float().reshape(1, 1, -1)
                plain = torch.nn.functional.layer_norm(self._hidden.float(), (width,), eps=eps)
                self._signal = plain * (1 + modulation[..., width : 2 * width]) + modulation[..., :width]

        def on_output_layers(_: Any, args: tuple[Any, ...]) -> None:
            if not self._comparing:
                self._temb = args[1].detach()
                self._residuals.append(args[0].detach().float() - self._hidden.float())

        def on_pass(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
            latents = kwargs["hidden_states"].detach().float()
            velocity = output[0].detach().float()
            self._passes.append((latents, velocity))
            if len(self._passes) == self._branches:
                self._finish_step(float(kwargs["timestep"].flatten()[0]))

        self._handles = [
            first.register_forward_pre_hook(on_first_block, with_kwargs=True),
            transformer.norm_out.register_forward_pre_hook(on_output_layers),
            transformer.register_forward_hook(on_pass, with_kwargs=True),
        ]
        self._start()

    def _start(self) -> None:
        self._passes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._residuals: list[torch.Tensor] = []
        self._old: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._sigmas: list[float] = []

    def _finish_step(self, sigma: float) -> None:
        step = {
            "signal": self._signal,
            "residuals": self._residuals,
            "latent_residuals": [velocity - latents for latents, velocity in self._passes],
        }
        whole = guided([velocity for _, velocity in self._passes], self._guidance)
        none = [0.0] * self._branches
        row: dict[str, Any] = {"change": 0.0, "residual_change": none, "latent_change": none}
        if self._old:
            before = self._old[0]
            row["change"] = _relative(step["signal"], before["signal"])
            for name, level in (("residual_change", "residuals"), ("latent_change", "latent_residuals")):
                row[name] = [_relative(new, old) for new, old in zip(step[level], before[level], strict=True)]
        latents = [latents for latents, _ in self._passes]
        errors = {"residual_error": [np.inf] * LAGS, "latent_error": [np.inf] * LAGS}
        for lag, old in enumerate(self._old):
            velocities = self._velocities(old["residuals"])
            errors["residual_error"][lag] = _rms(guided(velocities, self._guidance) - whole)
            shifted = [x + residual for x, residual in zip(latents, old["latent_residuals"], strict=True)]
            errors["latent_error"][lag] = _rms(guided(shifted, self._guidance) - whole)
        self._rows.append(row | errors)
        self._sigmas.append(sigma)
        self._old = [step, *self._old][:LAGS]
        self._passes, self._residuals = [], []

    def _velocities(self, residuals: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the output layers make of this step's tokens and these residuals."""
        model, dtype = self._model, self._hidden.dtype
        hidden = torch.cat([(self._hidden.float() + residual).to(dtype) for residual in residuals])
        self._comparing = True
        try:
            with torch.no_grad():
                velocity = model.proj_out(model.norm_out(hidden, self._temb)).float()
        finally:
            self._comparing = False
        return list(velocity.split(1))

    def take(self) -> StepTrace:
        """The trace of the one image generated since the last `take`."""
        lengths = np.abs(np.diff([*self._sigmas, 0.0]))[:, None]
        columns = {f.name: np.array([row[f.name] for row in self._rows], np.float64) for f in fields(StepTrace)}
        for name in ("residual_error", "latent_error"):
            columns[name] = columns[name] * lengths
        self._start()
        return StepTrace(**{name: column[None] for name, column in columns.items()})

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _relative(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new - old).abs().mean() / old.abs().mean())


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())
