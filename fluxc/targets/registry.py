"""The kinds of targets, by the word a recipe uses."""

from __future__ import annotations

from fluxc.base.errors import RecipeError, nearest
from fluxc.recipe.structs import TARGET_KINDS
from fluxc.targets.base import TargetKind
from fluxc.targets.onnxruntime.kind import OnnxRuntime
from fluxc.targets.tensorrt.kind import TensorRT
from fluxc.targets.visual_gen.kind import VisualGen

KINDS: dict[str, TargetKind] = {}


def register(kind: TargetKind) -> None:
    """Make `kind` known under its name."""
    KINDS[kind.name] = kind
    if kind.name not in TARGET_KINDS:
        TARGET_KINDS.append(kind.name)


def kind_of(name: str) -> TargetKind:
    """The kind called `name`; RecipeError with near matches if there is none."""
    if name not in KINDS:
        raise RecipeError(
            f"targets: there is no kind {name!r}{nearest(name, KINDS) or '.'} It can be {', '.join(KINDS)}"
        )
    return KINDS[name]


for _kind in (OnnxRuntime(), TensorRT("tensorrt_rtx"), TensorRT("tensorrt"), VisualGen()):
    register(_kind)
