"""An image on a CPU as a command, from nothing to the file: `fluxrt generate` beside a script of diffusers, in one run.

    fluxc build recipes/flux2-nano.yaml
    python benchmarks/cpu_image.py artifacts/flux2-nano-nvfp4 models/flux2-nano

BUNDLE and CHECKPOINT are a model compiled and as published; the size, steps and guidance are the bundle's. Each contender is a
command that starts a process, makes an image and ends; commands take turns, medians of `--turns`. *To the first image*: seconds
on the clock and of CPU time of the whole command, from files in the page cache, or with `--cold` from files that are not (the
Python packages stay). *The next one*: seconds in a process that has made one already. *Memory*: the most that the process had
resident, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu_step import PROMPT, cpu_name, instructions

TEXT_LAYERS = (9, 18, 27)
"""Of klein, which flux2-nano has too."""
TORCH = {"diffusers, fp32": "float32", "diffusers, bf16": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", type=int, help="side in pixels; by default the bundle's first size")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--cold", action="store_true", help="from files that are not in the page cache, without a second image"
    )
    parser.add_argument("--only", default="", help="contenders that match this; the first is compared with")
    parser.add_argument("--second", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sampling = json.loads((options.bundle / "bundle.json").read_text())["sampling"]
    size = (options.size, options.size) if options.size else tuple(sampling["sizes"][0])
    if options.second:
        name, picture = options.second
        print(json.dumps(images_of(name, options, sampling, size, Path(picture))))
        return
    targets = [t["name"] for t in json.loads((options.bundle / "bundle.json").read_text())["targets"]]
    names = [*TORCH, *(f"fluxrt, {target}" for target in targets if "gpu" not in target)]
    names = [name for name in names if re.search(options.only, name)]
    first: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    following: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="cpu-image-") as folder:
        picture = Path(folder) / "image.png"
        for _ in range(options.turns):
            for name in list(names):
                if options.cold:
                    evict(options.checkpoint if name in TORCH else options.bundle)
                found = command_of(name, options, sampling, size, picture)
                if found is None:
                    names.remove(name)
                    continue
                first[name].append(found)
                if options.cold:
                    continue
                again = [sys.executable, __file__, str(options.bundle), str(options.checkpoint), "--second", name]
                again += [str(picture), *(["--size", str(options.size)] if options.size else [])]
                output = subprocess.run(again, check=True, capture_output=True, text=True).stdout
                following[name].append(json.loads(output.splitlines()[-1]))
    steps = f"{sampling['steps']} steps, guidance {sampling['guidance']:g}"
    state = "files not in the page cache" if options.cold else "files in the page cache"
    print(f"{options.bundle.name}, {size[0]}x{size[1]} pixels, {steps}; {cpu_name()}; {instructions()}; {state}\n")
    columns = "command", "to the first image, s", f"x {names[0]}", "CPU s", "the next one, s", "memory, MiB"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    medians = {name: [statistics.median(values) for values in zip(*first[name], strict=True)] for name in names}
    for name in names:
        clock, used, peak = medians[name]
        ratio = medians[names[0]][0] / clock
        next_one = f"{statistics.median(following[name]):.2f}" if following[name] else ""
        print(f"| {name} | {clock:.2f} | {ratio:.1f} | {used:.2f} | {next_one} | {peak:.0f} |")


def evict(folder: Path) -> None:
    """Let the page cache drop the files below `folder`."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def command_of(
    name: str, options: argparse.Namespace, sampling: dict[str, Any], size: tuple[int, ...], picture: Path
) -> tuple[float, float, float] | None:
    """(seconds on the clock, of CPU time, peak MiB) of a command that makes one image; None where it fails."""
    if name in TORCH:
        command = [sys.executable, "-c", SCRIPT, str(options.checkpoint), TORCH[name], str(picture)]
        command += [str(size[0]), str(size[1]), str(sampling["steps"]), str(sampling["guidance"])]
        command.append(str(text_length(options.bundle)))
    else:
        command = [sys.executable, "-m", "fluxrt", "generate", str(options.bundle), "--target", name.partition(", ")[2]]
        command += ["--prompt", PROMPT, "--seed", "7", "--size", f"{size[0]}x{size[1]}", "--out", str(picture)]
    picture.unlink(missing_ok=True)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    clock = time.perf_counter() - began
    if status or not picture.exists():
        assert process.stderr
        print(f"{name} did not run: {process.stderr.read().strip()[-300:]}", file=sys.stderr)
        return None
    return clock, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def text_length(bundle: Path) -> int:
    """Tokens that prompts are padded to."""
    return int(json.loads((bundle / "bundle.json").read_text())["prompting"]["length"])


SCRIPT = f"""
import sys
import torch
from diffusers import Flux2KleinPipeline
source, dtype, picture, height, width, steps, guidance, length = sys.argv[1:]
pipeline = Flux2KleinPipeline.from_pretrained(source, torch_dtype=getattr(torch, dtype), local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
image = pipeline(
    prompt={PROMPT!r}, height=int(height), width=int(width), num_inference_steps=int(steps), guidance_scale=float(guidance),
    max_sequence_length=int(length), text_encoder_out_layers={TEXT_LAYERS}, generator=torch.Generator().manual_seed(7),
).images[0]
image.save(picture)
"""


def images_of(
    name: str, options: argparse.Namespace, sampling: dict[str, Any], size: tuple[int, ...], picture: Path
) -> float:
    """Seconds for an image after another in the same process."""
    if name in TORCH:
        import torch
        from diffusers import Flux2KleinPipeline

        dtype = getattr(torch, TORCH[name])
        pipeline = Flux2KleinPipeline.from_pretrained(options.checkpoint, torch_dtype=dtype, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)

        def image(seed: int) -> Any:
            how = {"num_inference_steps": sampling["steps"], "guidance_scale": sampling["guidance"]}
            how |= {"height": size[0], "width": size[1], "max_sequence_length": text_length(options.bundle)}
            how |= {"text_encoder_out_layers": TEXT_LAYERS}
            return pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(seed), **how).images[0]
    else:
        import fluxrt

        loaded = fluxrt.load(options.bundle, target=name.partition(", ")[2])

        def image(seed: int) -> Any:
            return loaded(PROMPT, seed=seed, size=size).images[0]

    image(1)
    began = time.perf_counter()
    image(2).save(picture)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
