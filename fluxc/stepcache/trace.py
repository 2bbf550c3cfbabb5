"""The step trace: how much every step changes, and what reusing an older residual in its place would cost.

Residuals are reused at two levels. Ours, and the authors': what the blocks added to the image tokens. VisualGen's: what the
whole transformer added to the latents.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class StepTrace:
    """Every step of some images, float64; P images of T steps, B guidance branches.

    `change` [P, T]: mean |m_t - m_(t-1)| / mean |m_(t-1)| of the modulated input m. `residual_change` and `latent_change`
    [P, T, B]: the same of the residuals. The first step of each is 0. `residual_error` and `latent_error` [P, T, LAGS]: with
    the residual of lag + 1 steps before, the root mean square by which the latents after the step would be off; infinite
    where there is no such step.
    """

    change: np.ndarray
    residual_change: np.ndarray
    latent_change: np.ndarray
    residual_error: np.ndarray
    latent_error: np.ndarray

    @property
    def images(self) -> int:
        return len(self.change)

    @property
    def steps(self) -> int:
        return int(self.change.shape[1])

    def of(self, images: list[int]) -> StepTrace:
        """The trace of these images alone."""
        return StepTrace(**{field.name: getattr(self, field.name)[images] for field in fields(self)})

    def is_finite(self) -> bool:
        """Whether no step saw a NaN or an infinity."""
        ours = all(np.isfinite(getattr(self, name)).all() for name in ("change", "residual_change", "latent_change"))
        return ours and not any(np.isnan(error).any() for error in (self.residual_error, self.latent_error))


def joined(traces: list[StepTrace]) -> StepTrace:
    """The images of several traces of the same number of steps, in order."""
    return StepTrace(**{f.name: np.concatenate([getattr(t, f.name) for t in traces]) for f in fields(StepTrace)})
