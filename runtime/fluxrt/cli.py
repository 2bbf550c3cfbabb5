"""`fluxrt generate BUNDLE --prompt ... --out FILE.png`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import fluxrt
from fluxrt.commands import CommandLine, logging_options
from fluxrt.log import write
from fluxrt.output import check_output, save
from fluxrt.parameters import GPUS, GUIDANCE, SEED, SIZE, STEPS, THREADS, THRESHOLD

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxrt.backends.registry import AnyPipeline

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
    type=click.Path(path_type=Path),
    help="PNG file; with several prompts, a number is added to its name. Each is written as soon as its image is made.",
)
@click.option("--seed", type=SEED, default=0, help="Starting noise; image i uses SEED + i.")
@click.option("--steps", type=STEPS, help="Denoising steps.", show_default="the bundle's")
@click.option("--guidance", type=GUIDANCE, help="Guidance scale.", show_default="the bundle's")
@click.option("--size", type=SIZE, help="One of the sizes that were compiled.", show_default="the bundle's first")
@click.option("--target", help="Which of the bundle's targets to run.", show_default="the best that this machine runs")
@click.option("--no-step-cache", is_flag=True, help="Compute every step.")
@click.option(
    "--threshold", type=THRESHOLD, help="Let the step cache's rule decide with this threshold; larger skips more."
)
@click.option(
    "--gpus",
    type=GPUS,
    help="Generate with a target sharded for so many GPUs, or on a CPU processes.",
    show_default="1",
)
@click.option("--threads", type=THREADS, help="CPU threads of each rank.", show_default="all cores, divided")
@logging_options
def generate(bundle: str, prompts: tuple[str, ...], out: Path, **options: Any) -> None:
    """Generate an image for each prompt."""
    request = fluxrt.Request(
        list(prompts),
        step_cache=False if options["no_step_cache"] else None,
        **{name: options[name] for name in ("seed", "steps", "guidance", "size", "threshold")},
    )
    several = len(prompts) > 1
    paths = [out.with_stem(f"{out.stem}-{number}") if several else out for number in range(len(prompts))]
    for path in paths:
        check_output(path)
    showing = sys.stderr is not None and sys.stderr.isatty()

    def on_step(done: int, total: int) -> None:
        write(f"\rstep {done}/{total}", sys.stderr, end="" if done < total else "\n")

    def on_image(number: int, image: Image, skipped: tuple[int, ...]) -> None:
        save(image, paths[number])
        write(str(paths[number]), sys.stdout)
        if skipped:
            listed = ", ".join(str(step) for step in skipped)
            LOG.info("%s: skipped %d steps (%s)", paths[number].name, len(skipped), listed)

    with _loaded(bundle, options) as pipeline:
        result = pipeline.generate(request, on_step if showing else None, on_image)
    for note in (*result.notes, *pipeline.notes):
        LOG.info("%s", note)


def _loaded(bundle: str, options: dict[str, Any]) -> AnyPipeline:
    pipeline = fluxrt.load(bundle, target=options["target"], threads=options["threads"], gpus=options["gpus"])
    if pipeline.target.kind == "onnxruntime":
        import onnxruntime

        # Its loggers print what it also raises, which reaches the user as a sentence of ours.
        onnxruntime.set_default_logger_severity(4)
    return pipeline


if __name__ == "__main__":
    sys.exit(main())
