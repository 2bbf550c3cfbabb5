"""The kinds `tensorrt_rtx` and `tensorrt`: engines for NVIDIA GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.base.cache import Made
from fluxc.base.errors import RecipeError
from fluxc.checkpoint.identify import pixels_per_token
from fluxc.graph.stage import ExportInputs
from fluxc.recipe.targets import TensorRTTarget
from fluxc.targets.base import COMPONENTS, TargetContext, TargetKind, TargetWork
from fluxc.targets.parts import Weights
from fluxc.targets.sharding import check_sharding
from fluxc.targets.tensorrt import stage
from fluxc.targets.tensorrt.library import (
    GPUS,
    LIBRARIES,
    check_capabilities,
    check_formats,
    check_keeps_ranks,
    gpu_here,
    how_to_install,
    installed_version,
    load_library,
)
from fluxrt import manifest as format

if TYPE_CHECKING:
    from rich.console import RenderableType


class TensorRT(TargetKind[TensorRTTarget, format.TensorRTTarget]):
    """See TargetKind; `name` is the library's."""

    def __init__(self, options: type[TensorRTTarget]) -> None:
        self.options = options
        self._library = LIBRARIES[self.name]

    def check(self, field: str, target: TensorRTTarget, context: TargetContext) -> None:
        """Refuse GPUs that do not compute in the planned formats, and a number of them that cannot share the model."""
        formats = {entry.format for plan in context.source.plans.values() for entry in plan}
        check_formats(self.name, formats, field)
        check_capabilities(self.name, target.compute_capabilities, formats, f"{field}.compute_capabilities")
        if not self._library.builds_without_gpu and len(target.compute_capabilities) > 1:
            raise RecipeError(
                f"{field}.compute_capabilities: {self.name} builds for one kind of GPU, the one it is finished on; give one"
            )
        context.decoder(is_range(target, context)).check(field)
        if target.weights == "baked":
            _check_baked(field, target, context)
        if target.ranks > 1:
            length, tokens = context.recipe.text.length, context.tokens
            check_sharding(f"{field}.gpus", target.ranks, context.source.transformer, length, tokens, True)

    def check_library(self, target: TensorRTTarget) -> None:
        """Refuse a library that is missing here although it could build here, or that loses the ranks of a sharded plan."""
        if self._library.builds_without_gpu:
            load_library(self.name)
        if target.ranks > 1 and self._builds_here(target):
            check_keeps_ranks(load_library(self.name))

    def exports(self, target: TensorRTTarget, context: TargetContext) -> dict[str, ExportInputs]:
        """The graphs of each kind of block in bf16."""
        return {
            name: context.export(name, "bfloat16", target.ranks if name == "transformer" else 1) for name in COMPONENTS
        }

    def work(
        self,
        target: TensorRTTarget,
        context: TargetContext,
        exports: Mapping[str, Made],
        weights: Mapping[str, Weights],
        step_cache: format.StepCache | None,
    ) -> TargetWork:
        """Engines, or the graphs they are built from on the GPU."""
        baked = target.weights == "baked"
        inputs = stage.TensorRTInputs(
            target=target,
            exports=dict(exports),
            weights=dict(weights),
            plans=context.source.plans,
            bodies=context.bodies(target),
            unused=context.source.unused,
            transformer=context.source.transformer,
            grids=context.grids,
            decoder_tiles=context.decoder(is_range(target, context)).tiles,
            whole_range=is_range(target, context),
            batches=context.recipe.batches,
            tiles=context.tiles,
            pixels_per_token=pixels_per_token(context.source.checkpoint),
            cfg_batch=context.source.cfg_batch,
            text_length=context.recipe.text.length,
            text_layers=context.source.family.text_layers,
            step_cache=context.recipe.step_cache is not None,
            scalars=[scalar for written in weights.values() for scalar in stage.scalars_of(written)],
            contents=[file for written in weights.values() for file in written.files] if baked else [],
            builds_here=self._builds_here(target),
            library=installed_version(self.name),
        )
        return TargetWork(inputs, stage.run)

    def place(self, entry: format.TensorRTTarget, folder: Path, staging: Path) -> format.TensorRTTarget:
        """The plans, and the graphs they are built from."""
        for plan in entry.engine.plans.values():
            for file in filter(None, (plan.source, plan.file)):
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, staging / file)
        return entry

    def tools(self) -> dict[str, str]:
        """The library."""
        version = installed_version(self.name)
        return {self.name: version} if version else {}

    def evidence(self, entry: format.TensorRTTarget) -> dict[str, Any]:
        """What the engine was built with and for, and what the audit found in its plans."""
        fields = ("library", "version", "compute_capabilities", "gpu", "audit")
        return {field: getattr(entry.engine, field) for field in fields}

    def inspect(self, entry: format.TensorRTTarget) -> RenderableType:
        """The plans as the audit found them."""
        from fluxc.targets.tensorrt.plan_table import plan_table

        return plan_table(entry)

    def describe(self, target: TensorRTTarget) -> str:
        """GPUs, where weights lie, shapes, and where engines are built."""
        gpus = ", ".join(f"{c} ({GPUS[c]})" for c in target.compute_capabilities)
        weights = (
            "a plan for each kind of block, weights bound when it runs"
            if target.weights == "bound"
            else f"plans with the blocks' weights inside, built in at most {target.memory_gib:g} GiB"
        )
        shapes = "an optimization profile a size" if target.shapes == "profiles" else "one profile for all sizes"
        version = installed_version(self.name)
        if self._library.builds_without_gpu:
            where = f"needs {self.name} here: `{how_to_install(self._library)}`"
            where = f"built and audited on this machine ({self.name} {version})" if version else where
        elif version and gpu_here(target.compute_capabilities):
            where = f"built and audited on this machine's GPU ({self.name} {version})"
        else:
            where = "its graphs are written here; `fluxc finish` builds the plans on the GPU"
        ranks = f"{target.ranks} GPUs (Ulysses), each of " if target.ranks > 1 else ""
        return f"{ranks}compute capability {gpus}; {weights}; {shapes}; {where}"

    def _builds_here(self, target: TensorRTTarget) -> bool:
        """Whether this machine builds the engines; check_library refused a library that could be here and is not."""
        if self._library.builds_without_gpu:
            return True
        return installed_version(self.name) is not None and gpu_here(target.compute_capabilities)


def is_range(target: TensorRTTarget, context: TargetContext) -> bool:
    """Whether one profile spans all sizes: as the target asks, or because the recipe's sizes are a range."""
    return target.shapes == "range" or context.recipe.size_range is not None


def _check_baked(field: str, target: TensorRTTarget, context: TargetContext) -> None:
    """Refuse memory in which not even one block's weights can be baked: RecipeError."""
    from fluxc.targets.tensorrt.build import largest_segment

    limit, blocks = largest_segment(target.memory_gib), dict[str, int]()
    for entry in context.source.plans["transformer"]:
        stem, _, rest = entry.layer.name.partition(".")
        if stem in ("transformer_blocks", "single_transformer_blocks"):
            block = f"{stem}.{rest.partition('.')[0]}"
            blocks[block] = blocks.get(block, 0) + entry.bytes_after
    largest = max(blocks, key=lambda block: blocks[block])
    if blocks[largest] > limit:
        raise RecipeError(
            f"{field}.memory_gib: the weights of {largest} ({blocks[largest] / 2**30:.3f} GiB) cannot be baked in "
            f"{target.memory_gib:g} GiB, which is enough for {limit / 2**30:.3f} GiB; raise it, or use weights: bound"
        )
