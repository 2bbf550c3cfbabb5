"""What the commands share: arguments, options, and how errors end them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from fluxc.base.errors import FluxError
from fluxrt.signals import INTERRUPTED, ended_by_signal, ended_by_sigterm


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a FluxError into one paragraph on stderr and its exit code; SIGTERM removes what is half written."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with ended_by_sigterm():
                command(*args, **kwargs)
        except BaseException as error:
            code = ended_by_signal(error)
            if code == INTERRUPTED:
                click.echo("fluxc: interrupted; finished stages are kept, run the command again to go on", err=True)
            if code is None and isinstance(error, FluxError):
                click.echo(f"fluxc: {error}", err=True)
                code = error.exit_code
            if code is None:
                raise
            sys.exit(code)

    return run


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a recipe field.")
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
