"""The command `fluxrt`, before anything else of it is imported."""

from __future__ import annotations

from fluxrt.signals import a_command


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments`, by default the process's; its exit code."""
    with a_command("fluxrt") as begun:
        from fluxrt.cli import main as command

        begun()
        return command(arguments)
