"""A request: what to generate. It is checked here when it is made, and against a bundle by fluxrt.resolve before any work."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fluxrt import checks
from fluxrt.errors import RequestError

if TYPE_CHECKING:
    from fluxrt.manifest import Sampling


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image a prompt.

    `seed`, from 0 to 2^64 - 1, fixes the starting noise: one for all (image i then uses seed + i) or one a prompt. `steps`,
    `guidance` and `size` are the bundle's where they are None. `size` is (height, width) in pixels and must be one that was
    compiled. `guidance` 1.0 turns classifier-free guidance off where the model uses it. `latents`, fp32 [prompts, tokens,
    channels], replaces the starting noise. `step_cache` False computes every step; `threshold` has the step cache decide by its
    rule with this threshold. `batch` images at most are made at once, one where it is None; each is what it is by itself, up to
    rounding. Numbers may be numpy's. Raises RequestError for what no bundle could serve.
    """

    prompt: str | list[str]
    seed: int | list[int] = 0
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    latents: np.ndarray | None = None
    step_cache: bool | None = None
    threshold: float | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        """Check the fields, and keep them as Python's own types, which is what another process gets."""
        keep = msgspec.structs.force_setattr
        keep(self, "prompt", _prompt(self.prompt))
        keep(self, "seed", _seed(self.seed))
        if len(self.seeds) != len(self.prompts):
            raise RequestError(
                f"{len(self.prompts)} prompts but {len(self.seeds)} seeds; give one seed, or one a prompt"
            )
        for seed in self.seeds:
            checks.check_seed(seed)
        if self.steps is not None:
            keep(self, "steps", checks.check_steps(self.steps))
        if self.guidance is not None:
            keep(self, "guidance", checks.check_guidance(self.guidance))
        if self.size is not None:
            keep(self, "size", checks.check_size(self.size))
        if self.latents is not None:
            keep(self, "latents", _latents(self.latents))
        if self.batch is not None:
            keep(self, "batch", checks.check_batch(self.batch))
        self._check_step_cache()

    def _check_step_cache(self) -> None:
        if self.step_cache is not None and not isinstance(self.step_cache, bool):
            raise RequestError(f"step_cache must be True, False or None, got {type(self.step_cache).__name__}")
        if self.threshold is None:
            return
        if self.step_cache is False:
            raise RequestError(
                "--threshold goes with the step cache, which --no-step-cache turns off; give one of them"
            )
        msgspec.structs.force_setattr(self, "threshold", checks.check_threshold(self.threshold))

    @property
    def prompts(self) -> list[str]:
        """The prompts, of a single one too."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def seeds(self) -> list[int]:
        """A seed for each prompt."""
        if isinstance(self.seed, int):
            return [self.seed + number for number in range(len(self.prompts))]
        return list(self.seed)

    def of_images(self, numbers: range) -> Request:
        """The request for these of its images alone."""
        part = slice(numbers.start, numbers.stop)
        return msgspec.structs.replace(
            self,
            prompt=self.prompts[part],
            seed=self.seeds[part],
            latents=None if self.latents is None else self.latents[part],
        )

    def with_defaults(self, sampling: Sampling) -> tuple[int, float, tuple[int, int]]:
        """(steps, guidance, size), a bundle's where the request leaves them open."""
        return (
            sampling.steps if self.steps is None else self.steps,
            sampling.guidance if self.guidance is None else self.guidance,
            sampling.sizes[0] if self.size is None else self.size,
        )

    def encode(self) -> bytes:
        """The request for another process."""
        return msgspec.msgpack.encode(self, enc_hook=_encode_array)


def check_request(given: Any) -> Request:
    """`given`, which must be a Request."""
    if not isinstance(given, Request):
        raise RequestError(f"generate takes a fluxrt.Request, got {checks.shown(given)}")
    return given


def decode_request(data: bytes) -> Request:
    """The request that `encode` made `data` of."""
    return msgspec.msgpack.decode(data, type=Request, dec_hook=_decode_array)


def _prompt(given: Any) -> str | list[str]:
    if isinstance(given, str):
        return _text(given)
    if not isinstance(given, list | tuple):
        raise RequestError(f"prompt must be text, or a list of texts, got {type(given).__name__}")
    if not given:
        raise RequestError("there is no prompt; give at least one")
    return [_text(prompt) for prompt in given]


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise RequestError(f"a prompt must be text, got {type(given).__name__}")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt {given[:48]!a} is not valid Unicode at character {error.start}: half of a surrogate pair, or "
            "bytes of another encoding; give it as UTF-8"
        ) from None
    if not given.strip():
        raise RequestError("the prompt is empty; say what the image should show")
    for at, character in enumerate(given):
        if unicodedata.category(character) == "Cc" and not character.isspace():
            raise RequestError(
                f"the prompt {given[:48]!a} holds the control character {character!a} at character {at}; leave it out"
            )
    return str(given)


def _seed(given: Any) -> int | list[int]:
    if isinstance(given, list | tuple):
        return [checks.check_seed(seed) for seed in given]
    return checks.check_seed(given)


def _latents(given: Any) -> np.ndarray:
    if not isinstance(given, np.ndarray):
        raise RequestError(f"latents must be an array of numpy's, got {type(given).__name__}")
    if given.dtype.kind != "f":
        raise RequestError(f"latents must be floating-point numbers, got {given.dtype}")
    if not np.isfinite(given).all():
        raise RequestError("latents hold NaN or infinity")
    return given.astype(np.float32, copy=False)


def _encode_array(array: np.ndarray) -> dict[str, Any]:
    return {"shape": array.shape, "data": array.tobytes()}


def _decode_array(_: type, plain: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(plain["data"], np.float32).reshape(plain["shape"])
