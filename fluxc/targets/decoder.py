"""How a target fits the VAE's decoder to its sizes: the tiles of an image, the query tiles of its attention, and sizes that no
kernel can index."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fluxc.base.errors import RecipeError
from fluxc.checkpoint.identify import check_sizes
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.recipe.structs import Vae
from fluxrt.manifest import Tiles
from fluxrt.tiles import first_tokens

INDEXABLE = 2**31 - 1
"""Values of a tensor that a signed index of 32 bits reaches, which kernels count with."""
LEAST_TILE = 8
"""Tokens on a side of a tile: what normalization finds in fewer is not what it finds in the image."""


def tiles_of(asked: Vae | None, vae: Flux2VAE) -> Tiles | None:
    """The tiles that a recipe asks for, in tokens of `vae`; None where it asks for none.

    Raises RecipeError for a tile that is no whole number of tokens, or too few.
    """
    if asked is None:
        return None
    check_sizes(vae, (asked.tile,), "vae.tile")
    pixels = vae.pixels_per_token
    rows, columns = (side // pixels for side in asked.tile)
    if min(rows, columns) < LEAST_TILE:
        raise RecipeError(
            f"vae.tile: {asked.tile[0]}x{asked.tile[1]} is too small: a tile has at least {LEAST_TILE} tokens a side, "
            f"{LEAST_TILE * pixels} pixels of this model"
        )
    return Tiles((rows, columns), (math.ceil(rows * asked.overlap), math.ceil(columns * asked.overlap)))


def tiles_of_size(asked: Vae | None, vae: Flux2VAE, size: tuple[int, int]) -> Tiles | None:
    """The tiles that an image of `size` (height, width) is decoded in; None where it is decoded whole."""
    is_tiled = asked is not None and any(whole > side for whole, side in zip(size, asked.tile, strict=True))
    return tiles_of(asked, vae) if is_tiled else None


def tile_count(tiles: Tiles, grid: tuple[int, int]) -> int:
    """How many tiles an image of `grid` (rows, columns) tokens is decoded in."""
    sides = zip(grid, tiles.size, tiles.overlap, strict=True)
    return math.prod(len(first_tokens(length, tile, overlap)) for length, tile, overlap in sides)


def decoded_at_once(asked: Vae | None, vae: Flux2VAE, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """(height, width) in pixels of what is decoded at once of an image of `size`, all of it or a tile, and how often."""
    tiles, pixels = tiles_of_size(asked, vae, size), vae.pixels_per_token
    if tiles is None:
        return size, 1
    rows, columns = size[0] // pixels, size[1] // pixels
    height, width = min(rows, tiles.size[0]) * pixels, min(columns, tiles.size[1]) * pixels
    return (height, width), tile_count(tiles, (rows, columns))


@dataclass(frozen=True)
class Decoder:
    """The decoder of `vae` for images of `grids`, token rows and columns; with `between` also for all sizes between them.

    With `of_tiles` these are the tiles of larger images.
    """

    vae: Flux2VAE
    grids: tuple[tuple[int, int], ...]
    between: bool = False
    of_tiles: bool = False

    def in_tiles(self, tiles: Tiles | None) -> Decoder:
        """The same for the tiles of its images."""
        if tiles is None:
            return self
        grids = tuple((min(rows, tiles.size[0]), min(columns, tiles.size[1])) for rows, columns in self.grids)
        return replace(self, grids=tuple(dict.fromkeys(grids)), of_tiles=True)

    @property
    def largest(self) -> tuple[int, int]:
        """Rows and columns that memory must suffice for: those of the largest size, or the most of each that occur."""
        if self.between:
            rows, columns = zip(*self.grids, strict=True)
            return max(rows), max(columns)
        return max(self.grids, key=math.prod)

    @property
    def tiles(self) -> int:
        """Into how many tiles of queries attention is cut: 1 where all its scores are no more than the largest activation.

        Otherwise the fewest that divide the latents of every size and keep a tile's scores within that activation, so that
        attention never sets the peak of memory; where none of them does, the most that divide.
        """
        if not self.vae.mid_block_add_attention:
            return 1
        patch = math.prod(self.vae.patch_size)
        common = patch if self.between else math.gcd(*(patch * math.prod(grid) for grid in self.grids))
        fewest = -(-self._latents // self.vae.values_per_latent)
        return next((number for number in range(fewest, common) if common % number == 0), common)

    @property
    def activation(self) -> int:
        """Values of the decoder's largest activation at the largest size."""
        return self.vae.values_per_latent * self._latents

    @property
    def scores(self) -> int:
        """Scores of a tile of attention at the largest size."""
        return self._latents**2 // self.tiles if self.vae.mid_block_add_attention else 0

    def check(self, field: str) -> None:
        """Raise RecipeError naming `field` where a tensor of the decoder has more values than a kernel can index."""
        rows, columns = (count * self.vae.pixels_per_token for count in self.largest)
        where = f"{field}: at {rows}x{columns}{', the most rows and columns of the range,' if self.between else ''}"
        profiles = ", or shapes: profiles" if self.between else ""
        way_out = (
            "a smaller vae.tile" if self.of_tiles else f"the recipe's vae: {{tile: {self._example}}} to decode in tiles"
        )
        if self.activation > INDEXABLE:
            pixels = INDEXABLE // (self.activation // (rows * columns))
            raise RecipeError(
                f"{where} the VAE's decoder has an activation of {self.activation:,} values, and kernels index "
                f"{INDEXABLE:,}; use {way_out}, or sizes of at most {pixels / 1e6:.1f} megapixels{profiles}"
            )
        if self.scores > INDEXABLE:
            raise RecipeError(
                f"{where} a tile of the VAE's attention has {self.scores:,} scores, and kernels index {INDEXABLE:,}; no more "
                f"than {self.tiles} tiles divide every size. Use {way_out}, smaller sizes, sizes whose sides are multiples of "
                f"a larger number{profiles}"
            )

    @property
    def _example(self) -> list[int]:
        """A tile that a recipe may ask for."""
        return [64 * self.vae.pixels_per_token] * 2

    @property
    def _latents(self) -> int:
        return math.prod(self.vae.patch_size) * math.prod(self.largest)
