"""Decodes an image in tiles that overlap: where each lies, and the graphs run over one after the other.

All tiles of an image are of one size. They are spread evenly, so that the last ends where the image does, and neighbours
overlap by at least what was asked for. From a tile's first pixel on, the image goes linearly from the tile before to this one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fluxrt.backends import Backend
    from fluxrt.manifest import Sampling, Tiles

BLEND = "vae_blend"
"""The graph that adds a tile to the canvas: present in bundles that decode in tiles."""
NOWHERE = 1.0
"""The length of a ramp that no pixel of the image is on."""


@dataclass(frozen=True)
class Span:
    """A tile along one side of the image: its first token, and in pixels what the graph `vae_blend` takes of it.

    Its weight rises from 0 at the pixel `rise` to 1 after `rise_length` pixels, where the tile before it fades, and falls
    likewise from the pixel `fall` on, where the next one comes in.
    """

    token: int
    start: float
    rise: float
    rise_length: float
    fall: float
    fall_length: float

    @property
    def values(self) -> list[float]:
        """What the graph takes."""
        return [self.start, self.rise, self.rise_length, self.fall, self.fall_length]


def first_tokens(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` tokens start along a side of `length` tokens: as few as overlap by at least `overlap`."""
    if length <= tile:
        return [0]
    gaps = -(-(length - tile) // (tile - overlap))
    return [number * (length - tile) // gaps for number in range(gaps + 1)]


def spans(length: int, tile: int, overlap: int, pixels: int) -> list[Span]:
    """The tiles along a side of `length` tokens of `pixels` pixels each.

    Two tiles blend over all that they share, up to where the next but one begins, so that no pixel is on two ramps.
    """
    starts = first_tokens(length, tile, overlap)
    ends = [start + tile for start in starts]
    # No pixel lies before the first ramp or after the last.
    ramps = [(-NOWHERE, NOWHERE)]
    for number, start in enumerate(starts[1:], start=1):
        following = starts[number + 1] if number + 1 < len(starts) else length
        shared = (min(ends[number - 1], following) - start) * pixels
        # Without overlap the ramp is one pixel long, and ends at the tile's first.
        ramps.append((start * pixels, shared) if shared else (start * pixels - NOWHERE, NOWHERE))
    ramps.append((length * pixels, NOWHERE))
    return [
        Span(start, start * pixels, *rise, *fall)
        for start, (rise, fall) in zip(starts, itertools.pairwise(ramps), strict=True)
    ]


def tile_sizes(tiles: Tiles | None, pixels_per_token: int, grid: tuple[int, int]) -> dict[str, int]:
    """What dimensions of the graphs that decode in `tiles` count for an image of `grid` (rows, columns) tokens; none without
    tiles, where images are decoded whole."""
    if tiles is None:
        return {}
    rows, columns = (min(whole, side) for whole, side in zip(grid, tiles.size, strict=True))
    return {
        "tile_rows": rows,
        "tile_columns": columns,
        "tile_height": rows * pixels_per_token,
        "tile_width": columns * pixels_per_token,
        "height": grid[0] * pixels_per_token,
        "width": grid[1] * pixels_per_token,
    }


def with_tiles(sampling: Sampling, sizes: Mapping[str, int]) -> dict[str, int]:
    """`sizes`, and what graphs that decode in tiles count for such an image."""
    grid = (sizes["rows"], sizes["columns"])
    return {**sizes, **tile_sizes(sampling.tiled, sampling.pixels_per_token, grid)}


def decode_in_tiles(backend: Backend, latents: np.ndarray, tiles: Tiles, pixels_per_token: int) -> np.ndarray:
    """Image fp32 [1, height, width, 3] in 0..1 from `latents` [1, rows, columns, C]; one tile is the image as decoded.

    A canvas starts from zeros, and each tile is added to it with its weights.
    """
    import numpy as np

    rows, columns = latents.shape[1:3]
    down, across = (
        spans(length, min(length, tile), overlap, pixels_per_token)
        for length, tile, overlap in zip((rows, columns), tiles.size, tiles.overlap, strict=True)
    )
    height, width = (min(length, tile) for length, tile in zip((rows, columns), tiles.size, strict=True))
    is_whole = len(down) == len(across) == 1
    if not is_whole:
        shape = (1, rows * pixels_per_token, columns * pixels_per_token, 3)
        backend.put("canvas", np.zeros(shape, np.float32))
    for row, column in itertools.product(down, across):
        part = latents[:, row.token : row.token + height, column.token : column.token + width]
        backend.put("latent_grid", np.ascontiguousarray(part))
        if is_whole:
            backend.run(("vae_decoder",))
            return backend.get("tile")
        backend.put("spans", np.array([row.values, column.values], np.float32))
        backend.run(("vae_decoder", BLEND), {"image": "canvas"})
    return backend.get("canvas")
