"""fluxc's errors: the runtime's family (what, where, what to do; an exit code) with the compiler's own kinds."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fluxrt.errors import FluxError

__all__ = ["BuildError", "CheckpointError", "FluxError", "GateError", "RecipeError", "nearest"]


class RecipeError(FluxError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class CheckpointError(FluxError):
    """The checkpoint is missing, damaged, or not the model it says it is."""


class BuildError(FluxError):
    """A stage could not do its work."""


class GateError(FluxError):
    """The build finished, but the result is worse than the recipe's gates, or any, allow."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A clause naming the entries of `known` most like `word`, or the empty string: '; did you mean a, b?'."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
