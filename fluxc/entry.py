"""The command `fluxc`, before anything else of it is imported."""

from __future__ import annotations

from fluxrt.signals import a_command


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments`, by default the process's, and end the process."""
    with a_command("fluxc") as begun:
        from fluxc.base.threads import wait_quietly

        # Before the first library that reads it is loaded.
        wait_quietly()
        from fluxc.cli.main import main as command

        begun()
        command(arguments)
