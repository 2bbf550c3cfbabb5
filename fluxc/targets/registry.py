"""The kinds of targets, by the word a recipe uses."""

from __future__ import annotations

from typing import Any

from fluxc.base.errors import RecipeError, nearest
from fluxc.recipe.targets import TARGETS, TensorRTRtxTarget, TensorRTTarget
from fluxc.targets.base import Entry, Options, TargetKind
from fluxc.targets.onnxruntime.kind import OnnxRuntime
from fluxc.targets.openvino.kind import OpenVino
from fluxc.targets.tensorrt.kind import TensorRT
from fluxc.targets.visual_gen.kind import VisualGen

KINDS: dict[str, TargetKind[Any, Any]] = {}


def register(kind: TargetKind[Options, Entry]) -> None:
    """Make `kind` known under its name, and its options to recipes."""
    KINDS[kind.name] = kind
    TARGETS[kind.name] = kind.options


def kind_of(name: str) -> TargetKind[Any, Any]:
    """The kind called `name`; RecipeError with near matches if there is none."""
    if name not in KINDS:
        raise RecipeError(
            f"targets: there is no kind {name!r}{nearest(name, KINDS) or '.'} It can be {', '.join(KINDS)}"
        )
    return KINDS[name]


BUILT_IN: tuple[TargetKind[Any, Any], ...] = (
    OnnxRuntime(),
    OpenVino(),
    TensorRT(TensorRTRtxTarget),
    TensorRT(TensorRTTarget),
    VisualGen(),
)
for _kind in BUILT_IN:
    register(_kind)
