"""What decoding in tiles costs an image, and what it saves: seams by tile and overlap, memory and time at FLUX.2's widths.

    python benchmarks/vae_tiles.py                              # seams of flux2-nano's images
    python benchmarks/vae_tiles.py --memory 1024 --tiles 512    # whole and in tiles, the VAE's published widths, random weights

Seams: latents of held-out prompts by diffusers' pipeline, decoded by diffusers' decoder whole, in fluxc's tiles (equal, spread
evenly), and by diffusers' own `enable_tiling` (the last tile of a side is what is left). Memory: each row is a process of its
own, which decodes noise by fluxrt's own loop with ONNX Runtime, so often as `--runs` says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cpu_step import cpu_name, peak_mib

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "models" / "flux2-nano"
PROMPTS = ROOT / "recipes" / "prompts" / "flux2-nano-held-out.txt"
BAND = 4
"""Pixels on each side of where a tile begins or ends, where a seam would be seen."""
PIXELS, NANO_PIXELS = 16, 8
"""A side of a token, of FLUX.2 and of flux2-nano."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="height and width of flux2-nano's images")
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 96, 128, 192], help="pixels a side")
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.0, 0.125, 0.25, 0.5])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--memory", type=int, metavar="SIDE", help="measure memory and time at this size instead")
    parser.add_argument("--runs", type=int, default=1, help="of each row, with --memory")
    parser.add_argument("--decode", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        folder, side, tile, runs = options.decode
        print(json.dumps(decode(Path(folder), int(side), int(tile), int(runs))))
    elif options.memory:
        memory(options)
    else:
        seams(options)


def seams(options: argparse.Namespace) -> None:
    """The table of flux2-nano's images: each figure the mean over prompts, the largest difference of any."""
    import torch

    from fluxc.fidelity.image_tiles import decoded_in_tiles
    from fluxc.fidelity.metrics import psnr
    from fluxrt.manifest import Tiles

    torch.set_grad_enabled(False)
    vae, latents = denoised(options)

    def decoded(part: Any) -> np.ndarray:
        return np.asarray((vae.decode(part).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0))

    wholes = [decoded(one) for one in latents]
    rows, columns = (side // NANO_PIXELS for side in options.size)
    print(f"{len(latents)} images of {options.size[0]}x{options.size[1]}, PSNR to the whole in dB\n")
    figures = ("PSNR", "worst", "largest", "at seams", "elsewhere", "diffusers: PSNR", "worst", "largest")
    print(f"| tile | overlap | tiles | {' | '.join(figures)} |\n|{'---|' * (3 + len(figures))}")
    for side in options.tiles:
        tile = side // NANO_PIXELS
        for overlap in dict.fromkeys(int(np.ceil(tile * share)) for share in options.overlaps):
            tiles = Tiles((tile, tile), (overlap, overlap))
            ours = [decoded_in_tiles(decoded, one, tiles, (2, 2)) for one in latents]
            vae.enable_tiling()
            vae.tile_latent_min_size, vae.tile_sample_min_size = 2 * tile, side
            vae.tile_overlap_factor = overlap / tile
            theirs = [decoded(one) for one in latents]
            vae.disable_tiling()
            near, count = seam_bands(rows, columns, tiles)
            apart = [np.abs(one - whole).mean(-1) for one, whole in zip(ours, wholes, strict=True)]
            row = [f"{side}", f"{overlap * NANO_PIXELS}", f"{count}"]
            for found, at_seams in ((ours, True), (theirs, False)):
                values = [psnr(one, whole) for one, whole in zip(found, wholes, strict=True)]
                largest = max(np.abs(one - whole).max() for one, whole in zip(found, wholes, strict=True))
                row += [f"{np.mean(values):.1f}", f"{min(values):.1f}", f"{largest:.2f}"]
                if at_seams:
                    row += [f"{np.mean([one[mask].mean() for one in apart]):.4f}" for mask in (near, ~near)]
            print(f"| {' | '.join(row)} |", flush=True)


def denoised(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """diffusers' VAE, and what its decoder takes of every prompt."""
    import torch

    from fluxc.checkpoint.reference import Generation, generate, load_pipeline
    from fluxc.checkpoint.source import open_checkpoint

    checkpoint = open_checkpoint(str(NANO), None, ROOT)
    pipeline = load_pipeline(checkpoint, torch.float32)
    lines = [line for line in PROMPTS.read_text().splitlines() if line and not line.startswith("#")]
    taken: list[Any] = []

    def decode_and_keep(latents: Any, *given: Any, **more: Any) -> Any:
        taken.append(latents.clone())
        return decode(latents, *given, **more)

    decode, pipeline.vae.decode = pipeline.vae.decode, decode_and_keep
    for number, prompt in enumerate(lines[: options.prompts]):
        generation = Generation(tuple(options.size), 24, 1.5, 1000 + number, 32, (9, 18, 27))
        generate(pipeline, checkpoint, prompt, generation)
    pipeline.vae.decode = decode
    return pipeline.vae, taken


def seam_bands(rows: int, columns: int, tiles: Any) -> tuple[np.ndarray, int]:
    """Where pixels are within BAND of a place where a tile begins or ends, and how many tiles there are."""
    from fluxrt.tiles import first_tokens

    near, count = np.zeros((rows * NANO_PIXELS, columns * NANO_PIXELS), bool), 1
    for axis, length in enumerate((rows, columns)):
        starts = first_tokens(length, tiles.size[axis], tiles.overlap[axis])
        count *= len(starts)
        edges = {*starts[1:], *(start + tiles.size[axis] for start in starts[:-1])}
        for edge in edges:
            band = slice(edge * NANO_PIXELS - BAND, edge * NANO_PIXELS + BAND)
            near[(band, slice(None)) if axis == 0 else (slice(None), band)] = True
    return near, count


def memory(options: argparse.Namespace) -> None:
    """The table of FLUX.2's decoder on this CPU."""
    side = options.memory
    print(f"{cpu_name()}; FLUX.2's decoder, fp32, random weights, {side}x{side}; {options.runs} runs each\n")
    print("| decoded | tiles | peak above the session's, MiB | s |\n|---|---|---|---|")
    for tile in (0, *options.tiles):
        if tile >= side:
            continue
        with tempfile.TemporaryDirectory(prefix="vae-tiles-") as folder:
            write_graphs(Path(folder), tile or side)
            command = [sys.executable, __file__, "--decode", folder, str(side), str(tile), str(options.runs)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        name = f"in tiles of {tile}" if tile else "whole"
        print(f"| {name} | {found['tiles']} | {found['peak']:.0f} | {found['seconds']:.1f} |", flush=True)


def write_graphs(folder: Path, decoded: int) -> None:
    """The decoder's graph over query tiles for `decoded` pixels a side, with random weights, and the one that blends."""
    from cpu_memory import write_random
    from vae_memory import VAE, decoder_of, traced

    from fluxc.base.safetensors import read_header
    from fluxc.graph.attention import attention_in_tiles
    from fluxc.graph.bind import argument_names, bind
    from fluxc.graph.image_tiles import of_a_tile, trace_vae_blend
    from fluxc.targets.onnxruntime.lower import lower

    for name, neutral in (
        ("vae_decoder", attention_in_tiles(of_a_tile(traced("float32")), decoder_of(decoded).tiles)),
        ("vae_blend", trace_vae_blend()),
    ):
        arguments = argument_names(neutral)
        wanted = {value.name for value in neutral.graph.input} - arguments
        write_random(folder / f"{name}.safetensors", {n: s for n, s in VAE.tensors.items() if n in wanted}, {})
        refs = read_header(folder / f"{name}.safetensors")
        lowered = lower(neutral, arguments, {n: ref.dtype for n, ref in refs.items()}, {})
        bind(lowered, arguments, refs)
        (folder / f"{name}.onnx").write_bytes(lowered.SerializeToString())


class Sessions:
    """Two graphs on named buffers: what fluxrt's loop over tiles asks of a backend."""

    def __init__(self, folder: Path) -> None:
        from fluxrt.backends.onnxruntime import open_session
        from fluxrt.cores import usable_cores

        self._sessions = {
            name: open_session(str(folder / f"{name}.onnx"), usable_cores(), has_arena=True)
            for name in ("vae_decoder", "vae_blend")
        }
        self._buffers: dict[str, np.ndarray] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        self._buffers[name] = array

    def get(self, name: str) -> np.ndarray:
        return self._buffers[name]

    def run(self, graphs: tuple[str, ...], feedback: dict[str, str] | None = None) -> None:
        for graph in graphs:
            session = self._sessions[graph]
            outputs = [value.name for value in session.get_outputs()]
            results = session.run(outputs, {value.name: self._buffers[value.name] for value in session.get_inputs()})
            self._buffers.update(zip(outputs, results, strict=True))
        for source, target in (feedback or {}).items():
            self._buffers[target] = self._buffers.pop(source)


def decode(folder: Path, side: int, tile: int, runs: int) -> dict[str, float]:
    """Noise of `side` pixels a side decoded in tiles of `tile`, 0 for whole: the peak above what sessions take, and the median
    of the times."""
    from fluxrt.manifest import Tiles
    from fluxrt.tiles import decode_in_tiles, first_tokens

    sessions: Any = Sessions(folder)
    tokens, of_tile = side // PIXELS, (tile or side) // PIXELS
    tiles = Tiles((of_tile, of_tile), (-(-of_tile // 4), -(-of_tile // 4)))
    latents = np.random.default_rng(0).standard_normal((1, tokens, tokens, 128)).astype(np.float32)
    before, seconds = peak_mib(), []
    for _ in range(runs):
        began = time.perf_counter()
        image = decode_in_tiles(sessions, latents, tiles, PIXELS)
        seconds.append(time.perf_counter() - began)
        assert image.shape == (1, side, side, 3)
    count = len(first_tokens(tokens, of_tile, tiles.overlap[0])) ** 2
    return {"tiles": count, "peak": peak_mib() - before, "seconds": statistics.median(seconds)}


if __name__ == "__main__":
    main()
