"""docs/cli.md says what the command lines are, and a shell completes them."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from conftest import ROOT
from fluxc.cli.main import main
from fluxc.cli.reference import TOOLS, written_anew
from fluxrt.commands import Verb

PAGE = ROOT / "docs" / "cli.md"
VERBS = [(tool, name) for tool, group in TOOLS.items() for name in group.commands]


def test_the_page_has_the_verbs_and_exit_codes_that_there_are() -> None:
    page = PAGE.read_text()
    assert written_anew(page) == page, "run `python -m fluxc.cli.reference docs/cli.md`"


def test_the_list_of_verbs_is_not_cut() -> None:
    listed = CliRunner().invoke(main, ["--help"]).stdout
    assert "..." not in listed.partition("Commands:")[2]
    assert all(f"\n  {name} " in listed for name in main.commands)


@pytest.mark.parametrize(("tool", "name"), VERBS)
def test_help_says_what_arguments_are_and_gives_an_example(tool: str, name: str) -> None:
    verb = TOOLS[tool].commands[name]
    assert isinstance(verb, Verb)
    arguments = [p.make_metavar(click.Context(verb)).strip("[].") for p in verb.params if isinstance(p, click.Argument)]
    assert sorted(verb.arguments) == sorted(arguments)
    assert verb.example.startswith(f"{tool} {name} ")
    told = CliRunner().invoke(TOOLS[tool], [name, "--help"]).stdout
    assert "Example:" in told
    for option in verb.params:
        if isinstance(option, click.Option):
            assert option.help
            assert not option.multiple or "may be repeated" in option.help, (
                f"{option.name}: say that it may be repeated"
            )


@pytest.mark.parametrize(("tool", "name"), VERBS)
def test_the_example_of_a_verb_is_a_command_line(tool: str, name: str) -> None:
    """It is read, not run."""
    import shlex

    verb = TOOLS[tool].commands[name]
    assert isinstance(verb, Verb)
    for line in verb.example.splitlines():
        _, _, *rest = shlex.split(line.partition(" > ")[0])
        with click.Context(TOOLS[tool], obj=None) as parent:
            parsed = verb.make_context(name, rest, parent=parent, resilient_parsing=True).params
        assert parsed or not verb.params


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str) -> None:
    for tool in TOOLS:
        told = subprocess.run(
            [sys.executable, "-m", tool],
            env={f"_{tool.upper()}_COMPLETE": f"{shell}_source", "PATH": "/usr/bin:/bin", "PYTHONPATH": _python_path()},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (told.returncode, told.stderr) == (0, "")
        assert f"_{tool.upper()}_COMPLETE={shell}_complete" in told.stdout


def test_verbs_and_values_are_completed() -> None:
    from click.shell_completion import ShellComplete

    complete = ShellComplete(main, {}, "fluxc", "_FLUXC_COMPLETE")
    assert [item.value for item in complete.get_completions([], "me")] == ["merge-traces"]
    assert [item.value for item in complete.get_completions(["build", "--until"], "w")] == ["weights"]
    assert "--threads" in [item.value for item in complete.get_completions(["verify"], "--t")]


def _python_path() -> str:
    return ":".join(str(ROOT / folder) for folder in (".", "runtime"))
