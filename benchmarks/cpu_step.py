"""One guided denoising step on a CPU: fluxrt's onnxruntime targets beside diffusers in fp32 and bf16, in one run.

    python benchmarks/cpu_step.py                    # flux2-nano
    python benchmarks/cpu_step.py --width 1536       # a klein-shaped transformer of that width with random weights

Every contender runs in a process of its own, so that peak memory is its own, and the contenders take turns, so that a busy
moment of the machine hits them all. Times are medians over all turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "models" / "flux2-nano"
PROMPT = "a large red circle at the left on a white background"
SIGMA, NEXT_SIGMA, GUIDANCE = 0.8, 0.7, 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="random transformer of this width (a multiple of 128)")
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--side", type=int, default=64, help="image side in pixels; a token is 8 pixels (default 64)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="timed steps a turn")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        kind, place, detail = options.contender
        print(json.dumps(run_contender(kind, Path(place), detail, options.side, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = prepare(Path(folder), options)
        contenders = {
            "diffusers, torch fp32": ("diffusers", checkpoint, "float32"),
            "diffusers, torch bf16": ("diffusers", checkpoint, "bfloat16"),
            "fluxrt, NVFP4 weights": ("fluxrt", bundle, "onnxruntime"),
            "fluxrt, NVFP4 weights and activations": ("fluxrt", bundle, "onnxruntime-nvfp4"),
        }
        results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(options.turns):
            for name, (kind, place, detail) in contenders.items():
                command = [sys.executable, __file__, "--side", str(options.side), "--steps", str(options.steps)]
                command += ["--contender", kind, str(place), detail]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[name].append(json.loads(output.splitlines()[-1]))
    print_table(results, options)


def prepare(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """(checkpoint, bundle): flux2-nano, or flux2-nano with a random transformer."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe

    changes = [f"sizes=[[{options.side}, {options.side}]]", "gates={}"]
    checkpoint = NANO
    if options.width:
        checkpoint = folder / "checkpoint"
        ignored = shutil.ignore_patterns(".work", "*.py", "__pycache__", "transformer")
        shutil.copytree(NANO, checkpoint, ignore=ignored)
        write_random_transformer(checkpoint / "transformer", options.width, *options.blocks)
        changes += [f"model.source={checkpoint}", "calibration.steps=1", "sampling.steps=1"]
        changes += [
            "calibration.prompts=../tests/data/two-prompts.txt",
            "fidelity.prompts=../tests/data/two-prompts.txt",
        ]
    bundle = build(
        load_recipe(ROOT / "recipes" / "flux2-nano.yaml", tuple(changes)), folder / "bundle", StageProgress()
    )
    assert bundle is not None
    return checkpoint, bundle


def write_random_transformer(folder: Path, width: int, double: int, single: int) -> None:
    import torch
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    config = json.loads((NANO / "transformer" / "config.json").read_text())
    model = Flux2Transformer2DModel.from_config(
        {
            **config,
            "num_attention_heads": width // 128,
            "attention_head_dim": 128,
            "axes_dims_rope": [32, 32, 32, 32],
            "num_layers": double,
            "num_single_layers": single,
        }
    )
    model.to(torch.bfloat16).save_pretrained(folder)


def run_contender(kind: str, place: Path, detail: str, side: int, steps: int) -> dict[str, float]:
    began = time.perf_counter()
    step = diffusers_step(place, detail, side) if kind == "diffusers" else fluxrt_step(place, detail, side)
    step()
    ready = time.perf_counter() - began
    step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"ms": 1000 * statistics.median(times), "ready_s": ready, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Largest resident set of this process in MiB."""
    from fluxc.base.memory import memory_peak

    return memory_peak() / 2**20


def diffusers_step(checkpoint: Path, dtype: str, side: int):
    """A step as Flux2KleinPipeline takes it: two passes, guidance, Euler."""
    import torch
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    model = Flux2Transformer2DModel.from_pretrained(
        checkpoint / "transformer", torch_dtype=getattr(torch, dtype)
    ).eval()
    tokens = side // 8
    latents = torch.randn(1, tokens**2, 32, dtype=model.dtype, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 32, tokens, tokens))
    text_ids = Flux2KleinPipeline._prepare_text_ids(text[:1])

    @torch.no_grad()
    def step() -> None:
        velocity = [
            model(
                hidden_states=latents,
                encoder_hidden_states=text[row : row + 1],
                timestep=torch.tensor([SIGMA], dtype=model.dtype),
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
            for row in (0, 1)
        ]
        _ = latents + (NEXT_SIGMA - SIGMA) * (velocity[1] + GUIDANCE * (velocity[0] - velocity[1]))

    return step


def fluxrt_step(bundle: Path, target: str, side: int):
    import numpy as np

    import fluxrt
    from fluxrt.pipeline import starting_noise

    pipeline = fluxrt.load(bundle, target=target)
    grid = pipeline.grid((side, side))
    text = np.random.default_rng(1).standard_normal((2, 32, 96), dtype=np.float32)
    noise = starting_noise(0, grid[0] * grid[1], 32)[None]

    def step() -> None:
        pipeline.begin(noise, grid, GUIDANCE, text)
        pipeline.step(SIGMA, NEXT_SIGMA)

    return step


def print_table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    model = f"random, width {options.width}, {options.blocks} blocks" if options.width else "flux2-nano"
    print(
        f"{model}, {options.side}x{options.side} pixels, guidance (two branches), {cpu_name()}, {platform.system()}\n"
    )
    print("| contender | ms a step | against torch fp32 | ready after, s | peak memory, MiB |\n|---|---|---|---|---|")
    medians = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in results.items()}
    base = medians["diffusers, torch fp32"]["ms"]
    for name, row in medians.items():
        ratio = f"{base / row['ms']:.2f}x"
        print(f"| {name} | {row['ms']:.1f} | {ratio} | {row['ready_s']:.1f} | {row['peak_mib']:.0f} |")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cores = len([1 for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("processor")])
            return f"{line.partition(':')[2].strip()}, {cores} cores"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
