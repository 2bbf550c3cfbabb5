"""What a request came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    OnStep = Callable[[int, int], None]
    """Called with the steps done and those there are, of all images of a request."""
    OnImage = Callable[[int, Image, tuple[int, ...]], None]
    """Called with an image's number, the image, and the steps it skipped."""


@dataclass(frozen=True)
class Result:
    """Images in the order of the prompts, where the time went, in seconds, and the steps each image skipped (from 0).

    `notes` says what the caller should know of how the request was served; `target` is the name of the target that did it.
    """

    images: list[Image]
    seconds: dict[str, float]
    skipped: list[tuple[int, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    target: str = ""
