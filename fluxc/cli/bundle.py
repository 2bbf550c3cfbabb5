"""Commands on a finished bundle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxc.cli.options import (
    BUNDLE,
    PLACE,
    SOURCE,
    bundle_argument,
    json_option,
    shows_progress,
    threads_option,
    verb,
)

if TYPE_CHECKING:
    from fluxc.base.shown import ShownProgress


@verb(
    short_help="Show what a bundle holds.",
    arguments=BUNDLE,
    example="fluxc inspect artifacts/flux2-nano-nvfp4 --json",
)
@bundle_argument
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds, from its manifest; files are not read."""
    from fluxrt.bundle import open_bundle

    opened = open_bundle(bundle)
    if as_json:
        from fluxc.cli.as_json import bundle_fields

        click.echo(json.dumps(bundle_fields(opened), indent=1))
        return
    from fluxc.cli.describe_bundle import print_bundle

    print_bundle(opened)


@verb(
    short_help="Check a bundle's files, replay its evidence, generate a recorded image again.",
    arguments=BUNDLE,
    example="fluxc verify artifacts/flux2-nano-nvfp4 --target onnxruntime",
)
@bundle_argument
@click.option("--target", help="Generate with this target alone.", show_default="every one that runs here")
@json_option
@threads_option
@shows_progress
def verify(bundle: Path, target: str | None, as_json: bool, progress: ShownProgress) -> None:
    """Check every file's size and SHA-256, replay the evidence, then generate a recorded image again and compare.

    `fluxrt verify` does the first two without torch, where the bundle is served.
    """
    from fluxc.fidelity.verify import verified

    checks = []
    for check in verified(bundle, target, progress):
        checks.append(asdict(check))
        if not as_json:
            click.echo(check.line)
    if as_json:
        click.echo(json.dumps({"checks": checks}, indent=1))


@verb(
    short_help="Build the plans of a bundle that need this machine's GPU.",
    arguments=BUNDLE,
    example="fluxc finish artifacts/flux2-dev-b200",
)
@bundle_argument
@click.option("--target", help="Build this target's plans alone.", show_default="all that are left")
@threads_option
@shows_progress
def finish(bundle: Path, target: str | None, progress: ShownProgress) -> None:
    """Build the plans of BUNDLE that need this machine's GPU, audit them, seal the bundle again, and replay its evidence.

    What the replay measures goes into manifest and report, as with `add-evidence`. The exit code is 1 where a stage is further
    from the recorded one than the bundle's bounds allow. Where no plan is left to build, every target for a GPU is replayed.
    """
    from fluxc.gpu_check.place import GpuPlace
    from fluxc.gpu_check.replay import replay_on_gpu
    from fluxc.targets.tensorrt.finish import finish_bundle, unfinished
    from fluxrt.bundle import open_bundle

    left = unfinished(bundle, target)
    for line in finish_bundle(bundle, target, progress=progress):
        click.echo(line)
    left = left or [entry.name for entry in open_bundle(bundle).manifest.targets if entry.device != "cpu"]
    for line in replay_on_gpu(bundle, left if target is None else [target], GpuPlace(), progress):
        click.echo(line)


@verb(
    "export-onnx",
    short_help="Write a bundle's stages as ONNX graphs for trtexec and Triton.",
    arguments=BUNDLE,
    example="fluxc export-onnx artifacts/flux2-nano-rtx --out onnx",
)
@bundle_argument
@click.option("--for", "consumer", type=click.Choice(("tensorrt",)), default="tensorrt", help="Whose operators to use.")
@click.option("--target", help="Which TensorRT target's graphs.", show_default="the first")
@click.option("--out", type=PLACE, required=True, help="The folder to write; it must not exist.")
@shows_progress
def export_onnx(bundle: Path, consumer: str, target: str | None, out: Path, progress: ShownProgress) -> None:
    """Write BUNDLE's stages as whole ONNX graphs with their weights, for trtexec and Triton; print the commands."""
    from fluxc.targets.tensorrt.export_onnx import export_onnx as run
    from fluxrt.bundle import open_bundle

    for command in run(open_bundle(bundle), target, out, progress):
        click.echo(command)


@verb(
    short_help="Show what this machine can build and run, and what is missing.",
    arguments={"BUNDLE": f"{BUNDLE['BUNDLE']}; with it, which of its targets run here"},
    example="fluxc doctor artifacts/flux2-nano-nvfp4",
)
@click.argument("bundle", type=SOURCE, required=False)
@json_option
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show what this machine can build and run, and what to install for the rest; of BUNDLE, which target it would choose."""
    from fluxc.cli.describe_bundle import print_doctor, print_targets
    from fluxrt.bundle import open_bundle

    opened = open_bundle(bundle) if bundle else None
    if as_json:
        from fluxc.cli.doctor import machine_checks, target_checks

        checks = {"machine": machine_checks(), **({"targets": target_checks(opened)} if opened else {})}
        shown = {name: [asdict(check) for check in found] for name, found in checks.items()}
        click.echo(json.dumps(shown, indent=1))
        return
    print_doctor()
    if opened:
        print_targets(opened)
