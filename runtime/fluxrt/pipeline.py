"""Generates images: prompt to tokens to embeddings, the step loop, the image. All maths is in the bundle's graphs."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from fluxrt.backends import Backend, run
from fluxrt.backends.registry import make_backend
from fluxrt.choose import pick
from fluxrt.errors import BackendError, RequestError
from fluxrt.manifest import dimension_size
from fluxrt.prompt import PromptEncoder, load_encoder
from fluxrt.resolve import Resolved, branches, grid_of, resolve
from fluxrt.result import Result
from fluxrt.schedule import SCHEDULES
from fluxrt.sharding import rank_of
from fluxrt.stepcache import Decisions, decisions_for
from fluxrt.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from PIL.Image import Image

    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.request import Request
    from fluxrt.result import OnImage, OnStep

STEP = ("prologue", "body", "epilogue")


class Pipeline:
    """A bundle ready to generate with one of its targets; of a sharded one, what one rank of `group` does for an image.

    Any number of threads may call `generate`: one is served at a time, the others wait. The methods below it are its steps,
    for one thread that generates nothing meanwhile. Every rank is asked for the same images. Rank 0 encodes the text and
    decodes the images, the others return none. `backend` replaces the one that the target's kind has.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        target: str | None = None,
        threads: int | None = None,
        group: Group | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.bundle = bundle
        self.target = pick(bundle) if target is None else bundle.target(target)
        ranks = group.ranks if group else 1
        if self.target.gpus != ranks:
            raise RequestError(
                f"target {self.target.name!r} is sharded for {self.target.gpus} ranks, not {ranks}; "
                f"load the bundle with gpus={self.target.gpus} (fluxrt generate --gpus {self.target.gpus})"
            )
        self._rank = rank_of(group, self.target)
        self.backend: Backend = backend or make_backend(bundle, self.target, threads, group)
        self._encoder: PromptEncoder | None = None
        self._sizes: dict[str, int] = {}
        self._turns = Turns()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def notes(self) -> list[str]:
        """What did not go as it should and was worked around."""
        return self.backend.notes

    def close(self) -> None:
        """Give back what the backend holds, when the request that is being served has returned."""
        with self._turns.turn():
            self.backend.close()

    def generate(self, request: Request, on_step: OnStep | None = None, on_image: OnImage | None = None) -> Result:
        """One image a prompt; `on_step(done, total)` is called after every step, `on_image(number, image, skipped)` when an
        image is made, with the steps it skipped. What they raise ends the request, not the pipeline.

        Raises RequestError, before any work, for what the bundle cannot do, and when it is called from on_step or on_image.
        """
        with self._turns.turn():
            return self._generate(request, resolve(self.bundle, self.target, request, self.encoder), on_step, on_image)

    def _generate(self, request: Request, found: Resolved, on_step: OnStep | None, on_image: OnImage | None) -> Result:
        sampling, cache = self.bundle.manifest.sampling, self.bundle.manifest.step_cache
        tokens = found.grid[0] * found.grid[1]
        sigmas = SCHEDULES[sampling.schedule](tokens, found.steps)
        seconds = {"text": 0.0, "steps": 0.0, "decode": 0.0}
        images: list[Image] = []
        skipped: list[tuple[int, ...]] = []
        for number, words in enumerate(found.tokens):
            start = starting_latents(request.of_image(number), tokens, sampling.latent_channels)
            began = time.perf_counter()
            self.begin(start, found.grid, found.guidance, words)
            self.backend.synchronize()
            encoded = time.perf_counter()
            decisions, _ = decisions_for(cache, found.steps, found.size, request.step_cache, request.threshold)
            left_out = []
            for step, skips in enumerate(self.denoise(sigmas, decisions)):
                left_out += [step] if skips else []
                if on_step:
                    # A GPU is asked for steps long before it does them.
                    self.backend.synchronize()
                    on_step(number * found.steps + step + 1, found.steps * len(found.tokens))
            skipped.append(tuple(left_out))
            final = self.latents()
            stepped = time.perf_counter()
            if self._rank.is_first:
                images.append(to_image(self.decode(final, found.grid)[0]))
            decoded = time.perf_counter()
            for what, took in (("text", encoded - began), ("steps", stepped - encoded), ("decode", decoded - stepped)):
                seconds[what] += took
            if on_image and self._rank.is_first:
                on_image(number, images[-1], skipped[-1])
        return Result(images, seconds, skipped, found.notes, self.target.name)

    def grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Token rows and columns of `size` (height, width), which must have been compiled."""
        sampling = self.bundle.manifest.sampling
        return grid_of(sampling, self.target, sampling.sizes[0] if size is None else (int(size[0]), int(size[1])))

    def branches(self, prompt: str, guidance: float) -> list[str]:
        """The prompts of a step's passes: the prompt, and the empty one if guidance needs it."""
        return branches(self.bundle.manifest.sampling, prompt, guidance)

    @property
    def encoder(self) -> PromptEncoder:
        """Turns prompts into tokens; its tokenizer is read when it is first asked for."""
        if self._encoder is None:
            self._encoder = load_encoder(self.bundle)
        return self._encoder

    def tokenize(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, attention_mask), int64 [prompts, text length]."""
        return self.encoder.encode(prompts)

    def encode_text(self, prompt: str, guidance: float) -> np.ndarray:
        """Embeddings fp32 [branches, text length, features] of the prompt's branches."""
        ids, mask = self.tokenize(self.branches(prompt, guidance))
        self._prepare(len(ids), self.grid(None))
        return run(self.backend, "text_encoder", {"input_ids": ids, "attention_mask": mask})["text"]

    def begin(
        self,
        latents: np.ndarray,
        grid: tuple[int, int],
        guidance: float,
        text: np.ndarray | tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Fill the buffers an image starts from.

        `latents` fp32 [1, tokens, channels]; `text` are embeddings [branches, length, features], or the (input_ids,
        attention_mask) of the branches, which are then encoded in place.
        """
        import numpy as np

        given = text[0] if isinstance(text, tuple) else text
        self._prepare(len(given), grid)
        if isinstance(text, tuple) and self._rank.is_first:
            self.backend.put("input_ids", text[0])
            self.backend.put("attention_mask", text[1])
            self.backend.run(("text_encoder",))
        elif not isinstance(text, tuple):
            self.backend.put("text", text)
        self._rank.put_shard(self.backend)
        self.backend.put("latents", np.ascontiguousarray(self._rank.shard(latents), dtype=np.float32))
        self.backend.put("columns", np.array(grid[1], dtype=np.int64))
        if self.target.reads("guidance"):
            self.backend.put("guidance", np.array(guidance, dtype=np.float32))

    def step(self, sigma: float, next_sigma: float, graphs: tuple[str, ...] = STEP) -> None:
        """One denoising step: the buffer `latents` moves from `sigma` to `next_sigma`."""
        self._put_sigmas(sigma, next_sigma)
        self.backend.run(graphs, {"next_latents": "latents"})

    def denoise(self, sigmas: list[float], decisions: Decisions | None = None) -> Iterator[bool]:
        """Every step from what `begin` left, and whether its body was skipped; `decisions` None computes them all.

        A step whose decision needs its change is cut in two: the host looks at two numbers in between.
        """
        import numpy as np

        dynamic = decisions is not None and decisions.rule is not None
        if dynamic:
            shape = self.target.input("previous_signal").shape
            self.backend.put("previous_signal", np.zeros([dimension_size(d, self._sizes) for d in shape], np.float32))
        front = ("prologue", "signal") if dynamic else ("prologue",)
        feedback = {"signal": "previous_signal"} if dynamic else {}
        for number, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            if decisions is None:
                self.step(sigma, next_sigma)
                yield False
                continue
            change = None
            if decisions.needs_change(number):
                self._put_sigmas(sigma, next_sigma)
                self.backend.run(front, feedback)
                moved, before = (float(part) for part in self._rank.sum(self.backend.get("change")))
                change = moved / before if before else 0.0
            skips = decisions.skip(number, change)
            back = ("epilogue",) if skips else ("body", "epilogue")
            if change is None:
                self._put_sigmas(sigma, next_sigma)
                self.backend.run((*front, *back), {**feedback, "next_latents": "latents"})
            else:
                self.backend.run(back, {"next_latents": "latents"})
            yield skips

    def latents(self) -> np.ndarray:
        """The latents of the whole image, fp32 [1, tokens, channels], on every rank."""
        return self._rank.gather(self.backend.get("latents"))

    def decode(self, latents: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Image fp32 [1, height, width, 3] in 0..1 from `latents` [1, tokens, channels]."""
        spread = latents.reshape(1, grid[0], grid[1], latents.shape[-1])
        return run(self.backend, "vae_decoder", {"latent_grid": spread})["image"]

    def _put_sigmas(self, sigma: float, next_sigma: float) -> None:
        import numpy as np

        self.backend.put("sigma", np.array(sigma, dtype=np.float32))
        self.backend.put("next_sigma", np.array(next_sigma, dtype=np.float32))

    def _prepare(self, branches: int, grid: tuple[int, int]) -> None:
        self._sizes = self._rank.sizes(branches, grid)
        self.backend.prepare(self._sizes)


def starting_latents(request: Request, tokens: int, channels: int) -> np.ndarray:
    """The latents of a request's images before the first step, fp32 [prompts, tokens, channels]: its own, or noise."""
    import numpy as np

    if request.latents is not None:
        return request.latents
    return np.stack([starting_noise(seed, tokens, channels) for seed in request.seeds])


def starting_noise(seed: int, tokens: int, channels: int) -> np.ndarray:
    """Gaussian noise fp32 [tokens, channels] from numpy's Philox generator: the same on every machine."""
    import numpy as np

    return np.random.Generator(np.random.Philox(seed)).standard_normal((tokens, channels), dtype=np.float32)


def to_image(pixels: np.ndarray) -> Image:
    """An 8-bit RGB image from fp32 [height, width, 3] in 0..1; a NaN is a BackendError, never a black pixel."""
    import numpy as np
    from PIL import Image

    if not np.isfinite(pixels).all():
        raise BackendError(
            "the generated image holds NaN or infinity, so it is not shown; "
            "check the bundle with `fluxc verify`, and the guidance and steps of the request"
        )
    return Image.fromarray((pixels * 255).round().astype("uint8"))
