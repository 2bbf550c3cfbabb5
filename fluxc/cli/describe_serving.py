"""What a plan says of serving: images at once, sizes in tiles, and the memory that both are predicted to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fluxc.base.memory import bytes_in_words
from fluxc.checkpoint.identify import pixels_per_token, vae_of
from fluxc.predict.scaling import RankMemory
from fluxc.predict.work import LARGE_DECODER, decoder_working, tile_hint
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.steps import bodies_of, body_plans, rules_of
from fluxc.recipe.structs import Recipe
from fluxc.targets.base import TargetContext
from fluxc.targets.decoder import Decoder, tile_count, tiles_of_size


def batch_sentences(context: TargetContext, at_once: Mapping[int, RankMemory]) -> Iterator[str]:
    """Memory by how many images are made at once (`memory_at_once`); nothing where that is one."""
    if context.recipe.batches == (1,):
        return
    height, width = context.recipe.listed_sizes[0]
    taken = [
        f"{images} at once {bytes_in_words(round(memory.working + memory.buffers))}"
        for images, memory in at_once.items()
    ]
    yield f"beside weights, a step at {height}x{width} is predicted to take in bf16 plans: {', '.join(taken)} (--batch)"
    for target in context.recipe.targets:
        if not target.runs_graphs:
            yield f"{target.name}: VisualGen is given one prompt a call; batches is not for it"


def decoding_sentences(context: TargetContext) -> Iterator[str]:
    """Sizes in tiles, or what decodes large ones so; nothing where all are decoded whole in little memory."""
    recipe, vae = context.recipe, vae_of(context.source.checkpoint)
    whole = Decoder(vae, context.grids)
    if context.tiles is None:
        if decoder_working(whole) >= LARGE_DECODER:
            yield f"decoding the largest size takes {bytes_in_words(decoder_working(whole))} in bf16 plans; {tile_hint()}"
        return
    pixels = pixels_per_token(context.source.checkpoint)
    tile, overlap = (
        "x".join(str(side * pixels) for side in sides) for sides in (context.tiles.size, context.tiles.overlap)
    )
    counts = [
        f"{height}x{width} in {tile_count(context.tiles, (height // pixels, width // pixels))}"
        for height, width in recipe.listed_sizes
        if tiles_of_size(recipe.vae, vae, (height, width))
    ]
    tiled, at_full = (bytes_in_words(decoder_working(decoder)) for decoder in (context.decoder(), whole))
    yield (
        f"decoded in tiles of {tile} that overlap by at least {overlap}: {', '.join(counts)} tiles. The decoder takes {tiled} "
        f"in bf16 plans, for whole images {at_full}"
    )
    for target in recipe.targets:
        if not target.runs_graphs:
            yield f"{target.name}: VisualGen's settings have no tiles, so it decodes every size whole; vae.tile is not for it"


def step_sentences(recipe: Recipe, plan: list[LayerPlan]) -> Iterator[str]:
    """Which steps leave the inputs of some layers as they are."""
    plans = body_plans(recipe.precision, plan)
    body_of = {layers: body for body, layers in bodies_of(recipe.precision).items()}
    for rule in rules_of(recipe.precision):
        body = body_of[rule.layers]
        changed = sum(old.format != new.format for old, new in zip(plan, plans[body], strict=True))
        given = {name: count for name in ("first", "last", "worst") if (count := getattr(rule, name))}
        which = (
            " ".join(f"the {name} {count}" for name, count in given.items()) or "the fewest that halve what that costs"
        )
        yield (
            f"steps: {which} of {recipe.sampling.steps} leave the inputs of {changed} layers in 16 bits ({body}), on targets "
            "that else round them; weights are stored once"
        )
