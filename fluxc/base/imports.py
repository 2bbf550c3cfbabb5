"""Which source code a module can run: its own, and that of every module of fluxc and fluxrt it imports, directly or not.

Read from the code itself, so that a stage's cache key follows what the stage executes: imports inside functions count, those
under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("fluxc", "fluxrt")
TEMPLATES = "*.j2"


@cache
def code_digest(module: str) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the source of `closure(module)`, templates beside it included."""
    digest = hashlib.sha256()
    for name in closure(module):
        file = _file(name)
        assert file is not None
        templates = sorted(file.parent.glob(TEMPLATES)) if ".j2" in file.read_text(encoding="utf-8") else []
        for path in (file, *templates):
            digest.update(f"{name}/{path.name}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def closure(module: str) -> tuple[str, ...]:
    """`module` and all it imports within PACKAGES, packages included, sorted. A module outside them is followed too."""
    found: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        left += _parents(name)
        left += imports_of(name)
    return tuple(sorted(name for name in found if _file(name)))


@cache
def imports_of(module: str) -> tuple[str, ...]:
    """The modules of PACKAGES that the source of `module` imports by name."""
    file = _file(module)
    if file is None:
        return ()
    names = (name for node in _run_time(ast.parse(file.read_bytes())) for name in _imported(node))
    return tuple(dict.fromkeys(name for name in names if name.partition(".")[0] in PACKAGES and _file(name)))


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement but those that only type checkers see; an expression holds no import."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from _run_time(other)
            continue
        yield child
        yield from _run_time(child)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


@cache
def _file(module: str) -> Path | None:
    """The source file of `module`; None if there is none, as for an attribute that is no module."""
    if module.partition(".")[0] in PACKAGES:
        spec = find_spec(module.partition(".")[0])
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin).parents[1].joinpath(*module.split("."))
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
        return None
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
