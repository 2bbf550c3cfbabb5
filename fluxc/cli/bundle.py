"""Commands on a finished bundle."""

from __future__ import annotations

from pathlib import Path

import click

from fluxc.cli.options import bundle_argument, reports_errors


@click.command()
@bundle_argument
@reports_errors
def inspect(bundle: Path) -> None:
    """Show what BUNDLE holds, from its manifest."""
    from fluxc.cli.describe_bundle import print_bundle
    from fluxrt.bundle import open_bundle

    print_bundle(open_bundle(bundle))


@click.command()
@bundle_argument
@click.option("--target", help="Generate with this target alone (default: with every one).")
@reports_errors
def verify(bundle: Path, target: str | None) -> None:
    """Check every file's size and SHA-256, then generate a recorded image again and compare."""
    from fluxc.fidelity.verify import verify_bundle

    for line in verify_bundle(bundle, target):
        click.echo(line)


@click.command()
@bundle_argument
@click.option("--target", help="Build this target's plans alone (default: all that are left).")
@reports_errors
def finish(bundle: Path, target: str | None) -> None:
    """Build the plans of BUNDLE that need this machine's GPU, audit them, and seal the bundle again."""
    from fluxc.targets.tensorrt.finish import finish_bundle

    for line in finish_bundle(bundle, target):
        click.echo(line)


@click.command("export-onnx")
@bundle_argument
@click.option("--for", "consumer", type=click.Choice(("tensorrt",)), default="tensorrt", help="Whose operators to use.")
@click.option("--target", help="Which TensorRT target's graphs (default: the first).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write; it must not exist.")
@reports_errors
def export_onnx(bundle: Path, consumer: str, target: str | None, out: Path) -> None:
    """Write BUNDLE's stages as whole ONNX graphs with their weights, for trtexec and Triton; print the commands."""
    from fluxc.targets.tensorrt.export_onnx import export_onnx as run
    from fluxrt.bundle import open_bundle

    for command in run(open_bundle(bundle), target, out):
        click.echo(command)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@reports_errors
def doctor(bundle: Path | None) -> None:
    """Show what this machine can build and run, and what to install for the rest; of BUNDLE, which target it would choose."""
    from fluxc.cli.describe_bundle import print_doctor, print_targets
    from fluxrt.bundle import open_bundle

    opened = open_bundle(bundle) if bundle else None
    print_doctor()
    if opened:
        print_targets(opened)
