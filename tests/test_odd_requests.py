"""Whatever is typed: an exit code that docs/cli.md lists, one paragraph on stderr, no traceback, and nothing written.

CASES has every option and argument of every verb; one that is added without a case here fails a test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import RECIPE
from fluxc.cli.main import main
from fluxrt.commands import EXIT_CODES


@dataclass(frozen=True)
class Bad:
    """A value that is refused with one of `codes`, for an option or argument; `words` stand in what is said."""

    value: str
    codes: tuple[int, ...] = (2,)
    words: str = ""


FAILED, WRONG, EITHER = (1,), (2,), (1, 2)
NO_NAMES = [Bad("", WRONG, "is not a path"), Bad("nul\0byte", WRONG, "is not a path")]
LONG = "x" * 5000
INPUTS = [
    *NO_NAMES,
    *(Bad(value, EITHER) for value in ("none", "folder", "a\nb", "\udcff", LONG, "binary", "text/x", "/proc/x")),
]
"""Names of what is to be read: none of them is a recipe, a bundle, or what a command wrote."""
OUTPUTS = [
    *NO_NAMES,
    Bad("/proc/x", FAILED),
    *(Bad(value, WRONG) for value in (".", "..", "/", "/dev/null", "text/x", "text", "link", LONG, "folder")),
]
"""Names where nothing can be written, or where something else lies."""
CHOICES = [Bad(""), Bad("nothing"), Bad("ALL\n"), Bad("\udcff")]
WHOLE = [Bad(value) for value in ("0", "-3", "1.5", "two", "", "nan", "9" * 5000, "1e3", "0x2")]
NUMBERS = [Bad(value) for value in ("0", "-3", "two", "", "nan", "inf", "-inf", "1e400", "0x2", "\udcff")]
TARGETS = [Bad("", WRONG), Bad("nothing", WRONG, "nothing"), Bad("a\nb", WRONG), Bad("\udcff", WRONG)]
SETS = [
    *(
        Bad(value, WRONG)
        for value in ("", "=", "a", "=1", "name", "nothing.at.all=1", "sampling.steps=", "sampling.steps=x")
    ),
    *(
        Bad(value, WRONG)
        for value in ("sampling.steps=-1", "sampling.steps=1e9", "sampling.steps=.inf", "targets=1", "name=[")
    ),
    *(
        Bad(value, WRONG)
        for value in ("name=a/b", "name=..", "name=\0", "name=\udcff", "name=a\nb", "targets=[]", "gates=!!x")
    ),
    *(
        Bad(value, WRONG)
        for value in ("text.length=4", "text.length=-1", "sampling.size=[0, 0]", "sampling.sizes=[[7, 9]]")
    ),
    *(
        Bad(value, WRONG)
        for value in ("precision.transformer.exclude=[none]", "precision={}}", "a.b.c.d=&x [*x]", "x=" + LONG)
    ),
    Bad("precision.transformer.exclude=[x_embeder]", WRONG, "x_embedder"),
    Bad("fidelity.prompts=none.txt", WRONG, "none.txt"),
    Bad("model.source=/none", EITHER, "/none"),
]
TOO_MANY_THREADS = "more threads than cores only wait"
FLAG = [Bad("=1", WRONG)]
MEMORY = [
    *(
        Bad(value, WRONG)
        for value in ("", "0GiB", "-1GiB", "12", "12G", "GiB", "1e3GB", "12 12GB", "9" * 5000, "\udcff")
    ),
    Bad("8", WRONG, "has no unit; write a number and a unit"),
    Bad("8G", WRONG, "the units are KB, MB, GB, TB and KiB, MiB, GiB, TiB"),
    Bad("1MiB", FAILED, "and --memory gives 1 MiB; use "),
]
LOGS = {
    "quiet": FLAG,
    "verbose": FLAG,
    "log_file": [*(Bad(value, EITHER) for value in ("", "nul\0byte", ".", "/proc/x", "text/x", LONG, "folder"))],
    "log_format": CHOICES,
}
RECIPES = {"recipe": INPUTS, "changes": SETS}
CASES: dict[str, dict[str, list[Bad]]] = {
    "build": {**RECIPES, "out": OUTPUTS, "until": CHOICES, "memory": MEMORY, "threads": WHOLE, **LOGS},
    "calibrate": {**RECIPES, "out": OUTPUTS, "device": CHOICES, "memory": MEMORY, "threads": WHOLE, **LOGS},
    "trace": {
        **RECIPES,
        "out": OUTPUTS,
        "device": CHOICES,
        "part": [Bad(value) for value in ("", "2/1", "0/1", "-1/2", "1", "a/b", "1/2/3", "99999999999/99999999999")],
        "memory": MEMORY,
        "threads": WHOLE,
        **LOGS,
    },
    "tune": {
        **RECIPES,
        "on": CHOICES,
        "gpus": WHOLE,
        **dict.fromkeys(("milliseconds", "gpu_memory", "error"), NUMBERS),
        "least": CHOICES,
        "steps": FLAG,
        "skips": FLAG,
        "formats": [Bad(value, WRONG) for value in ("", ",", "nothing", "nvfp4,", "bf16", "a\nb", "\udcff")],
        "out": [
            *NO_NAMES,
            *(Bad(value, EITHER) for value in (".", "..", "/", "/proc/x", "text/x", "text", "link", LONG, "folder")),
        ],
        "memory": MEMORY,
        "threads": WHOLE,
        "as_json": FLAG,
        **LOGS,
    },
    "init": {
        "model": [
            *(
                Bad(value, WRONG)
                for value in ("", "nul\0byte", "a\nb", "\udcff", LONG, "none", "folder", "text", ".", "deva")
            ),
            *(Bad(value, WRONG) for value in ("/proc/x", "./none", "none.yaml", "~nobody-here/x")),
        ],
        "on": CHOICES,
        "gpus": WHOLE,
        "out": [
            *NO_NAMES,
            *(Bad(value, EITHER) for value in (".", "..", "/", "/proc/x", "text/x", "text", "link", LONG, "folder")),
        ],
    },
    "schema": {},
    "merge-traces": {"traces": INPUTS, "out": OUTPUTS},
    "plan": {**RECIPES, "layers": FLAG, "presets": FLAG, "out": NO_NAMES, "memory": MEMORY[:-1], "as_json": FLAG},
    "predict": {
        "recipe": INPUTS,
        "changes": [Bad("sampling.steps=3", WRONG, "--set goes with a RECIPE")],
        "on": CHOICES,
        "gpus": [*(Bad(value) for value in ("", "0", "-1", "1,,2", "1,x", "1.5", ",", "9" * 5000)), Bad("3", EITHER)],
        "batch": [Bad(value) for value in ("", "0", "-1", "1,,2", "1,x", "1.5", ",", "9" * 5000)],
        "model": CHOICES,
        "size": [
            Bad(value) for value in ("", "0x0", "64", "64x", "x64", "-64x64", "64x64x64", "7x9", "1e3x64", "9" * 5000)
        ],
        "as_json": FLAG,
    },
    "inspect": {"bundle": INPUTS, "as_json": FLAG},
    "verify": {"bundle": INPUTS, "target": TARGETS, "as_json": FLAG, "threads": WHOLE, **LOGS},
    "finish": {"bundle": INPUTS, "target": TARGETS, "threads": WHOLE, **LOGS},
    "export-onnx": {"bundle": INPUTS, "consumer": CHOICES, "target": TARGETS, "out": OUTPUTS, **LOGS},
    "report": {"bundles": INPUTS, "out": OUTPUTS, "as_json": FLAG},
    "doctor": {"bundle": INPUTS, "as_json": FLAG},
    "gpu-check": {
        "bundle": INPUTS,
        "out": [
            *NO_NAMES,
            *(Bad(value, EITHER) for value in ("text", "/proc/x.json", "text/x.json", ".json", LONG + ".json")),
        ],
        "dry_run": FLAG,
        "again": [],
        "threads": WHOLE,
        **LOGS,
    },
    "add-evidence": {"bundle": INPUTS, "file": INPUTS},
}
"""By verb, by parameter. A new verb or option gets its entry here."""


def verbs() -> dict[str, click.Command]:
    return main.commands


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with odd things in it, the current one."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "folder").mkdir()
    (folder / "folder" / "note").write_text("mine")
    (folder / "text").write_text("mine")
    (folder / "binary").write_bytes(bytes(range(256)) * 4)
    (folder / "link").symlink_to(folder / "nowhere")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def good(verb: str, parameter: click.Parameter, bundle: Path) -> list[str]:
    """A value that is not refused, where one must be given."""
    values = {
        "recipe": str(RECIPE.with_name("flux2-nano-50-steps.yaml") if verb == "trace" else RECIPE),
        "bundle": str(bundle),
        "bundles": str(bundle),
        "model": "none" if str(bundle) == "none" else "klein-4b",
        "traces": "text",
        "file": "text",
        "on": "rtx-5090",
        "out": "new.json" if verb == "gpu-check" else "new",
    }
    if verb == "predict" and parameter.name == "recipe":
        return []
    if verb == "tune" and parameter.name == "error":
        return ["--error", "0.1"]
    if isinstance(parameter, click.Argument):
        return [values[str(parameter.name)]]
    return [parameter.opts[0], values[str(parameter.name)]] if parameter.required else []


def command_line(verb: str, bad: click.Parameter, value: str, bundle: Path) -> list[str]:
    """The verb with `value` for the parameter `bad`, and good values where there must be some."""
    options: list[str] = []
    arguments: list[str] = []
    for parameter in verbs()[verb].params:
        if isinstance(parameter, click.Argument):
            arguments += [value] if parameter is bad else good(verb, parameter, bundle)
        elif parameter is not bad:
            options += good(verb, parameter, bundle)
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            options.append(max(parameter.opts, key=len) + value)
        else:
            options += [max(parameter.opts, key=len), value]
    return [verb, *options, "--", *arguments]


def contents(folder: Path) -> dict[str, Any]:
    """Every path below `folder`, with what a file holds."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def check(result: Result, codes: tuple[int, ...], words: str, arguments: list[str]) -> None:
    """One paragraph on stderr, for a person, and nothing on stdout."""
    told = f"{[argument[:60] for argument in arguments]}: {result.exit_code} {result.stderr[:2000]}"
    assert "Traceback" not in result.output, told
    assert "unexpected error" not in result.stderr, told
    assert result.exit_code in codes, told
    assert words in result.stderr, told
    assert result.stderr.startswith("fluxc: "), told
    paragraph, *items = [line for line in result.stderr.splitlines() if not line.endswith(TOO_MANY_THREADS)]
    assert not items or paragraph.endswith(" things are wrong:"), told
    assert all(item.startswith("  ") for item in items), told
    assert result.stderr.replace("\n", "").isprintable(), told
    assert result.stdout == "", told


