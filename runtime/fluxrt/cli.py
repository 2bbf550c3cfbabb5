"""`fluxrt generate BUNDLE --prompt ... --out FILE.png`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import fluxrt
from fluxrt.errors import FluxError
from fluxrt.output import check_output, save
from fluxrt.signals import INTERRUPTED, ended_by_signal, ended_by_sigterm

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxrt.backends.registry import AnyPipeline


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, return its exit code (0 done, 1 failed, 2 wrong request)."""
    _open_standard_descriptors()
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BaseException as error:
        code = ended_by_signal(error)
        if code == INTERRUPTED:
            _say("fluxrt: interrupted", sys.stderr)
        if code is None and isinstance(error, FluxError):
            _say(f"fluxrt: {error}", sys.stderr)
            code = error.exit_code
        if code is None:
            raise
        return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fluxrt", description="Generate images from a fluxc bundle.")
    parser.add_argument("--version", action="version", version=f"fluxrt {fluxrt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="generate an image for each prompt")
    generate.add_argument("bundle", help="the bundle folder")
    generate.add_argument(
        "--prompt", action="append", required=True, help="what to generate; may be given several times"
    )
    generate.add_argument(
        "--out",
        required=True,
        help="PNG file; with several prompts, a number is added to its name. Each is written as soon as its image is made",
    )
    generate.add_argument("--seed", type=int, default=0, help="starting noise; image i uses SEED + i (default 0)")
    generate.add_argument("--steps", type=int, help="denoising steps (default: the bundle's)")
    generate.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")
    generate.add_argument("--size", type=_size, help="HEIGHTxWIDTH, one that was compiled (default: the first)")
    generate.add_argument(
        "--target", help="which of the bundle's targets to run (default: the best that this machine runs)"
    )
    generate.add_argument("--no-step-cache", action="store_true", help="compute every step")
    generate.add_argument(
        "--threshold", type=float, help="let the step cache's rule decide with this threshold: larger skips more"
    )
    generate.add_argument(
        "--gpus", type=int, help="generate with a target sharded for so many GPUs, or on a CPU processes (default: one)"
    )
    generate.add_argument("--threads", type=int, help="CPU threads of each rank (default: all cores, divided)")
    generate.set_defaults(run=_generate)
    return parser


def _generate(options: argparse.Namespace) -> int:
    request = fluxrt.Request(
        options.prompt,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        size=options.size,
        step_cache=False if options.no_step_cache else None,
        threshold=options.threshold,
    )
    out = Path(options.out)
    several = len(request.prompts) > 1
    paths = [out.with_stem(f"{out.stem}-{number}") if several else out for number in range(len(request.prompts))]
    for path in paths:
        check_output(path)
    showing = sys.stderr is not None and sys.stderr.isatty()

    def on_step(done: int, total: int) -> None:
        _say(f"\rstep {done}/{total}", sys.stderr, end="" if done < total else "\n")

    def on_image(number: int, image: Image, skipped: tuple[int, ...]) -> None:
        save(image, paths[number])
        _say(str(paths[number]), sys.stdout)
        if skipped:
            listed = ", ".join(str(step) for step in skipped)
            _say(f"fluxrt: {paths[number].name}: skipped {len(skipped)} steps ({listed})", sys.stderr)

    with ended_by_sigterm(), _loaded(options) as pipeline:
        result = pipeline.generate(request, on_step if showing else None, on_image)
    for note in (*result.notes, *pipeline.notes):
        _say(f"fluxrt: {note}", sys.stderr)
    return 0


def _loaded(options: argparse.Namespace) -> AnyPipeline:
    pipeline = fluxrt.load(options.bundle, target=options.target, threads=options.threads, gpus=options.gpus)
    if pipeline.target.kind == "onnxruntime":
        import onnxruntime

        # Its loggers print what it also raises, which reaches the user as a sentence of ours.
        onnxruntime.set_default_logger_severity(4)
    return pipeline


def _say(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Print a line; who closed the stream, or filled its disk, loses the line and no image."""
    if stream is None:
        return
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        # What is left in the stream's buffer would fail again when Python ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_descriptors() -> None:
    """Open /dev/null as each of stdin, stdout, stderr that is closed: a file in its place would get what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isascii() and height.isdigit() and width.isascii() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 1024x1024")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
