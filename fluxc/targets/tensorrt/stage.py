"""The stage of a `tensorrt_rtx` or `tensorrt` target: its engines, built and audited, or the graphs that `finish` builds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluxc.base.cache import Made
from fluxc.base.progress import Report
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.targets import TensorRTTarget
from fluxc.targets.parts import Weights, load_exports, weights_beside, write_entry
from fluxc.targets.unused import check_unused
from fluxrt import manifest as format


@dataclass(frozen=True)
class TensorRTInputs:
    """`exports` are the graphs of each kind of block by component, the transformer's those of one rank; `bodies` its plans
    for bodies beside `body`.

    `grids` are token rows and columns of every size, of tokens of `pixels_per_token`. `tiles` are those that images are decoded
    in, `decoder_tiles` the tiles of queries in the VAE's attention, `batches` the numbers of images made at once. `scalars` are
    the scalar scales' bytes, which decide whether a fusion group can be one GEMM; `contents` the weights files, where engines
    hold them. `builds_here`: whether this machine builds the engines, with `library`, the version of the target's library.
    """

    target: TensorRTTarget
    exports: dict[str, Made]
    weights: dict[str, Weights]
    plans: dict[str, list[LayerPlan]]
    bodies: dict[str, list[LayerPlan]]
    unused: dict[str, tuple[str, ...]]
    transformer: Flux2Transformer
    grids: tuple[tuple[int, int], ...]
    whole_range: bool
    decoder_tiles: int
    batches: tuple[int, ...]
    tiles: format.Tiles | None
    pixels_per_token: int
    cfg_batch: bool
    text_length: int
    text_layers: tuple[int, ...]
    step_cache: bool
    scalars: list[str]
    contents: list[Path]
    builds_here: bool
    library: str | None


def run(inputs: TensorRTInputs, folder: Path, report: Report) -> None:
    """Write graphs and engines below engines/, and the manifest entry."""
    from fluxc.graph.ulysses import shard
    from fluxc.targets.tensorrt import build
    from fluxc.targets.tensorrt.cut import Component

    target = inputs.target
    neutral = load_exports(inputs.exports, inputs.step_cache)
    refs = {name: written.tensors for name, written in inputs.weights.items()}
    bodies = {"transformer": inputs.bodies}
    components = {
        name: Component(name, tensors, inputs.plans.get(name, []), inputs.weights[name].entry, bodies.get(name, {}))
        for name, tensors in refs.items()
    }
    sizes = build.Sizes(
        grids=inputs.grids,
        whole_range=inputs.whole_range,
        branches=(1, 2) if inputs.cfg_batch else (1,),
        text_length=inputs.text_length,
        ranks=target.ranks,
        batches=inputs.batches,
        tiles=inputs.tiles,
        pixels_per_token=inputs.pixels_per_token,
    )
    sharding = None
    if target.ranks > 1:
        blocks = neutral["transformer"]
        blocks |= {
            name: shard(blocks[name], inputs.transformer, target.ranks) for name in blocks if name.endswith("_block")
        }
        sharding = format.Sharding(target.ranks, inputs.text_length // target.ranks)
    cut = build.cut_target(target, neutral, components, sizes, inputs.text_layers, inputs.decoder_tiles)
    for name, tensors in refs.items():
        rightly_unused = build.unused_scales(inputs.plans.get(name, []), cut.tensors[name])
        check_unused(
            name, [t for t in tensors if t not in cut.tensors[name] | rightly_unused], inputs.unused.get(name, ())
        )
    with weights_beside(folder, inputs.weights):
        build.write_sources(cut, folder)
        here = inputs.builds_here
        engine = build.build_engine(target, cut, folder, report) if here else build.unfinished_engine(target, cut)
    counts = [rows * columns for rows, columns in sizes.grids]
    tokens = (min(counts), max(counts)) if target.shapes == "range" else None
    entry = format.struct_of(target.kind, format.TensorRTTarget)
    write_entry(folder, entry(target.name, engine, tokens, sharding))


def scalars_of(weights: Weights) -> list[str]:
    """The component's scalar tensors as hexadecimal bytes, in order."""
    return [bytes(ref.bytes_view()).hex() for ref in weights.tensors.values() if ref.shape == ()]
