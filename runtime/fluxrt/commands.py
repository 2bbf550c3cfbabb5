"""What the command lines `fluxc` and `fluxrt` share: how commands end, exit codes, help, and the options of their log.

A command raises; `CommandLine` turns what it raised into one paragraph on stderr and an exit code:

1. A FluxError: its text and its exit code.
2. A wrong command line: click's reason, exit code 2.
3. An interrupt: a sentence, 130. SIGTERM: 143. Both run what a command does to leave nothing half written.
4. Anything else: what it was and the place of a log with the traceback, exit code 1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fluxrt.errors import FluxError
from fluxrt.log import Logs, printable, silence
from fluxrt.parameters import PathText
from fluxrt.signals import INTERRUPTED, ended_by_signal, ended_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_CODES = (
    (0, "done"),
    (1, "failed: a gate, a damaged file, a library or device that cannot do it, no room"),
    (2, "wrong request: the command line, the recipe, or something the bundle does not have"),
    (130, "interrupted (Ctrl-C)"),
    (143, "terminated (SIGTERM)"),
)
OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that no command foresees everywhere, and that are no fault of the program."""


class Verb(click.Command):
    """A command whose help lists its arguments and ends with an example."""

    def __init__(self, *args: Any, arguments: dict[str, str] | None = None, example: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.arguments, self.example = arguments or {}, example

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The arguments, then the options."""
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(list(self.arguments.items()))
        super().format_options(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example."""
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)


class CommandLine(click.Group):
    """The commands of one tool; `name` is the tool's. `on_interrupt` is what an interrupted command says after its name."""

    command_class = Verb

    def __init__(self, *args: Any, on_interrupt: str = "interrupted", **more: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"], "show_default": True, **more.pop("context_settings", {})}
        super().__init__(*args, context_settings=settings, **more)
        self.on_interrupt = on_interrupt

    def main(self, args: Sequence[str] | None = None, *_: Any, **more: Any) -> NoReturn:
        """Run the command line `args`, by default the process's, and end the process."""
        sys.exit(self.run(args))

    def run(self, args: Sequence[str] | None = None) -> int:
        """Run the command line `args`, by default the process's; its exit code."""
        tool = str(self.name)
        _open_standard_descriptors()
        arguments = list(sys.argv[1:] if args is None else args)
        with Logs(tool) as logs:
            try:
                with ended_by_signals():
                    self._complete(tool)
                    with self.make_context(tool, list(arguments) or ["--help"], obj=logs) as context:
                        self.invoke(context)
                return 0
            except click.exceptions.Exit as done:
                return done.exit_code if arguments else 2
            except BaseException as error:
                return self._ended(error, logs)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES])
        super().format_epilog(ctx, formatter)

    def _complete(self, tool: str) -> None:
        """Answer a shell that asks for completions."""
        variable = f"_{tool.upper()}_COMPLETE"
        asked = os.environ.get(variable)
        if asked:
            from click.shell_completion import shell_complete

            sys.exit(shell_complete(self, {}, tool, variable, asked))

    def _ended(self, error: BaseException, logs: Logs) -> int:
        """Say why a command ended; its exit code."""
        code = ended_by_signal(error)
        if code is not None:
            if code == INTERRUPTED:
                logs.error(self.on_interrupt)
            return code
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error, FluxError):
            logs.error(str(error))
            return error.exit_code
        if isinstance(error, click.ClickException):
            logs.error(_wrong_usage(error, logs.tool))
            return 2
        if isinstance(error, BrokenPipeError):
            # Who reads the output has seen enough.
            silence(sys.stdout)
            return 1
        if not isinstance(error, Exception):
            raise error
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):
            # What it could not print would fail once more when Python ends, with another exit code.
            silence(sys.stdout)
        logs.error(_unexpected(error, logs))
        return 1


def logging_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command -q, -v, --log-file and --log-format; they set up the Logs that `click.pass_obj` gives."""
    for option in reversed(_LOGGING_OPTIONS):
        command = option(command)
    return command


def _quieter(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        _set_threshold(context, 30)


def _louder(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        _set_threshold(context, 10)


def _set_threshold(context: click.Context, threshold: int) -> None:
    logs = context.ensure_object(Logs)
    if logs.threshold not in (20, threshold):
        raise click.UsageError("give -q or -v, not both", context)
    logs.threshold = threshold


def _log_to(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        context.ensure_object(Logs).open(path)


def _log_as(context: click.Context, _: click.Parameter, form: str) -> None:
    context.ensure_object(Logs).as_json = form == "json"


_LOGGING_OPTIONS = (
    click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_quieter,
        help="Say nothing but warnings and errors; show no progress.",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_louder,
        help="Say more, and show the traceback of what nobody expected.",
    ),
    click.option(
        "--log-file",
        type=PathText(dir_okay=False),
        expose_value=False,
        callback=_log_to,
        help="Add everything that is said, with its time, to this file too.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        expose_value=False,
        is_eager=True,
        callback=_log_as,
        help="How lines on stderr and in the log file are written: as text, or each as a JSON object.",
    ),
)


def _wrong_usage(error: click.ClickException, tool: str) -> str:
    """Click's reason as one sentence, with where to read more."""
    reason = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else tool
    return f"{reason[:1].lower()}{reason[1:]}; see `{path} --help`"


def _unexpected(error: Exception, logs: Logs) -> str:
    """What to say of an error that nobody expected; its traceback goes to a log."""
    trace = "".join(traceback.format_exception(error))
    if logs.threshold <= 10:
        with contextlib.suppress(Exception):
            logs.write(printable(trace.rstrip()))
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    what = what if len(what) <= 300 else f"{what[:297]}..."
    place = logs.write_report(trace)
    if isinstance(error, MemoryError):
        what = f"memory ran out ({what})"
    kept = f"the full log is {place}" if isinstance(place, Path) else f"its log could not be written ({place})"
    if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free what the system lacks and run the command again; {kept}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}, in {sys.executable}; install {logs.tool} again there, with all that it requires; {kept}"
    return f"unexpected error, {what}; {kept}; run it again with -v to see where, and report it with this log"


def _open_standard_descriptors() -> None:
    """Open /dev/null as each of stdin, stdout, stderr that is closed: a file in its place would get what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
