"""Generates images: prompt to tokens to embeddings, the step loop, the image. All maths is in the bundle's graphs."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxrt.backends import Backend, run
from fluxrt.backends.registry import make_backend
from fluxrt.choose import pick
from fluxrt.errors import BackendError, RequestError
from fluxrt.manifest import dimension_size
from fluxrt.memory import DECODE, DENOISE, ENCODE, Memory, choose
from fluxrt.prompt import PromptEncoder, load_encoder
from fluxrt.request import Request
from fluxrt.resolve import Resolved, branches, grid_of, resolve
from fluxrt.result import Result
from fluxrt.schedule import SCHEDULES
from fluxrt.sharding import rank_of
from fluxrt.stepcache import Decisions, decisions_for
from fluxrt.stepprecision import BODY
from fluxrt.texts import TEXT_CACHE, Texts, Words, key_of
from fluxrt.tiles import decode_in_tiles, with_tiles
from fluxrt.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from PIL.Image import Image

    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.result import OnImage, OnStep

LOG = logging.getLogger("fluxrt")


@dataclass(frozen=True)
class Saved:
    """Embeddings of `branches` prompts as a backend saved them."""

    branches: int
    content: np.ndarray


@dataclass
class _Begun:
    """A request: the texts that were encoded before its steps, and the latents of images that have made all steps."""

    request: Request
    found: Resolved
    texts: dict[bytes, Saved]
    finished: list[np.ndarray]


SECONDS = ("text", "steps", "decode")


class Pipeline:
    """A bundle ready to generate with one of its targets; of a sharded one, what one rank of `group` does for an image.

    Any number of threads may call `generate`: one is served at a time, the others wait. The methods below it are its steps,
    for one thread that generates nothing meanwhile. Every rank is asked for the same images. Rank 0 encodes the text and
    decodes the images, the others return none. `backend` replaces the one that the target's kind has.

    `memory` says whether text encoder, transformer and decoder take turns (staged), or stay (resident); auto takes turns where
    not everything fits at once, which the first request finds out, and a later one for a larger image. Images are the same to
    the bit. At most `text_cache` bytes of encoded prompts are kept.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        target: str | None = None,
        threads: int | None = None,
        group: Group | None = None,
        backend: Backend | None = None,
        memory: Memory = "auto",
        text_cache: int = TEXT_CACHE,
    ) -> None:
        self.bundle = bundle
        self.target = pick(bundle) if target is None else bundle.target(target)
        ranks = group.ranks if group else 1
        if self.target.gpus != ranks:
            raise RequestError(
                f"target {self.target.name!r} is sharded for {self.target.gpus} ranks, not {ranks}; "
                f"load the bundle with gpus={self.target.gpus} (fluxrt generate --gpus {self.target.gpus})"
            )
        self._rank, self._group = rank_of(group, self.target), group
        self.backend: Backend = backend or make_backend(bundle, self.target, threads, group)
        self._encoder: PromptEncoder | None = None
        self._sizes: dict[str, int] = {}
        self._turns = Turns()
        self._memory = memory
        self._is_staged: bool | None = None
        self._chosen_for = (0, 0)
        self._texts = Texts(text_cache)
        self._begun: _Begun | None = None

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

    def __call__(self, prompt: str | list[str], **options: Any) -> Result:
        """`generate` with a Request of this prompt or these prompts, and of its other fields by name."""
        return self.generate(Request(prompt, **options))

    def generate(self, request: Request, on_step: OnStep | None = None, on_image: OnImage | None = None) -> Result:
        """One image a prompt; `on_step(done, total)` is called after every step, `on_image(number, image, skipped)` when an
        image is made, with the steps it skipped. What they raise ends the request, not the pipeline.

        Raises RequestError, before any work, for what the bundle cannot do, and when it is called from on_step or on_image.
        """
        with self._turns.turn():
            return self._generate(request, self.resolve(request), on_step, on_image)

    def resolve(self, request: Request) -> Resolved:
        """What a request comes to; RequestError for what the bundle cannot do."""
        return resolve(self.bundle, self.target, request, self.encoder)

    def _generate(self, request: Request, found: Resolved, on_step: OnStep | None, on_image: OnImage | None) -> Result:
        """Where components take turns: the text of all prompts, then the steps of all images, then all images, so that each
        component is loaded once. Otherwise one group of images after the other.

        Where something ends it, the images that have made their steps are decoded and given first.
        """
        is_staged, why = self.choose_memory(found)
        say_memory(is_staged, why)
        seconds = dict.fromkeys(SECONDS, 0.0)
        skipped: list[tuple[int, ...]] = []
        images: list[Image] = []
        is_refused = False

        def give() -> None:
            nonlocal is_refused
            for number in range(len(images), len(skipped) if self._rank.is_first else 0):
                images.append(self._next_image(seconds))
                if on_image:
                    is_refused = True
                    on_image(number, images[-1], skipped[number])
                    is_refused = False

        if is_staged:
            self.encode_texts(request, found, seconds)
        else:
            self._begun = _Begun(request, found, {}, [])
        try:
            for numbers in found.groups:
                skipped += [self.denoise_images(numbers, seconds, on_step)] * len(numbers)
                if not is_staged:
                    give()
            give()
        except BaseException:
            if on_image and self._rank.is_first and len(images) < len(skipped):
                rescue(None if is_refused else give, len(skipped) - len(images))
            raise
        return Result(images, seconds, skipped, found.notes, self.target.name)

    def choose_memory(self, found: Resolved) -> tuple[bool, str]:
        """Whether components take turns for a request, the same on every rank, and why: empty where it was told before."""
        branches = len(found.tokens[0][0])
        size = (branches * found.batch, found.grid[0] * found.grid[1])
        most_yet = (max(size[0], self._chosen_for[0]), max(size[1], self._chosen_for[1]))
        if self._is_staged or (self._is_staged is False and most_yet == self._chosen_for):
            return self._is_staged, ""
        self._chosen_for = most_yet
        chosen, why = self._memory == "staged", "as asked"
        if self._memory == "auto":
            chosen, why = choose(self.backend.need(self._sizes_of(branches, found.grid, found.batch)))
            if self._group:
                # A rank with less room decides for all.
                most = self._group.agree(why if chosen else "")
                chosen, why = bool(most), most or why
        is_new = self._is_staged is None or chosen
        self._is_staged = chosen
        return chosen, why if is_new else ""

    def encode_texts(self, request: Request, found: Resolved, seconds: dict[str, float]) -> None:
        """Begin a request whose components take turns: encode all of its prompts that are not known. Rank 0 alone has work."""
        began = time.perf_counter()
        self._begun = _Begun(request, found, {}, [])
        for words in found.tokens if self._rank.is_first else ():
            known = self._texts.find(words)
            if known is not None:
                self._begun.texts[key_of(words)] = Saved(len(words[0]), known)
        unknown = {key_of(words): words for words in found.tokens if key_of(words) not in self._begun.texts}
        if unknown:
            self.backend.keep(ENCODE)
            self._prepare(len(found.tokens[0][0]), found.grid, found.batch)
        for key, words in unknown.items() if self._rank.is_first else ():
            self._begun.texts[key] = self._encode(words)
        self.backend.synchronize()
        seconds["text"] += time.perf_counter() - began

    def denoise_images(self, numbers: range, seconds: dict[str, float], on_step: OnStep | None) -> tuple[int, ...]:
        """The steps of the images `numbers` of the request that was begun, all at once; those that were skipped."""
        assert self._begun is not None
        request, found = self._begun.request, self._begun.found
        texts: list[Words | Saved] = []
        for number in numbers:
            words = found.tokens[number]
            texts.append(self._begun.texts.get(key_of(words), words))
        if self._is_staged:
            self.backend.keep(DENOISE)
        final, skipped = self._steps(request, found, numbers, texts, seconds, on_step)
        self._begun.finished += [final[at : at + 1] for at in range(len(numbers) if self._rank.is_first else 0)]
        return skipped

    def decode_next(self, seconds: dict[str, float]) -> Image | None:
        """The next image that has made its steps; None on ranks that decode none."""
        return self._next_image(seconds) if self._rank.is_first else None

    def _next_image(self, seconds: dict[str, float]) -> Image:
        assert self._begun is not None
        if self._is_staged:
            self.backend.keep(DECODE)
        image = self._decoded(self._begun.finished[0], self._begun.found, seconds)
        # Not before: an interrupted image is decoded again.
        del self._begun.finished[0]
        return image

    def _steps(
        self,
        request: Request,
        found: Resolved,
        numbers: range,
        texts: list[Words | Saved],
        seconds: dict[str, float],
        on_step: OnStep | None,
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """The images `numbers` from their texts to their last step: their latents, and the steps they skipped."""
        sampling = self.bundle.manifest.sampling
        tokens = found.grid[0] * found.grid[1]
        start = starting_latents(request.of_images(numbers), tokens, sampling.latent_channels)
        began = time.perf_counter()
        self.begin(start, found.grid, found.guidance, texts, keeps=self._texts.limit > 0)
        self.backend.synchronize()
        encoded = time.perf_counter()
        cache = self.bundle.manifest.step_cache
        decisions, _ = decisions_for(cache, found.steps, found.size, request.step_cache, request.threshold)
        sigmas = SCHEDULES[sampling.schedule](tokens, found.steps)
        left_out = []
        for step, skips in enumerate(self.denoise(sigmas, decisions)):
            left_out += [step] if skips else []
            if on_step:
                # A GPU is asked for steps long before it does them.
                self.backend.synchronize()
                done = numbers.start * found.steps + (step + 1) * len(numbers)
                on_step(done, found.steps * len(found.tokens))
        final = self.latents()
        seconds["text"] += encoded - began
        seconds["steps"] += time.perf_counter() - encoded
        return final, tuple(left_out)

    def _decoded(self, final: np.ndarray, found: Resolved, seconds: dict[str, float]) -> Image:
        began = time.perf_counter()
        image = to_image(self.decode(final, found.grid)[0])
        seconds["decode"] += time.perf_counter() - began
        return image

    def _encode(self, words: Words) -> Saved:
        """Embeddings of the branches `words`, in the text encoder's buffer and kept."""
        self._run_encoder(words)
        content = self.backend.save(self.encoded)
        self._texts.keep(words, content)
        return Saved(len(words[0]), content)

    def _run_encoder(self, words: Words) -> None:
        self.backend.put("input_ids", words[0])
        self.backend.put("attention_mask", words[1])
        self.backend.run(ENCODE)

    @property
    def encoded(self) -> str:
        """The buffer that the text encoder leaves the embeddings of one image's prompts in."""
        return self.backend.outputs(ENCODE[0])[0]

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
        return run(self.backend, ENCODE[0], {"input_ids": ids, "attention_mask": mask})[self.encoded]

    def begin(
        self,
        latents: np.ndarray,
        grid: tuple[int, int],
        guidance: float,
        text: np.ndarray | Words | Saved | list[Words | Saved],
        *,
        keeps: bool = False,
    ) -> None:
        """Fill the buffers that images start from.

        `latents` fp32 [images, tokens, channels]; `text` are embeddings [batch, length, features], an image's branches side by
        side, or for every image what a backend saved of them, or the (input_ids, attention_mask) of its branches, which are
        then encoded in place; for a single image without a list. With `keeps`, what is encoded is kept for later requests.
        """
        import numpy as np

        images = len(latents)
        if isinstance(text, np.ndarray):
            self._prepare(len(text) // images, grid, images)
            self._rank.put_text(self.backend, text)
        else:
            texts = text if isinstance(text, list) else [text]
            first = texts[0]
            self._prepare(first.branches if isinstance(first, Saved) else len(first[0]), grid, images)
            for number, one in enumerate(texts if self._rank.is_first else ()):
                self._put_text(one, keeps)
                self._rank.place_text(self.backend, self.encoded, number)
        self._rank.put_shard(self.backend)
        self.backend.put("latents", np.ascontiguousarray(self._rank.shard(latents), dtype=np.float32))
        self.backend.put("columns", np.array(grid[1], dtype=np.int64))
        if self.target.reads("guidance"):
            self.backend.put("guidance", np.array(guidance, dtype=np.float32))

    def _put_text(self, text: Words | Saved, keeps: bool) -> None:
        """Bring the embeddings of an image's prompts into the text encoder's buffer."""
        if isinstance(text, Saved):
            self.backend.restore(self.encoded, text.content)
        elif keeps and (known := self._texts.find(text)) is not None:
            self.backend.restore(self.encoded, known)
        else:
            self._run_encoder(text)
            if keeps:
                self._texts.keep(text, self.backend.save(self.encoded))

    def bodies(self, steps: int) -> list[str]:
        """The body that each step of a generation of `steps` runs (fluxrt.stepprecision)."""
        return self.bundle.manifest.bodies(self.target, steps)

    def body_at(self, sigma: float, steps: int, grid: tuple[int, int]) -> str:
        """The body of the step at `sigma`, or nearest to it, of a generation of `steps` at the size of `grid`."""
        schedule = SCHEDULES[self.bundle.manifest.sampling.schedule](grid[0] * grid[1], steps)[:-1]
        return self.bodies(steps)[min(range(steps), key=lambda number: abs(schedule[number] - sigma))]

    def step(self, sigma: float, next_sigma: float, body: str = BODY) -> None:
        """One denoising step: the buffer `latents` moves from `sigma` to `next_sigma`, through one of the target's bodies."""
        self._put_sigmas(sigma, next_sigma)
        self.backend.run(("prologue", body, "epilogue"), {"next_latents": "latents"})

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
        bodies = self.bodies(len(sigmas) - 1)
        for number, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            if decisions is None:
                self.step(sigma, next_sigma, bodies[number])
                yield False
                continue
            change = None
            if decisions.needs_change(number):
                self._put_sigmas(sigma, next_sigma)
                self.backend.run(front, feedback)
                moved, before = (float(part) for part in self._rank.sum(self.backend.get("change")))
                change = moved / before if before else 0.0
            skips = decisions.skip(number, change)
            back = ("epilogue",) if skips else (bodies[number], "epilogue")
            if change is None:
                self._put_sigmas(sigma, next_sigma)
                self.backend.run((*front, *back), {**feedback, "next_latents": "latents"})
            else:
                self.backend.run(back, {"next_latents": "latents"})
            yield skips

    def latents(self) -> np.ndarray:
        """The latents of the whole images, fp32 [images, tokens, channels], on every rank."""
        return self._rank.gather(self.backend.get("latents"))

    def decode(self, latents: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Image fp32 [1, height, width, 3] in 0..1 from `latents` [1, tokens, channels]."""
        spread, sampling = latents.reshape(1, grid[0], grid[1], latents.shape[-1]), self.bundle.manifest.sampling
        if sampling.tiled:
            return decode_in_tiles(self.backend, spread, sampling.tiled, sampling.pixels_per_token)
        return run(self.backend, "vae_decoder", {"latent_grid": spread})["image"]

    def _put_sigmas(self, sigma: float, next_sigma: float) -> None:
        import numpy as np

        self.backend.put("sigma", np.array(sigma, dtype=np.float32))
        self.backend.put("next_sigma", np.array(next_sigma, dtype=np.float32))

    def _prepare(self, branches: int, grid: tuple[int, int], images: int = 1) -> None:
        self._sizes = self._sizes_of(branches, grid, images)
        self.backend.prepare(self._sizes)

    def _sizes_of(self, branches: int, grid: tuple[int, int], images: int) -> dict[str, int]:
        return with_tiles(self.bundle.manifest.sampling, self._rank.sizes(branches, grid, images))


def say_memory(is_staged: bool, why: str) -> None:
    """Log what `choose_memory` gave, if it was not told before."""
    if why:
        what = "staged, components take turns" if is_staged else "resident, all components stay"
        LOG.info("memory: %s: %s", what, why, extra={"fields": {"memory": what.partition(",")[0], "reason": why}})


def rescue(give: Callable[[], None] | None, finished: int) -> None:
    """After what ended a request: decode and give the `finished` images, or say that they are lost, as where `give` is None."""
    try:
        if give:
            LOG.info("ended with %d finished images to be decoded; decoding them first", finished)
            give()
            return
    except Exception as error:
        LOG.warning("%s", error)
    LOG.warning("%d images that had made all their steps are lost: they were not decoded", finished)


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
