"""The `tensorrt_rtx` and `tensorrt` targets: plans, each audited after it was built, and the programs that run them.

A library that needs the GPU it builds for leaves the plans to `fluxc finish` where there is none: the bundle then holds the
graphs they are built from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import msgspec
import onnx

from fluxc.base.errors import BuildError
from fluxc.base.progress import Report
from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import FORMATS
from fluxc.formats.smoothing import PRE_QUANT_SCALE
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.targets import Allow, TensorRTTarget
from fluxc.targets.findings import Finding
from fluxc.targets.tensorrt.audit import WAIVABLE, Audit, Expected, audit
from fluxc.targets.tensorrt.builder import PlanRequest, build_plan
from fluxc.targets.tensorrt.cut import MEMORY_A_BYTE, Component, Cut, Cutter
from fluxc.targets.tensorrt.inspector import inspect
from fluxc.targets.tensorrt.library import check_keeps_ranks, load_library
from fluxrt.manifest import Engine, Tiles
from fluxrt.sharding import sizes_of
from fluxrt.tiles import tile_sizes

BASE_GIB = 1.0
"""What the library itself takes while it builds."""


@dataclass(frozen=True)
class Sizes:
    """What a target serves: image tokens as (rows, columns) for every size, branches, text tokens, numbers of images made at
    once; shared by `ranks`.

    With `whole_range` all sizes between them are served. Images are decoded in `tiles`, which are tokens of so many pixels,
    where there are any.
    """

    grids: tuple[tuple[int, int], ...]
    branches: tuple[int, ...]
    text_length: int
    ranks: int = 1
    batches: tuple[int, ...] = (1,)
    tiles: Tiles | None = None
    pixels_per_token: int = 16
    whole_range: bool = False

    def requests(self) -> list[dict[str, int]]:
        """Every combination of size, branches and images, what each dimension counts on a rank; the fewest images of the first
        size with the most branches first."""
        return [
            sizes_of(branches, grid, images)
            | {"tokens": math.prod(grid) // self.ranks}
            | tile_sizes(self.tiles, self.pixels_per_token, grid)
            for images in sorted(self.batches)
            for grid in self.grids
            for branches in sorted(self.branches, reverse=True)
        ]


def cut_target(
    target: TensorRTTarget,
    pieces: dict[str, dict[str, onnx.ModelProto]],
    components: dict[str, Component],
    sizes: Sizes,
    text_layers: tuple[int, ...],
    decoder_tiles: int,
) -> Cut:
    """Plans and programs of `target`; `pieces` are the bf16 neutral graphs by component, the transformer's of one rank.

    The attention of the VAE's decoder goes over `decoder_tiles` of queries.
    """
    cutter = Cutter(sizes.requests(), sizes.whole_range, target.name, f"engines/{target.name}")
    segment_bytes = None
    if target.weights == "baked":
        segment_bytes = largest_segment(target.memory_gib)
    cutter.text_encoder(pieces["text_encoder"], components["text_encoder"], text_layers)
    cutter.transformer(
        pieces["transformer"], components["transformer"], sizes.text_length // sizes.ranks, segment_bytes
    )
    cutter.vae_decoder(pieces["vae"]["vae_decoder"], components["vae"], decoder_tiles)
    if "vae_blend" in pieces["vae"]:
        cutter.vae_blend(pieces["vae"]["vae_blend"], components["vae"])
    for component in components.values():
        check_group_scales(component)
    return cutter.cut


def largest_segment(memory_gib: float) -> int:
    """Bytes of weights that can be baked into one plan in this much memory."""
    return int((memory_gib - BASE_GIB) * 2**30 / MEMORY_A_BYTE)


def check_group_scales(component: Component) -> None:
    """Refuse a fusion group whose members have different tensor or input scales, or inputs that are multiplied by different
    ones: one GEMM can apply only one of each."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in component.plan:
        if entry.format != BF16 and entry.layer.group:
            groups.setdefault((entry.layer.group, entry.format), []).append(entry.layer.name)
    for (group, format), layers in groups.items():
        for part in (*FORMATS[format].scalars, PRE_QUANT_SCALE):
            refs = [component.weights.get(f"{layer}.{part}") for layer in layers]
            values = {bytes(ref.bytes_view()) for ref in refs if ref is not None and len(ref.shape) < 2}
            if len(values) > 1:
                raise BuildError(
                    f"{group}: its members {', '.join(layers)} have different {part}, so no engine can compute them as one; "
                    "the weights file is wrong, build it again"
                )