def test_every_parameter_of_every_verb_has_a_case() -> None:
    found = {name: {str(parameter.name) for parameter in verb.params} for name, verb in verbs().items()}
    assert found == {name: set(cases) for name, cases in CASES.items()}


@pytest.mark.parametrize("verb", CASES)
def test_a_bad_value_is_refused_in_a_paragraph_and_nothing_is_written(
    verb: str, place: Path, quick_bundle: Path
) -> None:
    runner = CliRunner()
    before, of_bundle = contents(place), sorted(quick_bundle.parent.rglob("*"))
    for parameter in verbs()[verb].params:
        for bad in CASES[verb][str(parameter.name)]:
            arguments = command_line(verb, parameter, bad.value, quick_bundle)
            check(runner.invoke(main, arguments), bad.codes, bad.words, arguments)
            assert contents(place) == before, arguments
    assert sorted(quick_bundle.parent.rglob("*")) == of_bundle


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["--nothing"], ["build"], ["build", "a", "b"], ["build", "--out"], ["\udcff"], ["a\nb"], [""]],
)
def test_a_command_line_that_is_none(arguments: list[str]) -> None:
    check(CliRunner().invoke(main, arguments), WRONG, "--help", arguments)


ODD = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["-1", "1e400", "%s", "{}", "[", "!!python/object:os.system", "--", "-", "~", "~nobody/x", "$HOME", "1/2"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)


