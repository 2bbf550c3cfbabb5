"""Checks of the numbers that the Python API and the command line take; each returns Python's own type, or a RequestError."""

from __future__ import annotations

import operator
import os
import re
from numbers import Real
from typing import Any

from fluxrt.errors import RequestError
from fluxrt.memory import MODES, Memory
from fluxrt.texts import TEXT_CACHE

LARGEST_SEED = 2**64 - 1
MOST_STEPS = 100_000
MOST_GUIDANCE = 1000.0
MOST_THREADS = 1024
MOST_GPUS = 1024
MOST_AT_ONCE = 1024

_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_SIZE = re.compile(r"([0-9]{1,9})[xX]([0-9]{1,9})")


def check_seed(given: Any) -> int:
    """A seed of the starting noise, from 0 to 2^64 - 1."""
    seed = whole("seed", given)
    if not 0 <= seed <= LARGEST_SEED:
        raise RequestError(f"seeds must be from 0 to 2^64 - 1, got {shown(seed)}")
    return seed


def check_steps(given: Any) -> int:
    """A number of denoising steps."""
    return _in_range("steps", given, MOST_STEPS)


def check_threads(given: Any) -> int:
    """A number of CPU threads."""
    return _in_range("threads", given, MOST_THREADS)


def check_gpus(given: Any) -> int:
    """A number of GPUs, or of ranks on a CPU."""
    return _in_range("gpus", given, MOST_GPUS)


def check_batch(given: Any) -> int:
    """A number of images to make at once."""
    return _in_range("batch", given, MOST_AT_ONCE)


def check_guidance(given: Any) -> float:
    """A guidance scale; more than MOST_GUIDANCE leaves no image, whatever the model."""
    guidance = real("guidance", given)
    if not 0 <= guidance <= MOST_GUIDANCE:
        raise RequestError(f"guidance must be a number of at least 0 and at most {MOST_GUIDANCE:g}, got {guidance}")
    return guidance


def check_threshold(given: Any) -> float:
    """A threshold of the step cache's rule."""
    threshold = real("threshold", given)
    if not threshold >= 0:
        raise RequestError(f"threshold must be at least 0, got {threshold}")
    return threshold


def check_size(given: Any) -> tuple[int, int]:
    """(height, width) in pixels."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise RequestError(f"size must be (height, width) in pixels, got {shown(given)}")
    height, width = (whole("size", side) for side in given)
    return height, width


def check_memory(given: Any) -> Memory:
    """How a model is held in memory."""
    for mode in MODES:
        if isinstance(given, str) and given == mode:
            return mode
    raise RequestError(f"memory must be one of {', '.join(MODES)}, got {shown(given)}")


def check_text_cache(given: Any) -> int:
    """Bytes of encoded prompts to keep; None is the default."""
    if given is None:
        return TEXT_CACHE
    nbytes = whole("text_cache", given)
    if nbytes < 0:
        raise RequestError(f"text_cache must be a number of bytes, at least 0, got {shown(nbytes)}")
    return nbytes


def check_name(field: str, given: Any) -> str:
    """The name of a target."""
    if not isinstance(given, str):
        raise RequestError(f"{field} must be the name of a target, got {shown(given)}")
    return str(given)


def check_path(given: Any) -> str:
    """The path of a bundle."""
    try:
        path = os.fspath(given)
    except TypeError:
        raise RequestError(f"the bundle must be given as a path, got {shown(given)}") from None
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise RequestError(f"the bundle must be given as a path, got {shown(text)}")
    return text


def whole(field: str, given: Any) -> int:
    """A whole number of Python's or numpy's; no bool, and nothing that would have to be rounded."""
    is_bool = isinstance(given, bool) or type(given).__name__ in ("bool", "bool_")
    try:
        if not is_bool:
            return operator.index(given)
    except TypeError:
        pass
    told = shown(given) if is_bool or isinstance(given, float) else type(given).__name__
    raise RequestError(f"{field} must be a whole number, got {told}")


def real(field: str, given: Any) -> float:
    """A number of Python's or numpy's as a float; no bool."""
    if isinstance(given, bool) or not isinstance(given, Real):
        raise RequestError(f"{field} must be a number, got {type(given).__name__}")
    try:
        return float(given)
    except OverflowError:
        raise RequestError(f"{field} must be a number that fits a float, got {shown(given)}") from None


def read_whole(field: str, text: str) -> int:
    """The whole number that `text` is; RequestError for anything else."""
    if not _WHOLE.fullmatch(text):
        raise RequestError(f"{field} must be a whole number, got {shown(text)}")
    return int(text)


def read_real(field: str, text: str) -> float:
    """The number that `text` is; RequestError for anything else."""
    try:
        if text.isascii() and "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise RequestError(f"{field} must be a number, got {shown(text)}")


def read_size(text: str) -> tuple[int, int]:
    """(height, width) of `text`, HEIGHTxWIDTH; RequestError for anything else."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise RequestError(f"{shown(text)} is not HEIGHTxWIDTH in pixels, for example 1024x768")
    return int(found[1]), int(found[2])


def shown(given: Any, limit: int = 60) -> str:
    """`given` as a message can hold it: escaped, and not longer than `limit` characters."""
    try:
        text = ascii(given)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _in_range(field: str, given: Any, most: int) -> int:
    number = whole(field, given)
    if not 1 <= number <= most:
        raise RequestError(f"{field} must be at least 1 and at most {most}, got {shown(number)}")
    return number
