"""`fluxrt generate BUNDLE --prompt ... --out FILE.png`."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import fluxrt
from fluxrt.commands import CommandLine, logging_options
from fluxrt.log import write
from fluxrt.memory import MODES, resident
from fluxrt.output import check_outputs, save
from fluxrt.parameters import BATCH, GPUS, GUIDANCE, PATH, SEED, SIZE, STEPS, THREADS, THRESHOLD
from fluxrt.progress import QUIET, Progress, shown_time

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxrt.backends.registry import AnyPipeline
    from fluxrt.log import Logs
    from fluxrt.request import Request
    from fluxrt.result import Result

LOG = logging.getLogger("fluxrt")


@click.group("fluxrt", cls=CommandLine)
@click.version_option(fluxrt.__version__, prog_name="fluxrt", message="%(prog)s %(version)s")
def commands() -> None:
    """Generate images from a fluxc bundle."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments`, by default the process's; its exit code (fluxrt.commands)."""
    return commands.run(arguments)


@commands.command(
    arguments={"BUNDLE": "the bundle's folder"},
    example='fluxrt generate artifacts/flux2-nano-nvfp4 --prompt "a large red circle" --seed 7 --out circle.png',
)
@click.argument("bundle")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to generate; may be repeated.")
@click.option(
    "--out",
    required=True,
    type=PATH,
    help="PNG file; with several prompts, a number is added to its name. Each is written as soon as its image is made.",
)
@click.option("--seed", type=SEED, default=0, help="Starting noise, from 0 to 2^64 - 1; image i uses SEED + i.")
@click.option("--steps", type=STEPS, help="Denoising steps, at most 100000.", show_default="the bundle's")
@click.option("--guidance", type=GUIDANCE, help="Guidance scale, from 0 to 1000.", show_default="the bundle's")
@click.option("--size", type=SIZE, help="One of the sizes that were compiled.", show_default="the bundle's first")
@click.option("--target", help="Which of the bundle's targets to run.", show_default="the best that this machine runs")
@click.option(
    "--require",
    metavar="TARGET|gpu",
    help="Fail where this target, or any target on a GPU, does not run; otherwise the next best one serves.",
)
@click.option(
    "--batch",
    type=BATCH,
    help="Make so many images at once, if the bundle was compiled for it. Up to rounding, each is what it is by itself.",
    show_default="one",
)
@click.option("--no-step-cache", is_flag=True, help="Compute every step.")
@click.option(
    "--threshold", type=THRESHOLD, help="Let the step cache's rule decide with this threshold; larger skips more."
)
@click.option(
    "--gpus",
    type=GPUS,
    help="Generate with a target sharded for so many GPUs, or on a CPU processes.",
    show_default="one",
)
@click.option("--threads", type=THREADS, help="CPU threads of each rank.", show_default="all cores, divided")
@click.option(
    "--memory",
    type=click.Choice(MODES),
    default="auto",
    help="staged loads, uses and frees text encoder, transformer and decoder in turn; resident keeps all of them; auto is "
    "staged where not everything fits into what is free. Images are the same.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the images' paths.")
