"""What is said about a field of a recipe, in one place: errors, `fluxc schema` and the tables of docs/recipe.md all read it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

LEFT_OUT, NAMES = "left out", "names"
"""Keys of what a field says besides its description: what stands in for it where it is left out; the words it can be."""

FORMATS = {
    "nvfp4": "4 bits, an E4M3 scale for each 16 values and one for the tensor",
    "nvfp4-w4a16": "weights as `nvfp4`, inputs in 16 bits: a GPU dequantizes the weight and multiplies in bf16",
    "fp8": "8 bits (E4M3), one scale for the tensor",
    "mxfp4": "4 bits, a power of two as scale for each 32 values",
    "bf16": "16 bits: not quantized",
}
"""Number formats a recipe can name, and what they are; fluxc.formats.registry adds further ones."""
PRESETS = {
    "nvidia-blog": "embedders, modulation, ends, and the text projections of double blocks",
    "modelopt-flux2": "embedders, modulation, ends",
    "trtllm-auto": "narrow submodules outside the blocks",
}
"""Presets a recipe can name, and what they keep in bf16; fluxc.quantize.presets has the lists."""

MOST_STEPS = 1000
MOST_GUIDANCE = 1000
MOST_MARGIN = 1024
MOST_OVERLAP = 0.5
LONGEST_SIDE = 16384
"""Pixels."""
USUAL_SIDE = 1024
"""Pixels of FLUX.2's own default size."""
LONGEST_TEXT = 32768
"""Tokens."""
MOST_AT_ONCE = 64
"""Images of one run of the graphs."""
LAGS = 6
"""How many steps back a step trace measures a reused residual: the longest run of skipped steps any policy can have."""
LARGEST_SEED = 2**64 - 1
LEAST_SHARD_GIB = 2.0**-20
RANK_STEP, MOST_RANK = 16, 512
"""Of factors beside a weight: tensor cores multiply so many columns at once."""
BEST_PSNR_DB = 120
"""What identical images get."""

Steps = Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]
Guidance = Annotated[float, msgspec.Meta(ge=0, le=MOST_GUIDANCE)]
# JSON schemas and msgspec count in 63 bits; the upper limit of a seed is checked with the number of prompts.
Seed = Annotated[int, msgspec.Meta(ge=0)]
Side = Annotated[int, msgspec.Meta(ge=1, le=LONGEST_SIDE)]
Size = tuple[Side, Side]
"""Height and width in pixels."""
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Rank = Annotated[int, msgspec.Meta(ge=RANK_STEP, le=MOST_RANK)]
AtOnce = Annotated[int, msgspec.Meta(ge=1, le=MOST_AT_ONCE)]
Decibels = Annotated[float, msgspec.Meta(le=BEST_PSNR_DB)]
Format = Annotated[str, msgspec.Meta(extra={NAMES: ("format", FORMATS)}, extra_json_schema={"enum": list(FORMATS)})]
PresetName = Annotated[str, msgspec.Meta(extra={NAMES: ("preset", PRESETS)}, extra_json_schema={"enum": list(PRESETS)})]


def about(text: str, *examples: Any, left_out: str | None = None) -> msgspec.Meta:
    """What a field means, values it may have, and in words what holds where it is left out if that is no value of its own."""
    extra = {LEFT_OUT: left_out} if left_out else None
    return msgspec.Meta(description=text, examples=list(examples) or None, extra=extra)
