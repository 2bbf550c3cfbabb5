"""Hints on what to install: made for this environment, and written nowhere else."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fluxrt import install as module
from fluxrt.install import (
    Source,
    extra_requirements,
    install,
    install_extra,
    install_instead,
    install_named,
    source_of,
    update,
)

REPOSITORY = Path(__file__).parents[1]
PROJECTS = {"fluxc": REPOSITORY, "fluxrt": REPOSITORY / "runtime"}
# An interpreter in a folder whose name a shell takes apart.
PYTHON = "/opt/my envs/bin/python"
HARD_CODED = re.compile(r"pip3? (?:un)?install\b(?!ed)|\buv (?:pip|sync|add)\b|(?:fluxc|fluxrt)\[[a-z]")


def project(name: str) -> dict[str, Any]:
    return dict(tomllib.loads((PROJECTS[name] / "pyproject.toml").read_text())["project"])


def with_installers(monkeypatch: pytest.MonkeyPatch, *, pip: bool, uv: bool) -> None:
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda n: (find(n) if pip else None) if n == "pip" else find(n)
    )
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/bin/{name}" if uv else None)
    monkeypatch.setattr(sys, "executable", PYTHON)


def test_no_hint_is_written_by_hand() -> None:
    files = [*(REPOSITORY / "fluxc").rglob("*"), *(REPOSITORY / "runtime/fluxrt").rglob("*")]
    texts = {file: file.read_text() for file in files if file.suffix in (".py", ".j2") and file.name != "install.py"}
    assert len(texts) > 200
    found = {str(file.relative_to(REPOSITORY)): HARD_CODED.findall(text) for file, text in texts.items()}
    assert {file: hints for file, hints in found.items() if hints} == {}, "use fluxrt.install"


@pytest.mark.parametrize(
    ("pip", "uv", "start"),
    [
        (True, False, "'/opt/my envs/bin/python' -m pip install"),
        (True, True, "'/opt/my envs/bin/python' -m pip install"),
        (False, True, "uv pip install --python '/opt/my envs/bin/python'"),
        (False, False, "'/opt/my envs/bin/python' -m ensurepip && '/opt/my envs/bin/python' -m pip install"),
    ],
)
def test_a_command_names_the_interpreter_and_the_installer_it_has(
    pip: bool, uv: bool, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_installers(monkeypatch, pip=pip, uv=uv)
    assert install("torch", "numpy>=2") == f"{start} torch 'numpy>=2'"


def test_what_cannot_stay_is_removed_without_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    with_installers(monkeypatch, pip=True, uv=False)
    removed, _, installed = install_instead(("onnxruntime", "onnxruntime-gpu"), "onnxruntime-gpu[cuda]").partition(
        " && "
    )
    assert shlex.split(removed)[1:] == ["-m", "pip", "uninstall", "-y", "onnxruntime", "onnxruntime-gpu"]
    assert shlex.split(installed)[1:] == ["-m", "pip", "install", "onnxruntime-gpu[cuda]"]


@pytest.mark.parametrize("name", PROJECTS)
@pytest.mark.parametrize("from_checkout", [True, False])
def test_an_extra_is_what_pyproject_says(name: str, from_checkout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the checkout, and from what an installer wrote."""
    wanted = project(name)
    if not from_checkout:
        lines = [*wanted["dependencies"]]
        lines += [
            f'{line}; extra == "{extra}"' for extra, each in wanted["optional-dependencies"].items() for line in each
        ]
        monkeypatch.setattr(module, "_checkout", lambda distribution: None)
        monkeypatch.setattr("importlib.metadata.requires", lambda distribution: lines)
    monkeypatch.setattr(module, "_project", module._project.__wrapped__)
    for extra, requirements in wanted["optional-dependencies"].items():
        assert list(extra_requirements(name, extra)) == requirements
        assert install_extra(name, extra) == install(*requirements)
    assert install_named(name, ["safetensors" if name == "fluxc" else "Pillow"]).endswith(
        ("'safetensors>=0.8'", "'pillow>=10'")
    )
    with pytest.raises(KeyError):
        extra_requirements(name, "no-such-extra")


def with_source(monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any] | None) -> None:
    class Installed:
        @staticmethod
        def read_text(name: str) -> str | None:
            assert name == "direct_url.json"
            return None if entry is None else json.dumps(entry)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed)


@pytest.mark.parametrize(
    ("entry", "source", "clause"),
    [
        (
            {"url": "file:///src/my%20clone/runtime", "dir_info": {}},
            Source("folder", "/src/my clone/runtime"),
            f"bring the checkout /src/my clone/runtime up to date (git pull) and run `'{PYTHON}' -m pip install '/src/my clone",
        ),
        (
            {"url": "file:///tmp/fluxrt-0.1.0-py3-none-any.whl", "archive_info": {}},
            Source("wheel", "/tmp/fluxrt-0.1.0-py3-none-any.whl"),
            f"install a newer fluxrt from fluxc's repository: `'{PYTHON}' -m pip install PATH_OF_THE_CLONE/runtime`",
        ),
        (None, Source("index", None), "install a newer fluxrt from fluxc's repository"),
    ],
)
def test_how_to_update_depends_on_where_it_came_from(
    entry: dict[str, Any] | None, source: Source, clause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_installers(monkeypatch, pip=True, uv=False)
    with_source(monkeypatch, entry)
    monkeypatch.setattr(module, "_checkout", lambda distribution: None)
    assert source_of("fluxrt") == source
    assert update("fluxrt").startswith(clause)


def test_what_lies_in_a_checkout_is_updated_there() -> None:
    """Whatever the environment has installed, the files that run are those of this repository."""
    assert source_of("fluxrt") == Source("checkout", str(REPOSITORY / "runtime"))
    assert source_of("fluxc") == Source("checkout", str(REPOSITORY))
    assert update("fluxrt") == f"bring the checkout {REPOSITORY / 'runtime'} up to date (git pull)"


def test_the_tool_that_a_hint_names_takes_it(tmp_path: Path) -> None:
    """pip reads the requirements of every extra as we write them; nothing is resolved."""
    lines = [line for name in PROJECTS for each in project(name)["optional-dependencies"].values() for line in each]
    code = (
        "import sys; from pip._vendor.packaging.requirements import Requirement; [Requirement(a) for a in sys.argv[1:]]"
    )
    subprocess.run(shlex.split(shlex.join([sys.executable, "-c", code, *lines])), check=True)
