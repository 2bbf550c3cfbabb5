"""Whether the Linears of a fusion group are smoothed: solved with it and without, and compared with their inputs rounded.

1. The group's p follows from calibration's largest input of every channel and the largest weight of it in any member
   (fluxc.formats.smoothing); it is there before the calls that the group is solved on.
2. What is solved under it is W / p on inputs x p, as any group (fluxc.calibrate.solve_group).
3. Both results are judged on inputs that were held out, rounded under the `input_scale` that each would be stored with. The
   one that loses less is taken, of a group as a whole: the mean over its members of what is lost of their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fluxc.calibrate.amax import input_amax
from fluxc.calibrate.records import LayerInputs
from fluxc.formats.registry import FORMATS
from fluxc.formats.smoothing import fit
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Calibration

NOT_HELD_OUT = "not smoothed: no inputs were held out to judge it by"
NOT_SOLVED = "not smoothed: the smoothed weights could not be solved"
NOT_BETTER = "not smoothed: with rounded inputs no less is lost"


@dataclass(frozen=True)
class Ranges:
    """What calibration recorded of layers' inputs, and the `settings` by which their ranges follow from it."""

    records: Mapping[str, LayerInputs]
    settings: Calibration

    def of(self, group: list[LayerPlan], columns: np.ndarray) -> np.ndarray:
        """p of a group, bf16 patterns [in]; `columns` fp32 [in] are the largest weights of every channel in any member."""
        inputs = [self.records[entry.layer.name].channel_amax for entry in group]
        return fit(np.max(inputs, axis=0), columns)

    def rounded(self, group: list[LayerPlan], x: torch.Tensor, smoothing: np.ndarray | None = None) -> torch.Tensor:
        """`x` fp32 [rows, in] as the layers of the group get them: rounded, behind p where `smoothing` fp32 [in] is given."""
        name, format = group[0].layer.name, FORMATS[group[0].format]
        taken = {} if smoothing is None else {name: smoothing}
        amax = input_amax(dict(self.records), group, self.settings, taken)[name]
        return format.fake_quantize(x, format.tensor_scale(torch.tensor(amax)))
