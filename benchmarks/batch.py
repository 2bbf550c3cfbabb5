"""Images made one at a time and several at once on a CPU, by fluxrt and by diffusers: seconds an image, and memory.

    fluxc build recipes/flux2-nano.yaml --set "batches=[1, 2, 4, 8]" --out bundle
    python benchmarks/batch.py bundle models/flux2-nano

Every figure is of a process of its own, which makes 8 images; processes take turns, medians of all rounds are shown. What
is loaded and compiled first is not in the seconds. Memory is the most that a process had resident.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from cpu_step import cpu_name

IMAGES = 8
PROMPTS = [f"a {size} {colour} ring" for size in ("large", "small") for colour in ("red", "blue", "white", "green")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("checkpoint")
    parser.add_argument("--batches", default="1,2,4,8", help="images at once")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--child", nargs=2, metavar=("CONTENDER", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contender, batch = options.child
        seconds = CONTENDERS[contender](options, int(batch))
        print(json.dumps([seconds / IMAGES, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
        return
    kinds = [(contender, int(batch)) for contender in CONTENDERS for batch in options.batches.split(",")]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            command = [sys.executable, *sys.argv, "--child", kind[0], str(kind[1])]
            found[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"{cpu_name()}; {IMAGES} images, medians of {options.rounds} processes\n")
    print("| contender | images at once | s an image | against one at a time | memory, MiB |")
    print("|---|---|---|---|---|")
    for (contender, batch), rows in found.items():
        seconds, memory = (statistics.median(column) for column in zip(*rows, strict=True))
        alone = statistics.median(row[0] for row in found[contender, kinds[0][1]])
        print(f"| {contender} | {batch} | {seconds:.4f} | {alone / seconds:.2f}x | {memory / 2**20:.0f} |")


def by_fluxrt(options: argparse.Namespace, batch: int) -> float:
    """Seconds of the second request, with a text cache that is empty."""
    import fluxrt

    with fluxrt.load(options.bundle, target="onnxruntime", text_cache=0) as pipeline:
        for _ in range(2):
            began = time.perf_counter()
            pipeline(PROMPTS, batch=batch)
    return time.perf_counter() - began


def by_diffusers(options: argparse.Namespace, batch: int) -> float:
    """The same with the pipeline of the checkpoint's own class, in fp32, at the bundle's steps, guidance and size."""
    import diffusers
    import torch

    from fluxrt.bundle import open_bundle

    manifest = open_bundle(options.bundle).manifest
    pipeline = getattr(diffusers, manifest.family).from_pretrained(options.checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    height, width = manifest.sampling.sizes[0]
    for _ in range(2):
        began = time.perf_counter()
        for first in range(0, IMAGES, batch):
            pipeline(
                prompt=PROMPTS[first : first + batch],
                height=height,
                width=width,
                num_inference_steps=manifest.sampling.steps,
                guidance_scale=manifest.sampling.guidance,
                max_sequence_length=manifest.prompting.length,
                text_encoder_out_layers=(9, 18, 27),
            )
    return time.perf_counter() - began


CONTENDERS = {"fluxrt, NVFP4 weights": by_fluxrt, "diffusers, fp32": by_diffusers}


if __name__ == "__main__":
    main()
