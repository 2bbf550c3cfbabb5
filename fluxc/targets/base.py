"""What a kind of target is to a build: checks before any work, the graphs it starts from, the stage that makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fluxc.base.cache import Made
from fluxc.base.progress import Report
from fluxc.checkpoint.identify import pixels_per_token
from fluxc.graph.stage import ExportInputs
from fluxc.quantize.source import Source
from fluxc.recipe.structs import Recipe, Target
from fluxc.targets.parts import Weights
from fluxc.targets.sharding import Shares, shares_of
from fluxrt.bundle import StepCache

COMPONENTS = ("vae", "text_encoder", "transformer")


@dataclass(frozen=True)
class TargetContext:
    """The recipe and the checkpoint a target is made for."""

    recipe: Recipe
    source: Source

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Token rows and columns of every size."""
        pixels = pixels_per_token(self.source.checkpoint)
        return tuple((height // pixels, width // pixels) for height, width in self.recipe.sizes)

    @property
    def tokens(self) -> dict[tuple[int, int], int]:
        """Image tokens by size (height, width)."""
        return {size: rows * columns for size, (rows, columns) in zip(self.recipe.sizes, self.grids, strict=True)}

    def export(self, component: str, dtype: str = "float32", ranks: int = 1, composed: bool = False) -> ExportInputs:
        """The graphs of a component in `dtype`: whole, or those of each kind of block, for one of `ranks` ranks."""
        config, family = self.source.checkpoint.components[component].config, self.source.family
        if component == "vae":
            return ExportInputs(component, config, dtype=dtype, composed=composed)
        if component == "text_encoder":
            return ExportInputs(
                component, config, self.recipe.text.length, family=family, dtype=dtype, composed=composed
            )
        return ExportInputs(
            component,
            config,
            self.recipe.text.length // ranks,
            self.source.guidance_branches,
            dtype=dtype,
            composed=composed,
            part=ranks > 1,
        )

    def shares(self, target: Target) -> list[Shares]:
        """What each rank of a sharded target holds, for every size."""
        branches, itemsize = 2 if self.source.guidance_branches else 1, 2 if target.is_for_gpu else 4
        return [
            shares_of(target.ranks, size, tokens, self.source.transformer, self.recipe.text.length, branches, itemsize)
            for size, tokens in self.tokens.items()
        ]


@dataclass(frozen=True)
class TargetWork:
    """The stage of a target: its inputs, and the function of them that writes the target's files and its manifest entry."""

    inputs: Any
    run: Callable[[Any, Path, Report], None]


class TargetKind(Protocol):
    """One kind of target; `name` is what `kind` says in a recipe and in a manifest."""

    name: str

    def check(self, field: str, target: Target, context: TargetContext) -> None:
        """Refuse what this kind cannot do, from recipe, configs and headers: RecipeError naming `field`, or BuildError."""
        ...

    def exports(self, target: Target, context: TargetContext) -> dict[str, ExportInputs]:
        """The graphs the target starts from, by component."""
        ...

    def work(
        self,
        target: Target,
        context: TargetContext,
        exports: Mapping[str, Made],
        weights: Mapping[str, Weights],
        step_cache: StepCache | None,
    ) -> TargetWork:
        """The stage that makes the target."""
        ...

    def describe(self, target: Target) -> str:
        """A sentence: engine, formats it computes in, where it is built and run."""
        ...