@logging_options
@click.pass_obj
def generate(logs: Logs, /, bundle: str, prompts: tuple[str, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Generate an image for each prompt.

    Prints the path of each image on stdout when it is written; everything else goes to stderr.
    """
    request = fluxrt.Request(
        list(prompts),
        step_cache=False if options["no_step_cache"] else None,
        **{name: options[name] for name in ("seed", "steps", "guidance", "size", "threshold", "batch")},
    )
    paths = check_outputs(out, len(prompts))
    with Progress(logs, len(paths)) as progress, _loaded(bundle, options) as pipeline:

        def on_image(number: int, image: Image, skipped: tuple[int, ...]) -> None:
            save(image, paths[number])
            progress.on_image(paths[number].name)
            if not as_json:
                progress.print(str(paths[number]))
            if skipped:
                listed = ", ".join(str(step) for step in skipped)
                LOG.info("%s: skipped %d steps (%s)", paths[number].name, len(skipped), listed)

        progress.processes = list(getattr(pipeline, "processes", []))
        progress.loaded()
        load_seconds = progress.seconds
        result = pipeline.generate(request, progress.on_step, on_image)
        target = result.target or pipeline.target.name
        workarounds = list(pipeline.notes)
    for note in workarounds:
        LOG.info("%s", note)
    took = {"load": load_seconds, **result.seconds}
    parts = ", ".join(f"{what} {shown_time(seconds)}" for what, seconds in took.items())
    memory = max(progress.most_memory, resident())
    images = "1 image" if len(paths) == 1 else f"{len(paths)} images"
    LOG.info("%s in %s: %s; %.1f GiB of memory", images, shown_time(progress.seconds), parts, memory / 2**30)
    if as_json:
        plain = {
            "target": target,
            "images": _images(request, result, paths),
            "seconds": {what: round(seconds, 4) for what, seconds in took.items()},
            "memory_bytes": memory,
            "notes": [*result.notes, *workarounds],
        }
        write(json.dumps(plain), sys.stdout)


@commands.command(
    arguments={"BUNDLE": "the bundle's folder"},
    example="fluxrt verify artifacts/flux2-nano-nvfp4 --target onnxruntime --json",
)
@click.argument("bundle")
@click.option(
    "--target", help="Replay on this target alone, which must run here.", show_default="every one that runs here"
)
@click.option("--threads", type=THREADS, help="CPU threads of a CPU target.", show_default="all cores")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the tables.")
@logging_options
@click.pass_obj
def verify(logs: Logs, /, bundle: str, target: str | None, threads: int | None, as_json: bool) -> None:
    """Check a bundle's files, and replay its evidence: recorded inputs of each stage, against recorded results.

    The exit code is 0 only if every target that runs here is as near to the recorded results as the bundle's bounds ask. With
    --quiet nothing is printed but what is wrong.
    """
    from fluxrt.bundle import open_bundle, verify_files
    from fluxrt.verify import NO_EVIDENCE, check_passed, lines_of, verify_evidence

    opened = open_bundle(bundle)
    if target is not None:
        opened.target(target)
    LOG.info("check the SHA-256 of %d files", len(opened.manifest.files))
    verify_files(opened)
    shows = not as_json and logs.threshold <= logging.INFO
    if shows:
        write(f"files: {len(opened.manifest.files)} match their SHA-256", sys.stdout)
    if opened.manifest.recorded is None:
        LOG.warning("%s: %s", bundle, NO_EVIDENCE)
    said = time.monotonic()

    def on_part(name: str, done: int, total: int) -> None:
        nonlocal said
        if not done or time.monotonic() - said > QUIET:
            said = time.monotonic()
            LOG.info("target %s: evidence, %d of %d parts are replayed", name, done, total)

    found = []
    for checked in verify_evidence(opened, target, threads, on_part=on_part):
        found.append(checked)
        for line in lines_of(checked) if shows else ():
            write(line, sys.stdout)
    if as_json:
        statuses = {checked.status for checked in found}
        has_evidence = opened.manifest.recorded is not None
        plain = {
            "bundle": opened.manifest.digest,
            "files": len(opened.manifest.files),
            "evidence": has_evidence,
            "passed": "passed" in statuses and "failed" not in statuses if has_evidence else None,
            "targets": [checked.as_json() for checked in found],
        }
        write(json.dumps(plain), sys.stdout)
    check_passed(opened, found, target)


def _images(request: Request, result: Result, paths: list[Path]) -> list[dict[str, Any]]:
    """What --json says of each image; docs/serving.md lists the fields."""
    return [
        {"path": str(path), "seed": seed, "size": [image.height, image.width], "skipped_steps": list(skipped)}
        for path, seed, image, skipped in zip(paths, request.seeds, result.images, result.skipped, strict=True)
    ]


def _loaded(bundle: str, options: dict[str, Any]) -> AnyPipeline:
    asked = {name: options[name] for name in ("target", "threads", "gpus", "require", "memory")}
    pipeline = fluxrt.load(bundle, **asked)
    if pipeline.target.kind == "onnxruntime":
        import onnxruntime

        # Its loggers print what it also raises, which reaches the user as a sentence of ours.
        onnxruntime.set_default_logger_severity(4)
    return pipeline


if __name__ == "__main__":
    sys.exit(main())
