"""How a target fits the VAE's decoder to its sizes: the query tiles of its attention, and sizes that no kernel can index."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluxc.base.errors import RecipeError
from fluxc.models.flux2_vae import Flux2VAE

INDEXABLE = 2**31 - 1
"""Values of a tensor that a signed index of 32 bits reaches, which kernels count with."""


@dataclass(frozen=True)
class Decoder:
    """The decoder of `vae` for images of `grids`, token rows and columns; with `between` also for all sizes between them."""

    vae: Flux2VAE
    grids: tuple[tuple[int, int], ...]
    between: bool = False

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
        if self.activation > INDEXABLE:
            pixels = INDEXABLE // (self.activation // (rows * columns))
            raise RecipeError(
                f"{where} the VAE's decoder has an activation of {self.activation:,} values, and kernels index "
                f"{INDEXABLE:,}; use sizes of at most {pixels / 1e6:.1f} megapixels{profiles}"
            )
        if self.scores > INDEXABLE:
            raise RecipeError(
                f"{where} a tile of the VAE's attention has {self.scores:,} scores, and kernels index {INDEXABLE:,}; no more "
                f"than {self.tiles} tiles divide every size. Use smaller sizes, sizes whose sides are multiples of a larger "
                f"number{profiles}"
            )

    @property
    def _latents(self) -> int:
        return math.prod(self.vae.patch_size) * math.prod(self.largest)
