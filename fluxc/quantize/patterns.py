"""Matching layer names: a glob over the whole name, or a regular expression after `re:`."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable

from fluxc.base.errors import RecipeError, nearest


def matching(pattern: str, names: Iterable[str], field: str) -> list[str]:
    """The `names` that `pattern` matches as a whole, in order.

    Raises RecipeError naming `field` when it matches nothing (with near matches) or is not a valid expression.
    """
    names = list(names)
    found = matched(pattern, names, field)
    if not found:
        raise RecipeError(
            f"{field}: the pattern {pattern!r} matches no layer{_suggest(pattern, names) or '.'} "
            "Patterns match a layer's whole name; without this one, `fluxc plan` lists the names"
        )
    return found


def matched(pattern: str, names: Iterable[str], field: str) -> list[str]:
    """As `matching`, but a pattern that matches nothing gives an empty list."""
    if not pattern.startswith("re:"):
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    try:
        with warnings.catch_warnings():
            # Python warns of what it will read otherwise one day, such as [[a].
            warnings.simplefilter("error")
            expression = re.compile(pattern[3:])
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise RecipeError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
    return [name for name in names if expression.fullmatch(name)]


def _suggest(pattern: str, names: list[str]) -> str:
    """Near matches among whole names, their last parts, names with block numbers starred, or else the words of names."""
    bare = pattern.removeprefix("re:").strip("*").rstrip(".")
    starred = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    inside = [name for name in starred if bare and bare in name]
    if inside:
        return f"; did you mean {', '.join(repr(n) for n in inside[:3])}?"
    candidates = {name.split("*.", 1)[-1]: f"*{name.split('*.', 1)[-1]}" if "*." in name else name for name in starred}
    word = bare.replace("*.", "")
    if not nearest(word, candidates):
        candidates = {part: f"*{part}*" for name in starred for part in re.split(r"[._]", name) if part.isalpha()}
    clause = nearest(word, candidates)
    for short, full in candidates.items():
        clause = clause.replace(repr(short), repr(full))
    return clause
