"""The list of checks for a bundle and a machine: by name, what each needs and shows, its function, its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fluxc.fidelity.gates import stage_bounds
from fluxc.gpu_check.blocks import check_block_plans, check_block_torch
from fluxc.gpu_check.child import Found
from fluxc.gpu_check.copies import check_copies
from fluxc.gpu_check.images import check_graphs, check_images
from fluxc.gpu_check.machine import Inventory, check_bundle, check_machine
from fluxc.gpu_check.memory import check_memory
from fluxc.gpu_check.ranks import check_kill, check_ranks
from fluxc.gpu_check.speed import check_start, check_steps
from fluxc.gpu_check.stages import LEAST_COSINE, check_stages
from fluxc.gpu_check.subject import Amount, Subject
from fluxc.models.base import Linear
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Gates
from fluxc.recipe.targets import TARGETS
from fluxc.targets.tensorrt.library import FORMATS_OF
from fluxrt.bundle import Bundle
from fluxrt.manifest import OnnxRuntimeTarget, Target, TensorRTTarget, VisualGenTarget


@dataclass(frozen=True)
class Check:
    """One thing to find out: what it shows and what it needs, in words; its function and the seconds it has; `skipped` says why
    it is not even tried."""

    name: str
    shows: str
    needs: str
    work: Callable[[Subject], Found] | None = None
    limit: float = 60.0
    target: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""


FITS, CPU_TARGET = "a target for this GPU", "a target for this GPU and one for the CPU"
OF_A_TARGET: tuple[tuple[str, str, str, Callable[[Subject], Found], float], ...] = (
    ("images", "three images, against those a CPU recorded", CPU_TARGET, check_images, 180),
    ("graphs", "steps launched as CUDA graphs give the bits of eager ones", FITS, check_graphs, 180),
    (
        "stages",
        "text, prologue, every step and decoder, against the CPU on the same input",
        CPU_TARGET,
        check_stages,
        180,
    ),
    ("memory", "bytes held and lost, against the audit's working memory", FITS, check_memory, 120),
    ("steps", "milliseconds of text, a step, decoding", FITS, check_steps, 180),
    ("start", "seconds to the first image, with and without compiled kernels", FITS, check_start, 240),
    ("copies", "the share of a step that copies block scales", "a TensorRT target for this GPU", check_copies, 120),
)
OF_PLANS_ALONE = ("graphs", "copies")
SEVERAL = "as many GPUs as the target has ranks, and NCCL"
OF_RANKS: tuple[tuple[str, str, str, Callable[[Subject], Found], float], ...] = (
    ("ranks", "two images on several GPUs, against those a CPU recorded", SEVERAL, check_ranks, 240),
    ("kill", "what is said, and how soon, when a rank is killed", SEVERAL, check_kill, 120),
)
NO_FP4_BEFORE = 9


def checks_for(bundle: Bundle, inventory: Inventory, amount: Amount, rehearses_ranks: bool) -> list[Check]:
    """Every check in the order in which they run: what is here, each target that fits, several GPUs, blocks of large models.

    With `rehearses_ranks` targets that are sharded for CPU processes count as sharded for GPUs.
    """
    checks = [
        Check("machine", "GPUs, driver, libraries, P2P, /dev/shm", "a GPU", check_machine),
        Check("bundle", "every file's SHA-256", "the bundle", check_bundle, 600),
    ]
    sharded = []
    for target in bundle.manifest.targets:
        if target.gpus > 1 and (target.device == "cuda" or rehearses_ranks):
            sharded.append(target)
        elif target.device == "cuda":
            checks += _of_target(bundle, inventory, target)
    for target in sharded:
        reason = inventory.obstacles[target.name]
        for name, shows, needs, work, limit in OF_RANKS:
            checks.append(Check(f"{name}:{target.name}", shows, needs, work, limit, target.name, skipped=reason or ""))
    capability = inventory.device["gpus"][0]["compute_capability"]
    formats = [name for name in ("nvfp4", "fp8") if name in FORMATS_OF.get(capability, ())]
    chosen = {"capability": capability, "format": formats[0] if formats else "bf16"}
    for model in amount.models:
        settings = {"model": model, **chosen}
        shows = f"a block of each kind at the widths of {model}"
        library, torch = "a TensorRT library that builds for this GPU", "torch with CUDA"
        for name, by, needs, work in (
            ("block-plans", "TensorRT", library, check_block_plans),
            ("block-torch", "torch in bf16, eager and compiled", torch, check_block_torch),
        ):
            checks.append(Check(f"{name}:{model}", f"{shows}, by {by}", needs, work, 240, settings=settings))
    return checks


def bounds_of(bundle: Bundle, target: Target) -> dict[str, float]:
    """The largest relative errors of the stages against the CPU in fp32, as a build's gates have them."""
    struct = TARGETS[target.kind]
    entries = [msgspec.convert(e, struct) for e in bundle.manifest.recipe["targets"] if e["kind"] == target.kind]
    options = next(entry for entry in entries if entry.name == target.name)
    plans: dict[str, list[LayerPlan]] = {"transformer": [], "text_encoder": []}
    for layer in bundle.manifest.precision:
        linear = Linear(layer.name, *layer.shape, layer.group)
        plan = LayerPlan(layer.component, linear, layer.format, layer.rule, layer.bytes_before)
        plans.setdefault(layer.component, []).append(plan)
    return {figure: bound.error for figure, bound in stage_bounds(options, "float32", plans).items()}


def _of_target(bundle: Bundle, inventory: Inventory, target: Target) -> list[Check]:
    reason = inventory.obstacles[target.name]
    if isinstance(target, VisualGenTarget):
        reason = reason or "gpu-check has no checks of TensorRT-LLM; docs/visual-gen.md says how to serve it"
    capability = inventory.device["gpus"][0]["compute_capability"]
    has_fp4 = any(layer.format == "nvfp4" for layer in bundle.manifest.precision)
    if isinstance(target, OnnxRuntimeTarget) and has_fp4 and int(capability.partition(".")[0]) < NO_FP4_BEFORE:
        reason = reason or (
            f"ONNX Runtime takes NVFP4 weights on compute capability {NO_FP4_BEFORE}.0 and later, this GPU has {capability}"
        )
    if reason:
        return [Check(f"target:{target.name}", "whether it fits this GPU", FITS, target=target.name, skipped=reason)]
    gates = msgspec.convert(bundle.manifest.recipe["gates"], Gates)
    settings = {
        "bounds": bounds_of(bundle, target),
        "step_cosine": gates.step_cosine if gates.step_cosine is not None else LEAST_COSINE,
        "image_psnr_db": gates.image_psnr_db,
    }
    return [
        Check(f"{name}:{target.name}", shows, needs, work, limit, target.name, settings)
        for name, shows, needs, work, limit in OF_A_TARGET
        if isinstance(target, TensorRTTarget) or name not in OF_PLANS_ALONE
    ]
