"""The verbs in docs/cli.md, made of click's commands. `python -m fluxc.cli.reference docs/cli.md` writes them anew.

A line `<!-- verbs: TOOL -->` in the page is followed by the verbs of fluxc or fluxrt, `<!-- exit codes -->` by their table,
each up to `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from inspect import cleandoc
from pathlib import Path

import click

from fluxc.cli.main import main as fluxc
from fluxrt.cli import commands as fluxrt
from fluxrt.commands import EXIT_CODES, Verb

MARKED = re.compile(r"(<!-- (?:verbs: (\w+)|exit codes) -->\n).*?(<!-- end -->)", re.DOTALL)
TOOLS: dict[str, click.Group] = {"fluxc": fluxc, "fluxrt": fluxrt}
SHARED = ("-q", "-v", "--log-file", "--log-format", "--help")
"""Options that the page explains once."""
WIDTH = 120


def written_anew(page: str) -> str:
    """The page with the verbs, and exit codes, that there are now."""

    def made(found: re.Match[str]) -> str:
        body = verbs_of(found[2]) if found[2] else exit_codes()
        return f"{found[1]}\n{body}\n{found[3]}"

    return MARKED.sub(made, page)


def exit_codes() -> str:
    """A row for each exit code."""
    return "| exit code | means |\n|---|---|\n" + "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES)


def verbs_of(tool: str) -> str:
    """A section for each verb of `tool`: what it does, its arguments and options with defaults, an example."""
    return "\n".join(_section(tool, name, verb) for name, verb in sorted(TOOLS[tool].commands.items()))


def _section(tool: str, name: str, verb: click.Command) -> str:
    whole = click.Context(TOOLS[tool], info_name=tool, **TOOLS[tool].context_settings)
    context = click.Context(verb, info_name=name, parent=whole)
    paragraphs = [" ".join(part.split()) for part in cleandoc(verb.help or "").split("\n\n")]
    rows = [(f"`{argument}`", what, "") for argument, what in getattr(verb, "arguments", {}).items()]
    rows += [_row(option, context) for option in verb.params if isinstance(option, click.Option)]
    known = [row for row in rows if row[0]]
    table = "| argument or option | meaning | default |\n|---|---|---|\n"
    table += "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in known)
    table = table if known else ""
    example = verb.example if isinstance(verb, Verb) else ""
    text = "\n\n".join(_wrapped(paragraph) for paragraph in paragraphs)
    is_logged = any("--log-file" in option.opts for option in verb.params)
    logs = "\nAnd the [options of the log](#what-a-command-says-while-it-works).\n" if is_logged else ""
    parts = [text, *filter(None, [table + logs]), f"```\n{example}\n```\n"]
    return f"### {tool} {name}\n\n" + "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _row(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    """An option's names, help and default; empty for one that is explained elsewhere."""
    if any(name in SHARED for name in option.opts):
        return "", "", ""
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {option.make_metavar(context)}"
    extra = option.get_help_extra(context)
    default = "**required**" if option.required else str(extra.get("default") or "").strip("()")
    return f"`{names}{value}`", option.help or "", default


def _wrapped(paragraph: str) -> str:
    lines = [""]
    for word in paragraph.split():
        fits = len(lines[-1]) + len(word) < WIDTH
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if fits else [*lines, word]
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(written_anew(path.read_text(encoding="utf-8")), encoding="utf-8")
