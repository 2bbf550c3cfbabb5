"""Records, while diffusers generates, how much each step changes, and what reusing an older residual for it would cost."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from fluxc.checkpoint.reference import guided
from fluxc.recipe.structs import LAGS
from fluxc.running.lockstep import CALL
from fluxc.running.skipping import modulated_input, relative_change
from fluxc.stepcache.trace import StepTrace


class StepObserver:
    """Hooks on a Flux2Transformer2DModel while it generates with `branches` passes a step and scale `guidance`.

    Images are told apart by the number of the call of PlacedModel.run that generates them.
    """

    def __init__(self, transformer: Any, branches: int, guidance: float) -> None:
        self._images: dict[int, _Image] = {}

        def image() -> _Image:
            return self._images.setdefault(CALL.get(0), _Image(transformer, branches, guidance))

        def on_first_block(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            image().enter_blocks(kwargs["hidden_states"].detach(), kwargs["temb_mod_img"].detach())

        def on_output_layers(_: Any, args: tuple[Any, ...]) -> None:
            image().leave_blocks(args[0].detach(), args[1].detach())

        def on_pass(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
            latents, velocity = kwargs["hidden_states"].detach().float(), output[0].detach().float()
            image().end_pass(latents, velocity, float(kwargs["timestep"].flatten()[0]))

        self._handles = [
            transformer.transformer_blocks[0].register_forward_pre_hook(on_first_block, with_kwargs=True),
            transformer.norm_out.register_forward_pre_hook(on_output_layers),
            transformer.register_forward_hook(on_pass, with_kwargs=True),
        ]

    def take(self, count: int = 1) -> list[StepTrace]:
        """The traces of the `count` images generated since the last `take`, in order."""
        images, self._images = self._images, {}
        return [images[number].trace() for number in range(count)]

    def velocity_errors(self, count: int = 1) -> list[np.ndarray]:
        """Of the same images before `take`, float64 [T, LAGS]: the relative squared error of the guided velocity with the
        residual of lag + 1 steps before, infinite where there is no such step."""
        return [self._images[number].velocity_errors() for number in range(count)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Image:
    """What is known of one image while it is generated."""

    def __init__(self, transformer: Any, branches: int, guidance: float) -> None:
        self._model, self._branches, self._guidance = transformer, branches, guidance
        self._comparing = False
        self._hidden = self._temb = self._signal = torch.empty(0)
        self._passes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._residuals: list[torch.Tensor] = []
        self._old: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._sigmas: list[float] = []
        self._speeds: list[float] = []

    def enter_blocks(self, hidden: torch.Tensor, modulation: torch.Tensor) -> None:
        """A pass comes to the first block; both passes of a step come with the same image tokens."""
        self._hidden = hidden
        self._signal = modulated_input(self._model, hidden, modulation)

    def leave_blocks(self, hidden: torch.Tensor, temb: torch.Tensor) -> None:
        """A pass comes out of the last block."""
        if not self._comparing:
            self._temb = temb
            self._residuals.append(hidden.float() - self._hidden.float())

    def end_pass(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: float) -> None:
        """A pass gave its velocity."""
        self._passes.append((latents, velocity))
        if len(self._passes) == self._branches:
            self._finish_step(sigma)

    def _finish_step(self, sigma: float) -> None:
        step: dict[str, Any] = {
            "signal": self._signal,
            "residuals": self._residuals,
            "latent_residuals": [velocity - latents for latents, velocity in self._passes],
        }
        whole = guided([velocity for _, velocity in self._passes], self._guidance)
        none = [0.0] * self._branches
        row: dict[str, Any] = {"change": 0.0, "residual_change": none, "latent_change": none}
        if self._old:
            before = self._old[0]
            row["change"] = relative_change(step["signal"], before["signal"])
            for name, level in (("residual_change", "residuals"), ("latent_change", "latent_residuals")):
                row[name] = [relative_change(new, old) for new, old in zip(step[level], before[level], strict=True)]
        latents = [latents for latents, _ in self._passes]
        errors = {"residual_error": [np.inf] * LAGS, "latent_error": [np.inf] * LAGS}
        for lag, old in enumerate(self._old):
            velocities = self._velocities(old["residuals"])
            errors["residual_error"][lag] = _rms(guided(velocities, self._guidance) - whole)
            shifted = [x + residual for x, residual in zip(latents, old["latent_residuals"], strict=True)]
            errors["latent_error"][lag] = _rms(guided(shifted, self._guidance) - whole)
        self._rows.append(row | errors)
        self._sigmas.append(sigma)
        self._speeds.append(_rms(whole))
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

    def trace(self) -> StepTrace:
        """Every step of the image."""
        lengths = np.abs(np.diff([*self._sigmas, 0.0]))[:, None]
        columns = {f.name: np.array([row[f.name] for row in self._rows], np.float64) for f in fields(StepTrace)}
        for name in ("residual_error", "latent_error"):
            columns[name] = columns[name] * lengths
        return StepTrace(**{name: column[None] for name, column in columns.items()})

    def velocity_errors(self) -> np.ndarray:
        """Of every step, by lag."""
        errors = np.array([row["residual_error"] for row in self._rows], np.float64)
        return np.square(errors / np.array(self._speeds)[:, None])


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())