@pytest.mark.parametrize("verb", [verb for verb, cases in CASES.items() if cases])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_typed_is_answered(verb: str, place: Path, data: st.DataObject) -> None:
    """Of what could be done, nothing can: there is neither the checkpoint nor the bundle."""
    parameters = [p for p in verbs()[verb].params if not (isinstance(p, click.Option) and p.is_flag)]
    parameters = [p for p in parameters if p.name not in ("log_file", "on")]
    parameter = data.draw(st.sampled_from(parameters))
    value = data.draw(ODD)
    arguments = command_line(verb, parameter, value, Path("none"))
    if any(p.name == "changes" for p in verbs()[verb].params) and verb != "predict":
        arguments[1:1] = ["--set", "model.source=./none"]
    before = contents(place)
    result = CliRunner().invoke(main, arguments)
    if (verb, result.exit_code) in (("predict", 0), ("doctor", 0)):
        return
    check(result, EITHER, "", arguments)
    assert contents(place) == before


def test_exit_codes_are_those_that_the_help_lists() -> None:
    listed = CliRunner().invoke(main, ["--help"]).stdout.partition("Exit codes:")[2]
    assert [int(line.split()[0]) for line in listed.splitlines() if line[:3].strip()] == [
        code for code, _ in EXIT_CODES
    ]
