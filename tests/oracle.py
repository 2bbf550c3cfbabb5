"""Reads foreground colour, background colour and position from an image of flux2-nano's world, without any model."""

from __future__ import annotations

import numpy as np

from pictures import COLOURS, POSITIONS, Spec

PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
NAMES = list(COLOURS)


def read(image: np.ndarray) -> tuple[str, str, str] | None:
    """(foreground colour, background colour, position) of uint8 or 0..1 `image` [64, 64, 3]; None if there is no shape.

    The ground is the median of the outermost two pixels. The shape is what lies nearer to another palette colour than to
    the ground; its colour is the one most of those pixels are nearest to, its position the nearest to their centre.
    """
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.max() <= 1.0:
        pixels = pixels * 255
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = _nearest(np.median(border, axis=0))
    distance = np.linalg.norm(pixels[:, :, None, :] - PALETTE, axis=-1)
    nearest = distance.argmin(-1)
    away = np.linalg.norm(pixels - PALETTE[ground], axis=-1)
    strong = away > 0.6 * np.percentile(away, 99.5)
    shape = (nearest != ground) & strong
    if shape.sum() < 12:
        return None
    votes = np.bincount(nearest[shape], minlength=len(PALETTE))
    votes[ground] = 0
    colour = int(votes.argmax())
    rows, columns = np.nonzero(shape & (nearest == colour))
    centre = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
    places = list(POSITIONS)
    position = places[int(np.linalg.norm(np.array(list(POSITIONS.values())) - centre, axis=1).argmin())]
    return NAMES[colour], NAMES[ground], position


def follows(image: np.ndarray, spec: Spec) -> bool:
    """Whether foreground colour, background colour and position are all as `spec` says."""
    return read(image) == (spec.colour, spec.background, spec.position)


def _nearest(pixel: np.ndarray) -> int:
    return int(np.linalg.norm(PALETTE - pixel, axis=1).argmin())