def unused_scales(plan: list[LayerPlan], taken: set[str]) -> set[str]:
    """Scales of group members, of tensors and input channels, that a graph rightly leaves alone: another member's, equal, is
    used for the group."""
    scales = [
        (entry.layer.group, part, f"{entry.layer.name}.{part}")
        for entry in plan
        if entry.format != BF16 and entry.layer.group
        for part in (*FORMATS[entry.format].scalars, PRE_QUANT_SCALE)
    ]
    used = {(group, part) for group, part, name in scales if name in taken}
    return {name for group, part, name in scales if (group, part) in used}


def write_sources(cut: Cut, folder: Path) -> None:
    """Write every plan's graph to its place below `folder`."""
    for plan in cut.plans.values():
        path = folder / plan.entry.source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plan.model.SerializeToString(deterministic=True))


def build_engine(
    target: TensorRTTarget, cut: Cut, folder: Path, report: Report | None = None, module: ModuleType | None = None
) -> Engine:
    """Build and audit every plan below `folder`, where the graphs and, for baked plans, the weights lie; its manifest entry.

    `module` stands in for the target's own library. Raises BuildError naming plan and layer of every fault that the target's
    `allow` does not cover.
    """
    module = module or load_library(target.kind)
    audits: dict[str, Audit] = {}
    entries = {}
    for number, (name, plan) in enumerate(cut.plans.items()):
        if report:
            report(number, len(cut.plans), name)
        path = folder / plan.entry.source if plan.baked else None
        request = PlanRequest(name, plan.model, target.compute_capabilities, plan.profiles, path)
        file = plan_file(target.name, name)
        audits[name] = build_audited(module, request, plan.expected, folder / file)
        entries[name] = msgspec.structs.replace(plan.entry, file=file)
    check_audits(target, audits)
    return Engine(
        library=target.kind,
        version=str(module.__version__),
        compute_capabilities=target.compute_capabilities,
        plans=entries,
        programs=cut.programs,
        audit={name: found.as_json() for name, found in audits.items()},
    )


def build_audited(module: ModuleType, request: PlanRequest, expected: Expected, path: Path) -> Audit:
    """Build one plan into the file `path` and say what was found in it; the caller refuses faults (check_audits).

    A plan whose program cannot be read is loaded on the GPU here and inspected. Raises BuildError for a sharded plan and a
    TensorRT that is known to lose its ranks, and for a plan that can be neither read nor inspected.
    """
    if expected.collectives:
        check_keeps_ranks(module)
    built = build_plan(module, request)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(built)
    try:
        return audit(built, expected, request.compute_capabilities)
    except BuildError as unread:
        try:
            return inspect(module, built, expected, request.compute_capabilities)
        except BuildError as error:
            raise BuildError(f"plan {request.name}: {unread}; nor can it be inspected: {error}") from error


def plan_file(target: str, plan: str) -> str:
    """Where a bundle keeps a plan."""
    return f"engines/{target}/{plan}.plan"


def unfinished_engine(target: TensorRTTarget, cut: Cut) -> Engine:
    """The manifest entry of an engine whose plans are built later, on the GPU."""
    return Engine(
        library=target.kind,
        version=None,
        compute_capabilities=target.compute_capabilities,
        plans={name: plan.entry for name, plan in cut.plans.items()},
        programs=cut.programs,
        audit={},
    )


def check_audits(target: TensorRTTarget, audits: dict[str, Audit]) -> None:
    """Raise BuildError for every finding that the target's `allow` does not cover, and for an entry of it without a finding.

    An entry names layers by a pattern, and with `kind` one kind of finding. What is wrong with a plan as a whole (its GPUs,
    its ranks, its collectives) is never allowed.
    """
    found = [(name, finding) for name, audit in audits.items() for finding in audit.faults]
    unused = [entry for entry in target.allow if not any(_allows(entry, finding) for _, finding in found)]
    if unused:
        raise BuildError(
            f"target {target.name}: allow {unused[0].layer!r} matches no fault of the audit; take it out, so that it cannot "
            "hide one"
        )
    denied = [
        f"plan {name}: {finding}"
        for name, finding in found
        if not any(_allows(entry, finding) for entry in target.allow)
    ]
    if denied:
        raise BuildError(
            f"target {target.name}: the plans TensorRT built do not compute as planned: {'; '.join(denied[:6])}"
            f"{' and more' if len(denied) > 6 else ''}. No bundle was written. Plan these layers in another format, or list "
            "them under the target's `allow` if the loss of speed is acceptable"
        )


def _allows(entry: Allow, finding: Finding) -> bool:
    """Whether an entry of `allow` covers a finding: one that can be waived, of its kind, about layers it names."""
    if finding.kind not in WAIVABLE or entry.kind not in (None, finding.kind):
        return False
    return all(fnmatchcase(layer, entry.layer) for layer in finding.layers)
