"""The little world flux2-nano draws: coloured shapes on coloured grounds, with captions. Rendered, never stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

SIDE = 64

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (246, 210, 50),
    "purple": (136, 58, 178),
    "orange": (240, 130, 36),
    "white": (245, 245, 245),
    "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 8.0, "large": 13.5}
POSITIONS = {
    "top left": (18, 18),
    "top": (32, 18),
    "top right": (46, 18),
    "left": (18, 32),
    "center": (32, 32),
    "right": (46, 32),
    "bottom left": (18, 46),
    "bottom": (32, 46),
    "bottom right": (46, 46),
}
TEMPLATES = (
    "a {size} {colour} {shape} at the {position} on a {background} background",
    "a {background} background with a {size} {colour} {shape} at the {position}",
    "{size} {colour} {shape}, {position}, {background} background",
)


@dataclass(frozen=True)
class Spec:
    """What one picture shows; every field is a word of the captions."""

    size: str
    colour: str
    shape: str
    position: str
    background: str

    def caption(self, template: int = 0) -> str:
        return TEMPLATES[template].format(**vars(self))


def all_specs() -> list[Spec]:
    """Every combination whose shape can be told from its ground, in a fixed order."""
    return [
        Spec(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, POSITIONS, COLOURS) if words[1] != words[4]
    ]


def split_specs(held_out: int = 256, seed: int = 7) -> tuple[list[Spec], list[Spec]]:
    """(training, unseen): a seeded split; no unseen combination is ever rendered in training."""
    specs = all_specs()
    order = np.random.default_rng(seed).permutation(len(specs))
    return [specs[i] for i in order[held_out:]], [specs[i] for i in order[:held_out]]


def _signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Distance in pixels to the outline, negative inside; x, y [N, S, S] from the centre, r [N, 1, 1]."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72 * r).abs() - 0.28 * r
    if shape == "square":
        return torch.maximum(ax, ay) - 0.86 * r
    if shape == "diamond":
        return (ax + ay - 1.1 * r) / 2**0.5
    if shape == "cross":
        arm, width = 0.95 * r, 0.33 * r
        bar = torch.maximum(ax - arm, ay - width)
        return torch.minimum(bar, torch.maximum(ax - width, ay - arm))
    if shape == "triangle":
        return torch.maximum(0.894 * ax - 0.447 * (y + 0.95 * r), y - 0.75 * r)
    raise ValueError(f"unknown shape {shape!r}")


def render(specs: list[Spec], generator: torch.Generator, jitter: float = 1.5) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] fp32 in -1..1, edges antialiased over one pixel, places and sizes jittered."""
    count = len(specs)
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * jitter
    scale = 1 + (torch.rand(count, generator=generator) * 2 - 1) * 0.06
    centre = torch.tensor([POSITIONS[s.position] for s in specs], dtype=torch.float32) + shift
    radius = (torch.tensor([SIZES[s.size] for s in specs]) * scale)[:, None, None]
    axis = torch.arange(SIDE, dtype=torch.float32) + 0.5
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    cover = torch.empty(count, SIDE, SIDE)
    for shape in SHAPES:
        rows = torch.tensor([i for i, s in enumerate(specs) if s.shape == shape], dtype=torch.long)
        if len(rows):
            distance = _signed_distance(shape, x[rows].expand(-1, SIDE, -1), y[rows].expand(-1, -1, SIDE), radius[rows])
            cover[rows] = (0.5 - distance).clamp(0, 1)
    front = torch.tensor([COLOURS[s.colour] for s in specs], dtype=torch.float32)[:, :, None, None]
    back = torch.tensor([COLOURS[s.background] for s in specs], dtype=torch.float32)[:, :, None, None]
    mixed = back + (front - back) * cover[:, None]
    return mixed / 127.5 - 1
