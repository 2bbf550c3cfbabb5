"""What a kind of target is to a build: checks before any work, the graphs it starts from, the stage that makes it.

A kind has a struct of options (fluxc.recipe.targets) and a struct for the manifest (fluxrt.manifest), and its class here
answers whatever is asked of a target without a look at its kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fluxc.base.cache import Made
from fluxc.base.progress import Report
from fluxc.checkpoint.identify import pixels_per_token, vae_of
from fluxc.graph.stage import ExportInputs
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.source import Source
from fluxc.quantize.steps import body_plans
from fluxc.recipe.structs import Recipe
from fluxc.recipe.targets import Target, kind_name
from fluxc.targets.decoder import Decoder, tiles_of
from fluxc.targets.parts import Weights
from fluxc.targets.probe import Probe
from fluxc.targets.sharding import Shards, shards_of
from fluxrt import manifest as format
from fluxrt.bundle import Bundle
from fluxrt.manifest import StepCache

if TYPE_CHECKING:
    from rich.console import RenderableType

COMPONENTS = ("vae", "text_encoder", "transformer")


@dataclass(frozen=True)
class TargetContext:
    """The recipe and the checkpoint a target is made for."""

    recipe: Recipe
    source: Source

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Token rows and columns of every size that is named."""
        pixels = pixels_per_token(self.source.checkpoint)
        return tuple((height // pixels, width // pixels) for height, width in self.recipe.listed_sizes)

    @property
    def tokens(self) -> dict[tuple[int, int], int]:
        """Image tokens by size (height, width)."""
        return {
            size: rows * columns for size, (rows, columns) in zip(self.recipe.listed_sizes, self.grids, strict=True)
        }

    @property
    def tiles(self) -> format.Tiles | None:
        """The tiles that images are decoded in; None where they are decoded whole."""
        return tiles_of(self.recipe.vae, vae_of(self.source.checkpoint))

    def bodies(self, target: Target) -> dict[str, list[LayerPlan]]:
        """The transformer's plans for bodies beside `body`, by name: none for a target that rounds no inputs."""
        return body_plans(self.recipe.precision, self.source.plans["transformer"]) if target.rounds_inputs else {}

    def decoder(self, between: bool = False) -> Decoder:
        """The VAE's decoder for the recipe's sizes, or for their tiles; for a range, or with `between`, all between them."""
        between = between or self.recipe.size_range is not None
        return Decoder(vae_of(self.source.checkpoint), self.grids, between).in_tiles(self.tiles)

    def export(self, component: str, dtype: str = "float32", ranks: int = 1, composed: bool = False) -> ExportInputs:
        """The graphs of a component in `dtype`: whole, or those of each kind of block, for one of `ranks` ranks."""
        config, family = self.source.checkpoint.components[component].config, self.source.family
        if component == "vae":
            return ExportInputs(component, config, dtype=dtype, composed=composed, tiles=self.tiles is not None)
        if component == "text_encoder":
            return ExportInputs(
                component, config, self.recipe.text.length, family=family, dtype=dtype, composed=composed
            )
        return ExportInputs(
            component,
            config,
            self.recipe.text.length // ranks,
            self.source.cfg_batch,
            dtype=dtype,
            composed=composed,
            part=ranks > 1,
        )

    def shards(self, target: Target) -> list[Shards]:
        """What each rank of a sharded target holds, for every size."""
        branches, length = 2 if self.source.cfg_batch else 1, self.recipe.text.length
        return [
            shards_of(target.ranks, size, tokens, self.source.transformer, length, branches, target.activation_bytes)
            for size, tokens in self.tokens.items()
        ]


@dataclass(frozen=True)
class TargetWork:
    """The stage of a target: its inputs, and the function of them that writes the target's files and its manifest entry."""

    inputs: Any
    run: Callable[[Any, Path, Report], None]


Options = TypeVar("Options", bound=Target)
Entry = TypeVar("Entry", bound=format.Target)


class TargetKind(ABC, Generic[Options, Entry]):
    """One kind of target: `options` is the struct of its targets in a recipe, an `Entry` what its stage writes."""

    options: type[Options]

    @property
    def name(self) -> str:
        """What `kind` says in a recipe and in a manifest."""
        return kind_name(self.options)

    @abstractmethod
    def check(self, field: str, target: Options, context: TargetContext) -> None:
        """Refuse what this kind cannot do, from recipe, configs and headers: RecipeError naming `field`, or BuildError."""

    @abstractmethod
    def exports(self, target: Options, context: TargetContext) -> dict[str, ExportInputs]:
        """The graphs the target starts from, by component."""

    @abstractmethod
    def work(
        self,
        target: Options,
        context: TargetContext,
        exports: Mapping[str, Made],
        weights: Mapping[str, Weights],
        step_cache: StepCache | None,
    ) -> TargetWork:
        """The stage that makes the target."""

    @abstractmethod
    def place(self, entry: Entry, folder: Path, staging: Path) -> Entry:
        """Put the files of the stage's result `folder` into the bundle at `staging`; the entry that names them there."""

    @abstractmethod
    def describe(self, target: Options) -> str:
        """A sentence: engine, formats it computes in, where it is built and run."""

    def check_library(self, target: Options) -> None:
        """Refuse, before anything long runs, a library the target needs here that is missing or too old: BuildError."""

    def tools(self) -> dict[str, str]:
        """Versions of the libraries here that the target's bytes depend on, besides those of every build."""
        return {}

    def apart(self, component: str, plan: list[LayerPlan]) -> list[str]:
        """Weights of a component that the target wants in files of their own, by name."""
        return []

    def probes(self, bundle: Bundle, entry: Entry, threads: int | None) -> Iterable[Probe]:
        """What runs a target's graphs and looks at every GEMM, where the machine that builds can, once for every form of the
        graphs that some machine runs. Without any, only results of whole stages are looked at."""
        return ()

    def evidence(self, entry: Entry) -> dict[str, Any] | None:
        """What was found in what was built, for the report."""
        return None

    def inspect(self, entry: Entry) -> RenderableType | None:
        """What `fluxc inspect` shows of what was built."""
        return None
