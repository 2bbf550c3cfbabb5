"""Types of the options of both command lines: text is read here, and refused by fluxrt.checks, as in the Python API."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxrt import checks
from fluxrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    AnyType = click.ParamType[Any]
else:
    AnyType = click.ParamType  # not generic before 8.5


class Checked(AnyType):
    """A type whose `read` turns text into a value and whose `check` refuses some; both raise RequestError with the reason."""

    def __init__(self, name: str, read: Callable[[str], Any], check: Callable[[Any], Any]) -> None:
        self.name = name
        self._read, self._check = read, check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value; click's usage error for what is refused."""
        try:
            return self._check(self._read(value) if isinstance(value, str) else value)
        except RequestError as error:
            self.fail(str(error), param, ctx)


class Size(Checked):
    """(height, width) in pixels."""

    def __init__(self) -> None:
        super().__init__("HEIGHTxWIDTH", checks.read_size, checks.check_size)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """As it is written; click would write it in capitals."""
        return self.name


class PathText(click.Path):
    """A path as pathlib's Path; what cannot be one is refused here, what is there is for the command to look at."""

    def __init__(self, **more: Any) -> None:
        super().__init__(path_type=Path, **more)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; click's usage error for an empty one, or one with a null byte."""
        if isinstance(value, str) and (not value or "\0" in value):
            self.fail(f"{checks.shown(value)} is not a path", param, ctx)
        return super().convert(value, param, ctx)


PATH = PathText()
SEED = Checked("seed", partial(checks.read_whole, "seed"), checks.check_seed)
STEPS = Checked("number", partial(checks.read_whole, "steps"), checks.check_steps)
THREADS = Checked("number", partial(checks.read_whole, "threads"), checks.check_threads)
GPUS = Checked("number", partial(checks.read_whole, "gpus"), checks.check_gpus)
BATCH = Checked("number", partial(checks.read_whole, "batch"), checks.check_batch)
GUIDANCE = Checked("scale", partial(checks.read_real, "guidance"), checks.check_guidance)
THRESHOLD = Checked("number", partial(checks.read_real, "threshold"), checks.check_threshold)
SIZE = Size()
