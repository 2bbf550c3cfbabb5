"""The documents: links lead somewhere, lines fit, quoted messages are the code's, every page can be found."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in REPOSITORY.rglob("*.md")
    if (
        not any(part.startswith(".") for part in path.relative_to(REPOSITORY).parts)
        and path.relative_to(REPOSITORY).parts[0] not in ("artifacts", "shared", "build")
    )
    or path == REPOSITORY / "artifacts/README.md"
)
WIDTH = 120
NOT_OURS = ("No matching distribution found", "fluxc: command not found", "fluxc needs Python 3.11")
"""Messages that pip, the shell and make give."""


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """The lines outside of code blocks, numbered."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = [line.lstrip("#").strip() for _, line in prose(page) if re.match(r"#+ ", line)]
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for number, line in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            place = (page.parent / file).resolve() if file else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                lost.append(f"line {number}: {target}")
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_wrap(page: Path) -> None:
    """At most WIDTH characters, tables and code excepted."""
    assert [number for number, line in prose(page) if len(line) > WIDTH and not line.lstrip().startswith("|")] == []


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#\s]+\.md)", (REPOSITORY / "README.md").read_text()))
    linked |= {
        f"docs/{page}" for page in re.findall(r"\]\(([^)#/\s]+\.md)", (REPOSITORY / "docs/development.md").read_text())
    }
    assert {name(page) for page in PAGES if page.parent.name == "docs"} <= linked


def messages() -> Iterator[str]:
    """Every string of the packages, with … in place of what is filled in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return text(node.left) + text(node.right) if isinstance(node, ast.BinOp) else ""

    for root in (REPOSITORY / "fluxc", REPOSITORY / "runtime/fluxrt"):
        for file in root.rglob("*.py"):
            yield from filter(None, (text(node) for node in ast.walk(ast.parse(file.read_text()))))


def test_every_benchmark_is_listed() -> None:
    """But for those that are only parts of others, which are not run by themselves."""
    folder = REPOSITORY / "benchmarks"
    scripts = [path.name for path in folder.glob("*.py") if f"python benchmarks/{path.name}" in path.read_text("utf-8")]
    assert len(scripts) > 20
    assert [script for script in scripts if f"`{script}`" not in (folder / "README.md").read_text("utf-8")] == []


def test_quoted_messages_are_what_the_code_says() -> None:
    page = REPOSITORY / "docs/troubleshooting.md"
    headings = [line[4:] for line in page.read_text().splitlines() if line.startswith("### ")]
    quoted = [heading for heading in headings if not any(known in heading for known in NOT_OURS)]
    assert len(quoted) > 40
    known = list(messages())
    missing = []
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        if not any(pattern.search(candidate) for candidate in known):
            missing.append(message)
    assert missing == []
