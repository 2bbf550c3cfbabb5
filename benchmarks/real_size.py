"""Compiles a checkpoint of a real model's size and shows what that takes: time, memory, disk, and what ends it.

    python benchmarks/real_size.py build --memory 12GiB --again 8GiB    # stages, one image beside diffusers, equal bytes
    python benchmarks/real_size.py build --memory 12GiB --grown         # the same with weights that make flux2-nano's images
    python benchmarks/real_size.py depth --memory 10GiB                 # memory by depth, at klein 9B's and dev's widths
    python benchmarks/real_size.py kills --memory 12GiB                 # SIGKILL in each stage, then on to the same bytes
    python benchmarks/real_size.py disk --memory 12GiB                  # a full disk in each stage, then the same (root)
    python benchmarks/real_size.py refuse                               # limits below what is needed

The checkpoint has random weights (`real_size_checkpoint.py`) or, with `--grown`, those of flux2-nano at its size, for 64x64
images (`real_size_grown.py`). It is klein 4B's whole, unless `--widths`, `--blocks` or `--text-layers` say otherwise, and is
compiled as recipes/flux2-klein-4b.yaml is, for 256x256 images, for `onnxruntime` and `tensorrt_rtx`. Memory is measured and
limited as `real_size_watch.py` says. Everything is removed at the end, unless `--keep` leaves it for the next command with the
same `--work`. Tables go to stdout as Markdown, what happens meanwhile to stderr.

`build` with klein 4B writes 16 GB of checkpoint and 6 GB of bundle; `depth` at most 45 GB, one model after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cpu_step import cpu_name
from real_size_checkpoint import LEAST_LAYERS, Shape, add_shape_options
from real_size_faults import disk, kills, refuse
from real_size_image import psnr
from real_size_place import (
    GIB,
    GROWN_PROMPTS,
    HERE,
    NANO,
    NANO_PROMPTS,
    NANO_SIZE,
    NANO_TEXT,
    PROMPTS,
    SIZE,
    STEPS,
    TEXT,
    Place,
    checked,
    compared,
    disk_of,
    ended,
    in_bytes,
    in_words,
    shown_stages,
    stage_table,
    tell,
)
from real_size_watch import Run, limited_by, watched

Pair = tuple[Path, "Path | None"]
"""What diffusers recorded, and the image of fluxrt, where there is one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"build": build, "depth": depth, "kills": kills, "disk": disk, "refuse": refuse}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--memory", type=in_bytes, help="limit for each command, such as 12GiB (default: none)")
    parser.add_argument("--again", type=in_bytes, help="of build: build once more in this limit, compare the bytes")
    parser.add_argument("--image-memory", type=in_bytes, default=8 * GIB, help="limit for fluxrt (default: 8GiB)")
    parser.add_argument("--no-image", action="store_true", help="of build: generate no image")
    parser.add_argument("--stages", help="of kills and disk: only stages whose titles hold this word")
    add_shape_options(parser)
    parser.add_argument(
        "--nano", action="store_true", help="flux2-nano, not of a real size: tries the command in minutes"
    )
    parser.add_argument(
        "--grown",
        action="store_true",
        help="weights that compute what flux2-nano does (real_size_grown.py), not random ones",
    )
    parser.add_argument("--depths", default="2+4,4+8", help="of depth: blocks to compare (default: 2+4,4+8)")
    parser.add_argument("--all-widths", default="klein-9b,dev", help="of depth (default: klein-9b,dev)")
    parser.add_argument("--limits", default="1GiB,2GiB", help="of refuse (default: 1GiB,2GiB)")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE", help="of recipes")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one in this folder)")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundles in --work")
    options = parser.parse_args()
    # What is running must end with it, and what was mounted and written must go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with folder_of(options) as work:
        place = Place(work, options)
        print(f"{cpu_name()}, {memory_of_machine() / GIB:.0f} GiB, Python {platform.python_version()}.")
        if options.memory:
            print(f"Limit: {limited_by()}.")
        print(flush=True)
        commands[options.command](place)


@contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[Path]:
    """The folder to work in; what was made there goes at the end, unless it is to be kept."""
    if options.work is None:
        with tempfile.TemporaryDirectory(prefix="real-size-", dir=Path.cwd()) as folder:
            yield Path(folder)
        return
    work = options.work.resolve()
    before = set(work.iterdir()) if work.exists() else set()
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        for path in [] if options.keep else set(work.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def build(place: Place) -> None:
    """Stages of a build; an image beside diffusers; the same bytes in less memory."""
    options = place.options
    bundle, stages, expected = place.undisturbed(options.memory)
    print(f"### Build of {place.name} in {in_words(options.memory)}\n")
    print(stage_table(stages))
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    print(
        f"\nBundle: {size / 1e9:.2f} GB. With results of stages: {disk_of(bundle.parent) / 1e9:.2f} GB.\n", flush=True
    )
    if not options.no_image:
        image(place, bundle)
    if options.again:
        again, stages, found = place.undisturbed(options.again)
        print(f"### Build of {place.name} in {in_words(options.again)}\n")
        print(stage_table(stages))
        print(f"\n{compared(found, expected)}\n", flush=True)
        shutil.rmtree(again.parent) if not options.keep else None


def image(place: Place, bundle: Path) -> None:
    """One image by fluxrt and diffusers: seconds and memory; how far apart, and how far the same recipe is on flux2-nano."""
    options, checkpoint = place.options, place.checkpoint()
    picture, record = place.work / "image.png", place.work / "reference.npz"
    size, text = (NANO_SIZE, NANO_TEXT) if place.is_nano else (SIZE, TEXT)
    prompt = held_out(place.is_nano)[0]
    generate = [sys.executable, "-m", "fluxrt", "generate", str(bundle), "--prompt", prompt, "--out", str(picture)]
    generate += ["--target", "onnxruntime", "--seed", "0", "--json", "--log-format", "json", "--memory"]
    runs: dict[str, Run] = {}
    for memory in ("staged", "resident"):
        tell(f"fluxrt generate --memory {memory}")
        runs[f"fluxrt, `--memory {memory}`"] = watched([*generate, memory], options.image_memory)
    ours = runs["fluxrt, `--memory resident`"]
    tell("diffusers")
    theirs = runs["diffusers, bf16"] = watched(script("reference", checkpoint, record, prompt, size, text, 0))
    print(f"### One image of {size}x{size}, {STEPS} steps; fluxrt in {in_words(options.image_memory)}\n")
    print("| | s | held, GiB | resident, GiB | ended |\n|---|---|---|---|---|")
    for name, run in runs.items():
        how = "done" if run.status == 0 else ended(run)
        print(f"| {name} | {run.seconds:.0f} | {run.held / GIB:.2f} | {run.resident / GIB:.2f} | {how} |")
    if ours.status == 0:
        print("\n" + ", ".join(f"{what} {took:.1f} s" for what, took in json.loads(ours.out)["seconds"].items()))
    print(flush=True)
    if theirs.status:
        raise SystemExit(ended(theirs))
    pairs: list[Pair] = [(record, picture if ours.status == 0 else None)]
    if options.grown:
        pairs += pairs_of(place, checkpoint, bundle, range(1, GROWN_PROMPTS))
    small, nano_pairs = nano(place)
    print("| | prompts | text error | velocity error | cosine of velocity | PSNR of the image, dB |")
    print("|---|---|---|---|---|---|")
    print(distances(place.name, bundle, pairs))
    print(distances(NANO.name, small, nano_pairs) + "\n", flush=True)
    if options.grown:
        # The same prompts and noise.
        same = [
            psnr(np.load(one)["image"], np.load(other)["image"])
            for (one, _), (other, _) in zip(pairs, nano_pairs, strict=False)
        ]
        words = f"PSNR between diffusers' images of {place.name} and of {NANO.name}"
        print(f"{words}: {np.mean(same):.1f} dB on average, {min(same):.1f} dB at least.\n", flush=True)


def nano(place: Place) -> tuple[Path, list[Pair]]:
    """flux2-nano, compiled by the same recipe: its bundle, and what it and diffusers make of the held-out prompts."""
    out = place.work / "build-nano" / "bundle"
    tell(f"build of {NANO.name}")
    run = place.build(place.recipe(NANO), out, None)
    if run.status:
        raise SystemExit(ended(run))
    return out, pairs_of(place, NANO, out, range(NANO_PROMPTS))


def pairs_of(place: Place, checkpoint: Path, bundle: Path, numbers: Iterable[int]) -> list[Pair]:
    """What diffusers records, and the image of fluxrt, for flux2-nano's held-out prompts of these numbers."""
    pairs: list[Pair] = []
    for number in numbers:
        prompt = held_out(is_nano=True)[number]
        record, picture = (place.work / f"{checkpoint.name}-{number}{suffix}" for suffix in (".npz", ".png"))
        tell(f"image {number} of {checkpoint.name}")
        checked(script("reference", checkpoint, record, prompt, NANO_SIZE, NANO_TEXT, number))
        generate = [sys.executable, "-m", "fluxrt", "generate", str(bundle), "--prompt", prompt, "--out", str(picture)]
        checked([*generate, "--target", "onnxruntime", "--seed", str(number)])
        pairs.append((record, picture))
    return pairs


def held_out(is_nano: bool) -> list[str]:
    """The prompts that the recipe compares with."""
    lines = (PROMPTS / f"{'flux2-nano' if is_nano else 'natural'}-held-out.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def distances(name: str, bundle: Path, pairs: list[Pair]) -> str:
    """A row: the largest errors over prompts and steps, the smallest cosine, the mean PSNR."""
    from PIL import Image

    found, psnrs = [], []
    for record, picture in pairs:
        found.append(json.loads(checked(script("replay", bundle, record)).splitlines()[-1]))
        if picture:
            psnrs.append(psnr(np.asarray(Image.open(picture)) / 255, np.load(record)["image"]))
    text, velocity = max(one["text"] for one in found), max(max(one["velocity"]) for one in found)
    cosine = min(min(one["cosine"]) for one in found)
    decibels = f"{np.mean(psnrs):.1f}" if psnrs else "none"
    return f"| {name} | {len(pairs)} | {text:.4f} | {velocity:.4f} | {cosine:.5f} | {decibels} |"


def depth(place: Place) -> None:
    """Peaks of every stage at several depths of the same widths."""
    depths = place.options.depths.split(",")
    for widths in place.options.all_widths.split(","):
        runs: list[Run] = []
        before: Path | None = None
        for blocks in depths:
            double, _, single = blocks.partition("+")
            shape = Shape(widths, int(double), int(single), place.options.text_layers or LEAST_LAYERS[widths])
            checkpoint = place.checkpoint(shape, before)
            if before:
                shutil.rmtree(before)
            before = checkpoint
            tell(f"build of {shape.name}")
            out = place.work / f"depth-{checkpoint.name}" / "bundle"
            runs.append(place.build(place.recipe(checkpoint), out, place.options.memory))
            shutil.rmtree(out.parent)
            if runs[-1].status:
                raise SystemExit(ended(runs[-1]))
        if before:
            shutil.rmtree(before)
        print(f"### {widths}'s widths at {' and '.join(depths)} blocks, in {in_words(place.options.memory)}\n")
        print(depth_table(depths, runs), flush=True)


def depth_table(depths: list[str], runs: list[Run]) -> str:
    """Each stage's most memory by depth, and which of them need more at the largest."""
    head = [f"{what}, {blocks}" for what in ("s", "held, GiB", "resident, GiB") for blocks in depths]
    lines = [f"| stage | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    rows = [shown_stages(run.stages) for run in runs]
    growing = []
    for same in zip(*rows, strict=True):
        cells = [f"{stage.seconds:.1f}" for stage in same]
        cells += [f"{stage.held / GIB:.2f}" for stage in same]
        cells += [f"{stage.resident / GIB:.2f}" for stage in same]
        lines.append(f"| {same[0].title} | {' | '.join(cells)} |")
        if same[-1].held > 1.05 * same[0].held + 64 * 2**20:
            growing.append(same[0].title)
    verdict = f"more memory with depth: {', '.join(growing)}" if growing else "no stage holds more memory with depth"
    return "\n".join([*lines, "", f"{verdict[0].upper()}{verdict[1:]} (5 % and 64 MiB are not counted).", ""])


def script(
    what: str, source: Path, record: Path, prompt: str = "", size: int = 0, text: int = 0, seed: int = 0
) -> list[str]:
    """The command line of real_size_image.py."""
    command = [sys.executable, str(HERE / "real_size_image.py"), what, str(source), str(record)]
    if what == "replay":
        return command
    command += ["--prompt", prompt, "--size", str(size), "--steps", str(STEPS), "--text-length", str(text)]
    return [*command, "--seed", str(seed)]


def memory_of_machine() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    main()
