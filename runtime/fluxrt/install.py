"""How to install what is missing here: commands that work where the reader stands.

fluxc and fluxrt are on no package index, so `pip install 'fluxrt[cuda]'` finds nothing. A command names the packages of the
extra instead, which are on the index, and the interpreter that runs, so that it works outside of an activated environment too.
It leaves fluxc and fluxrt themselves as they are, however they were installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Source:
    """Where a distribution was installed from.

    `kind`: "checkout", a folder whose files are used where they lie (installed editable, or just on the path); "folder", one
    that was copied; "wheel", a wheel or an sdist; "index", whatever pip found by name. `place` is the folder, the file or its
    URL; None of an index.
    """

    kind: Literal["checkout", "folder", "wheel", "index"]
    place: str | None


def install(*requirements: str) -> str:
    """The command that installs `requirements`, written as pip reads them, into the environment that runs."""
    return f"{_installer('install')} {shlex.join(requirements)}"


def install_extra(distribution: str, extra: str) -> str:
    """The command that installs the packages of `distribution`'s `extra`. KeyError for an extra that it does not have."""
    return install(*extra_requirements(distribution, extra))


def install_named(distribution: str, names: Iterable[str]) -> str:
    """The command that installs the packages `names` in the versions that `distribution` requires. KeyError for others."""
    required = {_normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]): line for line in _project(distribution)[0]}
    return install(*(required[_normal(name)] for name in names))


def install_instead(removed: Iterable[str], *requirements: str) -> str:
    """The command that removes the packages `removed`, which cannot stay beside `requirements`, and installs those."""
    return f"{_installer('uninstall')} {shlex.join(removed)} && {install(*requirements)}"


def install_elsewhere(*requirements: str, instead: Iterable[str] = ()) -> str:
    """The command that installs `requirements` on a machine that is not this one, `instead` of packages that cannot stay."""
    removed = f"python -m pip uninstall -y {shlex.join(instead)} && " if instead else ""
    return f"{removed}python -m pip install {shlex.join(requirements)}"


def update(distribution: str) -> str:
    """What to do for a newer `distribution`, as a clause that starts with a verb; it depends on where it was installed from."""
    source = source_of(distribution)
    if source.place and source.kind == "checkout":
        return f"bring the checkout {source.place} up to date (git pull)"
    if source.place and source.kind == "folder":
        return f"bring the checkout {source.place} up to date (git pull) and run `{install(source.place)}`"
    return f"install a newer {distribution} from fluxc's repository: `{install('PATH_OF_THE_CLONE' + _folder(distribution))}`"


def extra_requirements(distribution: str, extra: str) -> tuple[str, ...]:
    """The requirements of an extra, as `distribution` states them. KeyError for an extra that it does not have."""
    return tuple(_project(distribution)[1][extra])


def source_of(distribution: str) -> Source:
    """Where `distribution` is from: where its files lie, else what its installer wrote down (direct_url.json)."""
    from importlib import metadata

    root = _checkout(distribution)
    if root:
        return Source("checkout", str(root))
    text = None
    with contextlib.suppress(metadata.PackageNotFoundError):
        text = metadata.distribution(distribution).read_text("direct_url.json")
    if text is None:
        return Source("index", None)
    entry = json.loads(text)
    url = urlsplit(entry["url"])
    place = unquote(url.path) if url.scheme == "file" else entry["url"]
    return Source("folder" if "dir_info" in entry else "wheel", place)


def _installer(action: Literal["install", "uninstall"]) -> str:
    """The start of a command of pip, or of uv where the environment has no pip."""
    python = shlex.quote(sys.executable or "python3")
    if importlib.util.find_spec("pip") is None:
        if shutil.which("uv"):
            return f"uv pip {action} --python {python}"
        # A venv made with --without-pip, and no uv: Python brings pip itself.
        return f"{python} -m ensurepip && {python} -m pip {action}" + (" -y" if action == "uninstall" else "")
    return f"{python} -m pip {action}" + (" -y" if action == "uninstall" else "")


@functools.cache
def _project(distribution: str) -> tuple[list[str], dict[str, list[str]]]:
    """What `distribution` requires, and by extra what that adds: from the checkout, else from what the installer wrote."""
    from importlib import metadata

    root = _checkout(distribution)
    if root:
        project = _read_project(root)
        return project["dependencies"], project["optional-dependencies"]
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in metadata.requires(distribution) or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        (extras.setdefault(extra[1], []) if extra else required).append(requirement.strip())
    return required, extras


def _checkout(distribution: str) -> Path | None:
    """The folder whose pyproject.toml describes the `distribution` that is imported, None where it was copied elsewhere."""
    found = importlib.util.find_spec(distribution)
    root = Path(found.origin).parents[1] if found and found.origin else None
    return (
        root if root and (root / "pyproject.toml").is_file() and _read_project(root)["name"] == distribution else None
    )


def _read_project(root: Path) -> dict[str, Any]:
    import tomllib

    return dict(tomllib.loads((root / "pyproject.toml").read_text())["project"])


def _folder(distribution: str) -> str:
    """Where in fluxc's repository `distribution` lies."""
    return "/runtime" if distribution == "fluxrt" else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
