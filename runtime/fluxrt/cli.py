"""`fluxrt generate BUNDLE --prompt ... --out FILE.png`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import fluxrt
from fluxrt.errors import FluxError, RequestError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, return its exit code (0 done, 1 failed, 2 wrong request)."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except FluxError as error:
        print(f"fluxrt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fluxrt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fluxrt", description="Generate images from a fluxc bundle.")
    parser.add_argument("--version", action="version", version=f"fluxrt {fluxrt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="generate an image for each prompt")
    generate.add_argument("bundle", help="the bundle folder")
    generate.add_argument(
        "--prompt", action="append", required=True, help="what to generate; may be given several times"
    )
    generate.add_argument("--out", required=True, help="PNG file; with several prompts, a number is added to its name")
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
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise RequestError(f"--out {out}: images are written as PNG; give a name that ends in .png")
    if not out.parent.is_dir():
        raise RequestError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    request = fluxrt.Request(
        options.prompt,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        size=options.size,
        step_cache=False if options.no_step_cache else None,
        threshold=options.threshold,
    )
    showing = sys.stderr.isatty()

    def on_step(done: int, total: int) -> None:
        print(f"\rstep {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    pipeline = fluxrt.load(options.bundle, target=options.target, threads=options.threads, gpus=options.gpus)
    with contextlib.closing(pipeline):
        result = pipeline.generate(request, on_step if showing else None)
    for note in (*result.notes, *pipeline.notes):
        print(f"fluxrt: {note}", file=sys.stderr)
    several = len(result.images) > 1
    for number, image in enumerate(result.images):
        path = out.with_stem(f"{out.stem}-{number}") if several else out
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        image.save(partial, format="PNG")
        partial.replace(path)
        print(path)
        if result.skipped[number]:
            listed = ", ".join(str(step) for step in result.skipped[number])
            print(f"fluxrt: {path.name}: skipped {len(result.skipped[number])} steps ({listed})", file=sys.stderr)
    return 0


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 1024x1024")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
