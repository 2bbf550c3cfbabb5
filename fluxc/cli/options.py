"""What the commands share: arguments, options, how they show progress, and what their help says.

How a command ends (errors, exit codes, interrupts) is `fluxrt.commands`, which both tools share.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any
from unicodedata import category

import click

from fluxc.base.libraries import quiet_libraries
from fluxc.base.memory import limited_to, read_bytes
from fluxc.base.threads import computing_with
from fluxrt.checks import shown
from fluxrt.commands import Verb, logging_options
from fluxrt.cores import usable_cores
from fluxrt.log import Logs
from fluxrt.parameters import THREADS, Checked, PathText

if TYPE_CHECKING:
    from fluxc.base.shown import ShownProgress

LOG = logging.getLogger("fluxc")
RECIPE = {"RECIPE": "the YAML file that says what to compile, for whom, and how good it must be (docs/recipe.md)"}
BUNDLE = {"BUNDLE": "the folder of a bundle, as `fluxc build` writes it"}

verb = partial(click.command, cls=Verb)
"""A command, with `arguments` (what each is), an `example`, and a `short_help` for the list of commands."""


class Place(PathText):
    """A path where something is written. Control characters, which would break every line that names it, are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; click's usage error for what is refused."""
        if any(category(character) == "Cc" for character in str(value)):
            self.fail(f"{shown(str(value))} is not a path: it holds control characters", param, ctx)
        return super().convert(value, param, ctx)


class Source(Place):
    """A path of something that is read."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; refused is what cannot be the name of anything."""
        path = super().convert(value, param, ctx)
        try:
            path.lstat()
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                self.fail(f"{shown(str(value))}: {error.strerror}", param, ctx)
        return path


PLACE, SOURCE = Place(), Source()
recipe_argument = click.argument("recipe", type=SOURCE)
bundle_argument = click.argument("bundle", type=SOURCE)
set_option = click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a recipe field; may be repeated."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts (fields: docs/cli.md).")


def shows_progress(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command -q, -v, --log-file and --log-format, and a `progress` that shows its stages."""

    @logging_options
    @click.pass_obj
    @wraps(command)
    def run(logs: Logs, *arguments: Any, **options: Any) -> None:
        with _progress(logs) as progress:
            command(*arguments, progress=progress, **options)

    return run


@contextmanager
def _progress(logs: Logs) -> Iterator[ShownProgress]:
    """A bar on a terminal, unless quiet or in JSON; lines elsewhere. Libraries are quiet unless -v asks for all."""
    from fluxc.base.shown import ShownProgress

    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    with ExitStack() as stack:
        if logs.threshold >= logging.INFO:
            stack.enter_context(quiet_libraries())
        if not is_terminal or logs.as_json or logs.threshold > logging.INFO:
            yield ShownProgress(LOG)
            return
        from fluxc.base.console import new_console
        from fluxc.base.terminal import bar_on, print_line

        console = new_console(stderr=True)
        stack.callback(setattr, logs, "write", logs.write)
        logs.write = partial(print_line, console)
        yield ShownProgress(LOG, bar_on(console))


def _compute_with(context: click.Context, _: click.Parameter, threads: int | None) -> None:
    if threads is None:
        return
    if threads > usable_cores():
        told = "--threads %d: %d cores may be used here; more threads than cores only wait"
        LOG.warning(told, threads, usable_cores())
    context.with_resource(computing_with(threads))


threads_option = click.option(
    "--threads",
    type=THREADS,
    callback=_compute_with,
    expose_value=False,
    help="CPU threads to compute with; weights, graphs and engines do not depend on it.",
    show_default="all cores",
)


def _limit_to(context: click.Context, _: click.Parameter, memory: int | None) -> None:
    if memory is not None:
        context.with_resource(limited_to(memory))


memory_option = click.option(
    "--memory",
    type=Checked("SIZE", read_bytes, lambda size: size),
    metavar="SIZE",
    callback=_limit_to,
    expose_value=False,
    help="Most memory to take, for example 12GiB; what does not fit is refused before anything is written.",
    show_default="what is free",
)
