"""What a plan says of decoding: which sizes in how many tiles, and the memory it is predicted to take."""

from __future__ import annotations

from collections.abc import Iterator

from fluxc.checkpoint.identify import pixels_per_token, vae_of
from fluxc.predict.work import LARGE_DECODER, decoder_working, tile_hint
from fluxc.recipe.targets import VisualGenTarget
from fluxc.targets.base import TargetContext
from fluxc.targets.decoder import Decoder, tile_count, tiles_of_size


def decoding_sentences(context: TargetContext) -> Iterator[str]:
    """Sizes in tiles, or what decodes large ones so; nothing where all are decoded whole in little memory."""
    recipe, vae = context.recipe, vae_of(context.source.checkpoint)
    whole = Decoder(vae, context.grids)
    if context.tiles is None:
        if decoder_working(whole) >= LARGE_DECODER:
            yield f"decoding the largest size takes {_gib(decoder_working(whole))} in bf16 plans; {tile_hint()}"
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
    yield (
        f"decoded in tiles of {tile} that overlap by at least {overlap}: {', '.join(counts)} tiles. The decoder takes "
        f"{_gib(decoder_working(context.decoder()))} in bf16 plans, for whole images {_gib(decoder_working(whole))}"
    )
    for target in recipe.targets:
        if isinstance(target, VisualGenTarget):
            yield f"{target.name}: VisualGen's settings have no tiles, so it decodes every size whole; vae.tile is not for it"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
