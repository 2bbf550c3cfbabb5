"""A request held against a bundle: everything that can be wrong with it is found here, before any work."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import UnsetType

from fluxrt.errors import RequestError
from fluxrt.request import check_request
from fluxrt.stepcache import decisions_for

if TYPE_CHECKING:
    import numpy as np

    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Sampling, Target
    from fluxrt.prompt import PromptEncoder
    from fluxrt.request import Request

LOG = logging.getLogger("fluxrt")
ONE_BY_ONE = "the step cache's rule decides for every image by itself, so images are made one at a time"


@dataclass(frozen=True)
class Resolved:
    """What a request comes to with a target: steps, guidance, size (height, width) in pixels, `grid`, its rows and columns of
    tokens, and for each prompt the (input_ids, attention_mask) of its branches. `batch` images are made at once. `notes` are
    for who asked."""

    steps: int
    guidance: float
    size: tuple[int, int]
    grid: tuple[int, int]
    tokens: list[tuple[np.ndarray, np.ndarray]]
    notes: list[str]
    batch: int = 1

    @property
    def groups(self) -> list[range]:
        """The images that are made at once, by their numbers."""
        images = len(self.tokens)
        return [range(first, min(first + self.batch, images)) for first in range(0, images, self.batch)]


def resolve(bundle: Bundle, target: Target, request: Request, encoder: PromptEncoder) -> Resolved:
    """Raises RequestError for what the bundle cannot do: the size, the step cache, the starting latents, any of the prompts."""
    sampling = bundle.manifest.sampling
    steps, guidance, size = check_request(request).with_defaults(sampling)
    grid = grid_of(sampling, target, size)
    batch = check_batch(sampling, request)
    decisions, note = decisions_for(bundle.manifest.step_cache, steps, size, request.step_cache, request.threshold)
    one_by_one = None
    if batch > 1 and decisions is not None and decisions.rule is not None:
        batch, one_by_one = 1, ONE_BY_ONE
    if request.latents is not None:
        expected = (len(request.prompts), grid[0] * grid[1], sampling.latent_channels)
        if request.latents.shape != expected:
            raise RequestError(f"latents have shape {list(request.latents.shape)}, this request needs {list(expected)}")
    tokens = [encoder.encode(branches(sampling, prompt, guidance)) for prompt in request.prompts]
    say_what(request, steps, guidance, size)
    if batch > 1:
        LOG.info("batch: up to %d images at once", batch)
    if bundle.manifest.step_cache:
        LOG.info(
            "step cache: %s", "off" if decisions is None else "by its rule" if decisions.rule else "by its schedule"
        )
    unused = unused_guidance(sampling, target.reads("guidance"), request)
    notes = [text for text in (note, one_by_one, unused) if text]
    for text in notes:
        LOG.info("%s", text)
    return Resolved(steps, guidance, size, grid, tokens, notes, batch)


def check_batch(sampling: Sampling, request: Request) -> int:
    """How many images are made at once; RequestError for more than were compiled for."""
    asked, most = request.batch or 1, max(sampling.compiled_batches)
    if asked > most:
        images = "one image" if most == 1 else f"up to {most} images"
        raise RequestError(
            f"batch {asked} was not compiled: this bundle makes {images} at once; "
            "ask for no more, or add it to batches in the recipe and rebuild"
        )
    return min(asked, len(request.prompts))


def say_what(request: Request, steps: int, guidance: float, size: tuple[int, int]) -> None:
    """Log what a request comes to, the bundle's values among it."""
    seeds = request.seeds
    count = "1 image" if len(seeds) == 1 else f"{len(seeds)} images"
    which = (
        f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds[:8]))}{', ...' * (len(seeds) > 8)}"
    )
    fields = {"images": len(seeds), "size": list(size), "steps": steps, "guidance": guidance, "seeds": seeds}
    said = "%s of %dx%d (height x width), %d steps, guidance %g, %s"
    LOG.info(said, count, *size, steps, guidance, which, extra={"fields": fields})


def branches(sampling: Sampling, prompt: str, guidance: float) -> list[str]:
    """The prompts of a step's passes: the prompt, and the empty one if guidance needs it."""
    return [prompt, ""] if sampling.cfg_batch and guidance > 1.0 else [prompt]


def unused_guidance(sampling: Sampling, is_read: bool, request: Request) -> str | None:
    """What to say where the guidance asked for changes nothing; None where it does, or none was asked for."""
    asked = request.guidance
    if asked is None or asked == 1.0:
        return None
    if not sampling.cfg_batch and not is_read:
        return f"guidance {asked:g} changes nothing: this model is distilled and takes none"
    if sampling.cfg_batch and asked < 1.0:
        return f"guidance {asked:g} is below 1, which turns classifier-free guidance off, as 1 does"
    return None


def grid_of(sampling: Sampling, target: Target, size: tuple[int, int]) -> tuple[int, int]:
    """Token rows and columns of `size` (height, width), which must have been compiled."""
    pixels = sampling.pixels_per_token
    rows, columns = size[0] // pixels, size[1] // pixels
    if size not in sampling.sizes and not sampling.in_range(size) and not _in_range(target, size, pixels):
        known = ", ".join(f"{h}x{w}" for h, w in sampling.sizes)
        if not isinstance(sampling.range, UnsetType):
            (least_h, least_w), (most_h, most_w) = sampling.range
            known += f", and heights of {least_h} to {most_h} by widths of {least_w} to {most_w} in steps of {pixels}"
        if target.tokens:
            least, greatest = target.tokens
            known += f", and sizes of {least} to {greatest} tokens of {pixels}x{pixels} pixels"
        raise RequestError(
            f"size {size[0]}x{size[1]} (height x width) was not compiled; this bundle has {known}; "
            "choose one of them, or add it to sizes in the recipe and rebuild"
        )
    sharding = target.sharding
    if sharding and not sharding.padded and rows * columns % sharding.ranks:
        raise RequestError(
            f"size {size[0]}x{size[1]} (height x width) has {rows * columns} image tokens, which {sharding.ranks} ranks "
            f"cannot share equally; choose a size with a multiple of {sharding.ranks}"
        )
    return rows, columns


def _in_range(target: Target, size: tuple[int, int], pixels: int) -> bool:
    if target.tokens is None or min(size) < 1 or size[0] % pixels or size[1] % pixels:
        return False
    return target.tokens[0] <= size[0] // pixels * (size[1] // pixels) <= target.tokens[1]
