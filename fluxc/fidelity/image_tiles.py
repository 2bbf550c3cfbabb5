"""What decoding in tiles should give: diffusers' decoder on each tile, blended in torch; and how far that is from the whole.

The division is the runtime's (fluxrt.tiles), the rest is apart from it: tiles are laid over one another from left to right into
bands, and bands from top to bottom, each fading in over what it shares with the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fluxc.base.numbers import significant
from fluxc.fidelity.metrics import psnr
from fluxrt.evidence import relative_error
from fluxrt.manifest import Tiles
from fluxrt.tiles import first_tokens

Decode = Callable[[torch.Tensor], np.ndarray]


def decoded_in_tiles(decode: Decode, latents: torch.Tensor, tiles: Tiles, patch: tuple[int, int]) -> np.ndarray:
    """The image fp32 [height, width, 3] of `latents` [1, C, rows, columns], of which a token has `patch` a side.

    `decode` gives the image in 0..1 of the latents of a tile.
    """
    (rows, columns), (patch_rows, patch_columns) = latents.shape[2:], patch
    tops = first_tokens(rows // patch_rows, tiles.size[0], tiles.overlap[0])
    lefts = first_tokens(columns // patch_columns, tiles.size[1], tiles.overlap[1])
    height, width = tiles.size[0] * patch_rows, tiles.size[1] * patch_columns

    def tile(top: int, left: int) -> np.ndarray:
        top, left = top * patch_rows, left * patch_columns
        return decode(latents[:, :, top : top + height, left : left + width])

    def band(top: int) -> np.ndarray:
        return _laid_over([partial(tile, top, left) for left in lefts], lefts, columns // patch_columns, axis=1)

    return _laid_over([partial(band, top) for top in tops], tops, rows // patch_rows, axis=0)


def _laid_over(parts: Sequence[Callable[[], np.ndarray]], starts: list[int], length: int, axis: int) -> np.ndarray:
    """Parts that begin at `starts` of `length` tokens along `axis`, one over the other."""
    first = parts[0]()
    if len(parts) == 1:
        return first
    tile = first.shape[axis]
    # The last part ends where the whole does.
    pixels = tile // (length - starts[-1])
    whole = np.moveaxis(first, axis, 0)
    for number, part in enumerate(parts[1:], start=1):
        start = starts[number] * pixels
        following = starts[number + 1] * pixels if number + 1 < len(starts) else length * pixels
        shared = min(len(whole), following) - start
        arriving = np.moveaxis(part(), axis, 0)
        share = np.arange(shared, dtype=np.float32).reshape(-1, 1, 1) / max(shared, 1)
        before = whole[start : start + shared]
        blended = before + share * (arriving[:shared] - before)
        whole = np.concatenate([whole[:start], blended, arriving[shared:]])
    return np.moveaxis(whole, 0, axis)


def tiling_figures(
    tiles: Tiles, pixels: int, tiled: Sequence[np.ndarray], whole: Sequence[np.ndarray]
) -> dict[str, Any]:
    """How far images decoded in tiles are from those decoded whole, by the reference's own decoder: means and the worst."""
    psnrs = [psnr(one, other) for one, other in zip(tiled, whole, strict=True)]
    return {
        "tile": [side * pixels for side in tiles.size],
        "overlap": [side * pixels for side in tiles.overlap],
        "psnr_db": significant(float(np.mean(psnrs))),
        "psnr_db_worst": significant(min(psnrs)),
        "error": significant(max(relative_error(one, other) for one, other in zip(tiled, whole, strict=True))),
    }
