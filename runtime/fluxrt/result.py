"""What a request came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Result:
    """Images in the order of the prompts, where the time went, in seconds, and the steps each image skipped (from 0).

    `notes` says what the caller should know of how the request was served.
    """

    images: list[Image]
    seconds: dict[str, float]
    skipped: list[tuple[int, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
