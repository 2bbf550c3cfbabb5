"""A request: what to generate. It is checked here when it is made, and against a bundle by the pipeline that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fluxrt.errors import RequestError

if TYPE_CHECKING:
    from fluxrt.bundle import Sampling


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image a prompt.

    `seed` fixes the starting noise: one for all (image i then uses seed + i) or one a prompt. `steps`, `guidance` and `size`
    are the bundle's where they are None. `size` is (height, width) in pixels and must be one that was compiled. `guidance` 1.0
    turns classifier-free guidance off where the model uses it. `latents`, fp32 [prompts, tokens, channels], replaces the
    starting noise. `step_cache` False computes every step; `threshold` has the step cache decide by its rule with this
    threshold. Raises RequestError for what no bundle could serve.
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
        self._check_types()
        prompts, seeds = len(self.prompts), len(self.seeds)
        if not prompts:
            raise RequestError("there is no prompt; give at least one")
        if seeds != prompts:
            raise RequestError(f"{prompts} prompts but {seeds} seeds; give one seed, or one a prompt")
        if self.steps is not None and self.steps < 1:
            raise RequestError(f"steps must be at least 1, got {self.steps}")
        if self.threshold is not None:
            if self.step_cache is False:
                raise RequestError(
                    "--threshold goes with the step cache, which --no-step-cache turns off; give one of them"
                )
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

    def with_defaults(self, sampling: Sampling) -> tuple[int, float, tuple[int, int]]:
        """(steps, guidance, size), a bundle's where the request leaves them open."""
        return (
            sampling.steps if self.steps is None else self.steps,
            sampling.guidance if self.guidance is None else self.guidance,
            sampling.sizes[0] if self.size is None else (int(self.size[0]), int(self.size[1])),
        )

    def _check_types(self) -> None:
        """msgspec checks types where it decodes, not where a struct is made by hand."""
        given: dict[str, tuple[type, Sequence[Any]]] = {
            "prompt": (str, self.prompt if isinstance(self.prompt, list | tuple) else [self.prompt]),
            "seed": (int, self.seed if isinstance(self.seed, list | tuple) else [self.seed]),
            "steps": (int, [] if self.steps is None else [self.steps]),
            "size": (int, self.size or ()),
            "latents": (np.ndarray, [] if self.latents is None else [self.latents]),
        }
        for field, (kind, values) in given.items():
            wrong = [value for value in values if not isinstance(value, kind)]
            if wrong:
                raise RequestError(f"{field} must be made of {kind.__name__}, got {type(wrong[0]).__name__}")

    def encode(self) -> bytes:
        """The request for another process."""
        return msgspec.msgpack.encode(self, enc_hook=_encode_array)


def decode_request(data: bytes) -> Request:
    """The request that `encode` made `data` of."""
    return msgspec.msgpack.decode(data, type=Request, dec_hook=_decode_array)


def _encode_array(array: np.ndarray) -> dict[str, Any]:
    return {"shape": array.shape, "data": array.astype(np.float32).tobytes()}


def _decode_array(_: type, plain: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(plain["data"], np.float32).reshape(plain["shape"])
