"""Draws pictures: prompt to tokens to embeddings, the step loop, the picture. All maths is in the bundle's graphs."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fluxrt.backends import Backend, make_backend
from fluxrt.errors import BackendError, RequestError
from fluxrt.prompt import PromptEncoder
from fluxrt.schedule import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from PIL.Image import Image

    from fluxrt.bundle import Bundle

State = dict[str, "np.ndarray"]


@dataclass(frozen=True)
class Result:
    """Pictures in the order of the prompts, and where the time went, in seconds."""

    images: list[Image]
    seconds: dict[str, float]


class Pipeline:
    """A bundle ready to draw with one of its targets."""

    def __init__(self, bundle: Bundle, *, target: str | None = None, threads: int | None = None) -> None:
        self.bundle = bundle
        self.target = bundle.target(target)
        self.backend: Backend = make_backend(bundle, self.target, threads)
        self._encoder: PromptEncoder | None = None

    def __call__(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        latents: np.ndarray | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Draw one picture a prompt.

        `seed` fixes the starting noise: one for all (picture i then uses seed + i) or one a prompt. `size` is
        (height, width) in pixels and must be one that was compiled. `guidance` 1.0 turns classifier-free guidance off
        where the model uses it. `latents`, fp32 [prompts, tokens, channels], replaces the starting noise.
        `on_step(done, total)` is called after every step. Raises RequestError for what the bundle cannot do.
        """
        import numpy as np

        sampling = self.bundle.manifest.sampling
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed, or one a prompt")
        steps = sampling.steps if steps is None else steps
        if steps < 1:
            raise RequestError(f"steps must be at least 1, got {steps}")
        guidance = sampling.guidance if guidance is None else guidance
        grid = self.grid(size)
        tokens = grid[0] * grid[1]
        expected = (len(prompts), tokens, sampling.latent_channels)
        if latents is None:
            latents = np.stack([starting_noise(s, tokens, sampling.latent_channels) for s in seeds])
        elif latents.shape != expected:
            raise RequestError(f"latents have shape {list(latents.shape)}, this request needs {list(expected)}")

        began = time.perf_counter()
        texts = [self.encode_text(p, guidance) for p in prompts]
        encoded = time.perf_counter()
        sigmas = SCHEDULES[sampling.schedule](tokens, steps)
        finals, done = [], 0
        for text, start in zip(texts, latents, strict=True):
            state = self.begin(start[None], text, grid, guidance)
            for sigma, next_sigma in itertools.pairwise(sigmas):
                self.step(state, sigma, next_sigma)
                done += 1
                if on_step:
                    on_step(done, steps * len(prompts))
            finals.append(state["latents"])
        stepped = time.perf_counter()
        images = [to_image(self.decode(final, grid)[0]) for final in finals]
        seconds = {
            "text": encoded - began,
            "steps": stepped - encoded,
            "decode": time.perf_counter() - stepped,
        }
        return Result(images, seconds)

    def grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Token rows and columns of `size` (height, width), which must have been compiled."""
        sampling = self.bundle.manifest.sampling
        size = sampling.sizes[0] if size is None else (int(size[0]), int(size[1]))
        if size not in sampling.sizes:
            known = ", ".join(f"{h}x{w}" for h, w in sampling.sizes)
            raise RequestError(
                f"size {size[0]}x{size[1]} (height x width) was not compiled; this bundle has {known}; "
                "choose one of them, or add it to sizes in the recipe and rebuild"
            )
        return size[0] // sampling.pixels_per_token, size[1] // sampling.pixels_per_token

    def tokenize(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, attention_mask), int64 [prompts, text length]."""
        if self._encoder is None:
            prompting = self.bundle.manifest.prompting
            self._encoder = PromptEncoder(prompting, self.bundle.checked_file(prompting.tokenizer))
        return self._encoder.encode(prompts)

    def encode_text(self, prompt: str, guidance: float) -> np.ndarray:
        """Embeddings fp32 [branches, text length, features]: the prompt, then the empty one if guidance needs it."""
        branches = [prompt]
        if self.bundle.manifest.sampling.guidance_branches and guidance > 1.0:
            branches.append("")
        ids, mask = self.tokenize(branches)
        return self.backend.run("text_encoder", {"input_ids": ids, "attention_mask": mask})["text"]

    def begin(self, latents: np.ndarray, text: np.ndarray, grid: tuple[int, int], guidance: float) -> State:
        """The named arrays a picture starts from: `latents` fp32 [1, tokens, channels], `text` [branches, length, features]."""
        import numpy as np

        return {
            "latents": np.ascontiguousarray(latents, dtype=np.float32),
            "text": text,
            "columns": np.array(grid[1], dtype=np.int64),
            "guidance": np.array(guidance, dtype=np.float32),
        }

    def step(self, state: State, sigma: float, next_sigma: float) -> None:
        """One denoising step: `state["latents"]` moves from `sigma` to `next_sigma`."""
        import numpy as np

        state["sigma"] = np.array(sigma, dtype=np.float32)
        state["next_sigma"] = np.array(next_sigma, dtype=np.float32)
        for graph in ("prologue", "body", "epilogue"):
            outputs = self.backend.run(graph, state)
            if "next_latents" in outputs:
                outputs["latents"] = outputs.pop("next_latents")
            state.update(outputs)

    def decode(self, latents: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Picture fp32 [1, height, width, 3] in 0..1 from `latents` [1, tokens, channels]."""
        spread = latents.reshape(1, grid[0], grid[1], latents.shape[-1])
        return self.backend.run("vae_decoder", {"latent_grid": spread})["image"]


def starting_noise(seed: int, tokens: int, channels: int) -> np.ndarray:
    """Gaussian noise fp32 [tokens, channels] from numpy's Philox generator: the same on every machine."""
    import numpy as np

    return np.random.Generator(np.random.Philox(seed)).standard_normal((tokens, channels), dtype=np.float32)


def to_image(pixels: np.ndarray) -> Image:
    """An 8-bit RGB picture from fp32 [height, width, 3] in 0..1; a NaN is a BackendError, never a black pixel."""
    import numpy as np
    from PIL import Image

    if not np.isfinite(pixels).all():
        raise BackendError(
            "the drawn picture holds NaN or infinity, so it is not shown; "
            "check the bundle with `fluxc verify`, and the guidance and steps of the request"
        )
    return Image.fromarray((pixels * 255).round().astype("uint8"))
