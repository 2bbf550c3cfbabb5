"""Presets: published lists of the layers that stay bf16, by name, each with its source.

A part is a pattern as in a recipe's `exclude`, naming layers of an ordinary diffusers checkpoint. One that matches no layer is
an error, unless the part says why a model may lack the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxc.base.errors import RecipeError, nearest
from fluxc.models.base import Linear
from fluxc.quantize.patterns import matched, matching


@dataclass(frozen=True)
class Part:
    """A pattern whose layers stay bf16; `absent` says why a FLUX.2 may have no such layer (None: it must have one)."""

    pattern: str
    absent: str | None = None


@dataclass(frozen=True)
class Preset:
    """What a published list keeps in bf16, in whose words, and for which component.

    `narrow`: further keep every submodule outside the blocks that holds a Linear of at most so many inputs or outputs.
    """

    name: str
    meaning: str
    source: str
    parts: tuple[Part, ...] = ()
    narrow: int | None = None
    component: str = "transformer"


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "nvidia-blog",
            "embedders, modulation, output layers, and the text stream's attention projections",
            "NVIDIA developer blog, Scaling NVFP4 Inference for FLUX.2 on NVIDIA Blackwell Data Center GPUs (22 January 2026)",
            (
                Part("*embedder*"),
                Part("*norm_out*"),
                Part("*proj_out*"),
                Part("*to_add_out*"),
                # The original says to_added_qkv, which exists only once diffusers has fused the three projections.
                Part("*.add_[qkv]_proj"),
                Part("*stream*"),
            ),
        ),
        Preset(
            "modelopt-flux2",
            "embedders, modulation and output layers: everything outside the blocks",
            "NVIDIA Model Optimizer, examples/diffusers/quantization/utils.py, filter_func_flux_dev (as of 2026)",
            (
                Part("proj_out*"),
                Part("*time_text_embed*", absent="FLUX.1's name for what FLUX.2 calls time_guidance_embed"),
                Part("*context_embedder*"),
                Part("*x_embedder*"),
                Part("*norm_out*"),
                Part("*time_guidance_embed*"),
                Part("*stream_modulation*"),
            ),
        ),
        Preset(
            "trtllm-auto",
            "submodules outside the blocks with a Linear of at most 512 inputs or outputs",
            "TensorRT-LLM, tensorrt_llm/_torch/visual_gen/auto/sensitivity.py (commit 6d5c9fd4, 2026)",
            narrow=512,
        ),
    )
}


def find_preset(name: str, component: str, field: str) -> Preset:
    """The preset called `name`; RecipeError naming `field` if there is none, or it is not for `component`."""
    preset = PRESETS.get(name)
    if preset is None:
        raise RecipeError(
            f"{field}: there is no preset {name!r}{nearest(name, PRESETS) or '.'} The presets are: {', '.join(PRESETS)}"
        )
    if preset.component != component:
        raise RecipeError(
            f"{field}: the preset {name!r} names layers of the {preset.component}, not of the {component}; "
            f"remove it, and list what the {component} keeps under `exclude`"
        )
    return preset


def parts_of(preset: Preset, layers: list[Linear]) -> tuple[Part, ...]:
    """The preset's parts for a model of `layers`: its own, then a glob for each submodule that `narrow` finds."""
    if preset.narrow is None:
        return preset.parts
    return preset.parts + tuple(Part(f"*{name}*") for name in _narrow_submodules(layers, preset.narrow))


def kept_by(preset: Preset, layers: list[Linear], field: str) -> list[tuple[str, set[str]]]:
    """(pattern, names of the layers it keeps) for each part of `preset` that this model has.

    Raises RecipeError naming `field` for a part that matches nothing and should.
    """
    names = [layer.name for layer in layers]
    where = f"{field} {preset.name}"
    found = []
    for part in parts_of(preset, layers):
        match = matching if part.absent is None else matched
        if kept := match(part.pattern, names, where):
            found.append((part.pattern, set(kept)))
    return found


def absent_parts(preset: Preset, layers: list[Linear]) -> list[Part]:
    """The parts of `preset` that this model legitimately lacks."""
    names = [layer.name for layer in layers]
    return [part for part in parts_of(preset, layers) if part.absent and not matched(part.pattern, names, preset.name)]


def _narrow_submodules(layers: list[Linear], limit: int) -> list[str]:
    """The model's own submodules, its lists of blocks left out, that hold a Linear no wider than `limit` on one side."""
    found: dict[str, None] = {}
    for layer in layers:
        submodule, _, rest = layer.name.partition(".")
        in_a_block = rest.partition(".")[0].isdigit()
        if not in_a_block and min(layer.in_features, layer.out_features) <= limit:
            found[submodule] = None
    return list(found)
