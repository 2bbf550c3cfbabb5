"""What the two distributions say of themselves; `.ci/packages` builds and installs them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import fluxc
import fluxrt

REPOSITORY = Path(__file__).parents[1]
ROOTS = {"fluxc": REPOSITORY, "fluxrt": REPOSITORY / "runtime"}


def described(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOTS[name] / "pyproject.toml").read_text())


def test_versions_agree() -> None:
    assert described("fluxc")["project"]["version"] == fluxc.__version__
    assert described("fluxrt")["project"]["version"] == fluxrt.__version__
    assert f"fluxrt=={fluxrt.__version__}" in described("fluxc")["project"]["dependencies"]


@pytest.mark.parametrize("file", ["LICENSE", "NOTICE"])
def test_both_carry_the_same_licence(file: str) -> None:
    assert (REPOSITORY / "runtime" / file).read_bytes() == (REPOSITORY / file).read_bytes()
    for name in ROOTS:
        project = described(name)["project"]
        assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE", "NOTICE"])


@pytest.mark.parametrize("name", ROOTS)
def test_data_files_are_packaged(name: str) -> None:
    """Every file of a package that is no module matches a pattern of its package data."""
    package = ROOTS[name] / name
    patterns = described(name)["tool"]["setuptools"]["package-data"][name]
    packaged = {file for pattern in patterns for file in package.glob(pattern)}
    data = {
        file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    }
    assert {str(file.relative_to(package)) for file in data - packaged} == set()
