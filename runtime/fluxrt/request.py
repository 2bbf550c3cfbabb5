"""A request: what to generate. It is checked here when it is made, and against a bundle by fluxrt.resolve before any work."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fluxrt.errors import RequestError

if TYPE_CHECKING:
    from fluxrt.manifest import Sampling

LARGEST_SEED = 2**64 - 1
MOST_STEPS = 100_000


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image a prompt.

    `seed`, from 0 to 2^64 - 1, fixes the starting noise: one for all (image i then uses seed + i) or one a prompt. `steps`,
    `guidance` and `size` are the bundle's where they are None. `size` is (height, width) in pixels and must be one that was
    compiled. `guidance` 1.0 turns classifier-free guidance off where the model uses it. `latents`, fp32 [prompts, tokens,
    channels], replaces the starting noise. `step_cache` False computes every step; `threshold` has the step cache decide by its
    rule with this threshold. Numbers may be numpy's. Raises RequestError for what no bundle could serve.
    """

    prompt: str | list[str]
    seed: int | list[int] = 0
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    latents: np.ndarray | None = None
    step_cache: bool | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Check the fields, and keep them as Python's own types, which is what another process gets."""
        keep = msgspec.structs.force_setattr
        keep(self, "prompt", _prompt(self.prompt))
        keep(self, "seed", _seed(self.seed))
        if len(self.seeds) != len(self.prompts):
            raise RequestError(
                f"{len(self.prompts)} prompts but {len(self.seeds)} seeds; give one seed, or one a prompt"
            )
        if not 0 <= min(self.seeds) <= max(self.seeds) <= LARGEST_SEED:
            wrong = next(seed for seed in self.seeds if not 0 <= seed <= LARGEST_SEED)
            raise RequestError(f"seeds must be from 0 to 2^64 - 1, got {wrong}")
        if self.steps is not None:
            keep(self, "steps", _whole("steps", self.steps))
            if not 1 <= self.steps <= MOST_STEPS:
                raise RequestError(f"steps must be at least 1 and at most {MOST_STEPS}, got {self.steps}")
        if self.guidance is not None:
            keep(self, "guidance", _real("guidance", self.guidance))
            if not 0 <= self.guidance < math.inf:
                raise RequestError(f"guidance must be a number of at least 0, got {self.guidance}")
        if self.size is not None:
            keep(self, "size", _size(self.size))
        if self.latents is not None:
            keep(self, "latents", _latents(self.latents))
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
        msgspec.structs.force_setattr(self, "threshold", _real("threshold", self.threshold))
        if not self.threshold >= 0:
            raise RequestError(f"threshold must be at least 0, got {self.threshold}")

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

    def of_image(self, number: int) -> Request:
        """The request for image `number` alone."""
        return msgspec.structs.replace(
            self,
            prompt=self.prompts[number],
            seed=self.seeds[number],
            latents=None if self.latents is None else self.latents[number : number + 1],
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
    return str(given)


def _seed(given: Any) -> int | list[int]:
    if isinstance(given, list | tuple):
        return [_whole("seed", seed) for seed in given]
    return _whole("seed", given)


def _whole(field: str, given: Any) -> int:
    """A whole number of Python's or numpy's; no bool, and nothing that would have to be rounded."""
    if isinstance(given, bool | np.bool_):
        raise RequestError(f"{field} must be a whole number, got {given}")
    try:
        return operator.index(given)
    except TypeError:
        shown = given if isinstance(given, float) else type(given).__name__
        raise RequestError(f"{field} must be a whole number, got {shown}") from None


def _real(field: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, Real):
        raise RequestError(f"{field} must be a number, got {type(given).__name__}")
    return float(given)


def _size(given: Any) -> tuple[int, int]:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise RequestError(f"size must be (height, width) in pixels, got {given!r}")
    height, width = (_whole("size", side) for side in given)
    return height, width


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
