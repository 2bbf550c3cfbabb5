"""One denoising step on a CPU: fluxrt's targets beside torch, all with the same dequantized values, in one run.

    python benchmarks/cpu_step.py                                # klein 4B's widths, 256 image tokens; 4 GB of disk
    python benchmarks/cpu_step.py --side 256                     # 1024 image tokens
    python benchmarks/cpu_step.py --nano                         # flux2-nano
    python benchmarks/without_avx512.py python benchmarks/cpu_step.py

The model has klein 4B's transformer, 1 double- and 2 single-stream blocks of it, with random weights whose channels differ as
those of trained models do (`real_size_checkpoint.py`); text encoder and VAE are flux2-nano's, so that a token is 8 pixels.

Every contender runs in a process of its own, so that peak memory is its own, and contenders take turns, so that a busy moment
of the machine hits them all. Seconds are CPU time of all threads, medians over turns and steps. The error is that of a step's
velocity against torch's in fp32, relative.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "models" / "flux2-nano"
PROMPT = "a large red circle at the left on a white background"
SIGMA, NEXT_SIGMA = 0.8, 0.7
PIXELS = 8
TARGETS = {
    "fluxrt, exact": "{kind: onnxruntime, compute: exact}",
    "fluxrt, exact, weights as stored": "{kind: onnxruntime, compute: exact}",
    "fluxrt, int8": "{kind: onnxruntime}",
    "fluxrt, OpenVINO, exact": "{kind: openvino}",
    "fluxrt, OpenVINO, bf16": "{kind: openvino, compute: bf16}",
    "fluxrt, OpenVINO, int8": "{kind: openvino, compute: int8}",
    "fluxrt, OpenVINO, int8 and bf16": "{kind: openvino, compute: int8-bf16}",
}
TORCH = {
    "torch, fp32": "float32",
    "torch, bf16": "bfloat16",
    "torch, bf16, compiled": "bfloat16-compiled",
    "torchao, int8, compiled": "int8-compiled",
}
Step = Callable[[], np.ndarray]
"""Runs a step; the velocity [tokens, channels]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", action="store_true", help="flux2-nano in place of klein 4B's widths")
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--side", type=int, help="image side in pixels, 8 to a token (default 128, of flux2-nano 64)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--only", default="", help="contenders whose name matches this")
    parser.add_argument("--folder", type=Path, help="where the checkpoint and the bundle are kept and found again")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.side = options.side or (64 if options.nano else 128)
    if options.contender:
        name, checkpoint, bundle = options.contender
        print(json.dumps(run_contender(name, Path(checkpoint), Path(bundle), options)))
        return
    with tempfile.TemporaryDirectory(prefix="cpu-step-") as temporary:
        folder = options.folder or Path(temporary)
        checkpoint, bundle = prepare(folder, options)
        names = [name for name in (*TORCH, *TARGETS) if re.search(options.only, name)]
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.turns):
            for name in list(results):
                found = run_apart(name, checkpoint, bundle, options)
                if found is None:
                    results.pop(name)
                else:
                    results[name].append(found)
        velocities = {name: np.load(folder / f"{slug(name)}.npy") for name in results}
    print_table(results, velocities, options)


def run_apart(name: str, checkpoint: Path, bundle: Path, options: argparse.Namespace) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--side", str(options.side), "--steps", str(options.steps)]
    command += ["--nano"] * options.nano + ["--contender", name, str(checkpoint), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} did not run: {(done.stderr.strip().splitlines() or ['?'])[-1][:300]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found['s']:.2f} s", file=sys.stderr, flush=True)
    return found


def prepare(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """(a checkpoint in bf16 of the values that the bundle's NVFP4 weights stand for, the bundle)"""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe

    folder.mkdir(parents=True, exist_ok=True)
    bundle, values = folder / "bundle", folder / "values"
    if values.exists():
        return values, bundle
    targets = dict.fromkeys(TARGETS.values())
    changes = [f"targets=[{', '.join(targets)}]", f"sizes=[[{options.side}, {options.side}]]", "gates={}"]
    if not options.nano:
        source = folder / "checkpoint"
        shutil.copytree(NANO, source, ignore=shutil.ignore_patterns(".work", "*.py", "__pycache__", "transformer"))
        write_wide_transformer(source / "transformer", *options.blocks)
        prompts = "../tests/data/two-prompts.txt"
        changes += [
            f"model.source={source}",
            "text.length=512",
            "fidelity.level=none",
            "sizes=[[128, 128], [256, 256]]",
        ]
        changes += [f"calibration.prompts={prompts}", "calibration.steps=1", f"fidelity.prompts={prompts}"]
    recipe = load_recipe(ROOT / "recipes" / "flux2-nano.yaml", tuple(changes))
    assert build(recipe, bundle, StageProgress()) is not None
    write_values(bundle, values)
    return values, bundle


def write_wide_transformer(folder: Path, double: int, single: int) -> None:
    """klein 4B's transformer with so many blocks, for flux2-nano's text encoder and VAE."""
    from real_size_checkpoint import Shape, random_pieces, write_component

    from fluxc.models.flux2_transformer import Flux2Transformer

    nano = json.loads((NANO / "transformer" / "config.json").read_text())
    config = Shape("klein-4b", double, single).transformer
    config |= {name: nano[name] for name in ("in_channels", "joint_attention_dim")}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_component(folder, "transformer", Flux2Transformer.read(config).tensors, random_pieces("transformer", 0))


def write_random_transformer(folder: Path, width: int, double: int, single: int) -> None:
    """A transformer of that width as diffusers initializes it."""
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


def write_values(bundle: Path, folder: Path) -> None:
    """The transformer of `bundle` with plain weights in fp32, as diffusers saves one."""
    from safetensors.torch import load_file, save_file

    from fluxc.formats.registry import FORMATS
    from fluxrt.bundle import open_bundle

    stored = load_file(bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    plain = {}
    for layer in open_bundle(bundle).manifest.precision:
        if layer.component == "transformer" and layer.format in FORMATS:
            names = [name for name in stored if name.startswith(f"{layer.name}.") and not name.endswith(".bias")]
            parts = {name.removeprefix(f"{layer.name}."): stored.pop(name) for name in names}
            plain[f"{layer.name}.weight"] = FORMATS[layer.format].dequantize(parts).contiguous()
    plain |= {name: tensor.float() for name, tensor in stored.items()}
    (folder / "transformer").mkdir(parents=True)
    save_file(plain, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = json.loads((bundle / "transformer" / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))


def run_contender(name: str, checkpoint: Path, bundle: Path, options: argparse.Namespace) -> dict[str, float]:
    began, used = time.perf_counter(), time.process_time()
    rng = np.random.default_rng(0)
    tokens, length = (options.side // PIXELS) ** 2, 32 if options.nano else 512
    latents = rng.standard_normal((1, tokens, 32), dtype=np.float32)
    text = rng.standard_normal((1, length, 96), dtype=np.float32)
    if name in TORCH:
        step = torch_step(checkpoint, TORCH[name], latents, text)
    else:
        step = fluxrt_step(bundle, name, latents, text, options.side)
    velocity = step()
    ready = {"ready": time.perf_counter() - began, "ready_cpu": time.process_time() - used}
    np.save(bundle.parent / f"{slug(name)}.npy", velocity)
    times = []
    for _ in range(options.steps):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return {"s": statistics.median(times), "peak": peak_mib(), **ready}


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def peak_mib() -> float:
    """Largest resident set of this process in MiB."""
    from fluxc.base.memory import memory_peak

    return memory_peak() / 2**20


def torch_step(checkpoint: Path, how: str, latents: np.ndarray, text: np.ndarray) -> Step:
    """A step of diffusers' transformer."""
    import torch
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    dtype = torch.float32 if how == "float32" else torch.bfloat16
    model = Flux2Transformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype).eval()
    if how.startswith("int8"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda module, name: is_in_block(module, name))
    run: Any = torch.compile(model) if how.endswith("compiled") else model
    side = int(latents.shape[1] ** 0.5)
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 32, side, side))
    text_ids = Flux2KleinPipeline._prepare_text_ids(torch.from_numpy(text))
    given, words = torch.from_numpy(latents).to(dtype), torch.from_numpy(text).to(dtype)

    @torch.no_grad()
    def step() -> np.ndarray:
        velocity = run(
            hidden_states=given,
            encoder_hidden_states=words,
            timestep=torch.tensor([SIGMA], dtype=torch.float32),
            guidance=None,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return velocity[0].float().numpy()

    return step


def is_in_block(module: Any, name: str) -> bool:
    """Whether a module is one of the layers that the bundle stores in NVFP4."""
    return type(module).__name__ == "Linear" and "transformer_blocks." in name


def fluxrt_step(bundle: Path, name: str, latents: np.ndarray, text: np.ndarray, side: int) -> Step:
    import fluxrt
    from fluxrt.bundle import open_bundle
    from fluxrt.memory import repeatable

    targets = [target.name for target in open_bundle(bundle).manifest.targets]
    wanted = list(dict.fromkeys(TARGETS.values())).index(TARGETS[name])
    pipeline = fluxrt.load(bundle, target=targets[wanted])
    grid = pipeline.grid((side, side))

    def step() -> np.ndarray:
        # As a build computes: what is more than a gibibyte in fp32 stays as it is stored.
        with repeatable() if "as stored" in name else nullcontext():
            pipeline.begin(latents, grid, 1.0, text)
            pipeline.step(SIGMA, NEXT_SIGMA)
        velocity: np.ndarray = (pipeline.latents() - latents)[0] / (NEXT_SIGMA - SIGMA)
        return velocity

    return step


def print_table(
    results: dict[str, list[dict[str, float]]], velocities: dict[str, np.ndarray], options: argparse.Namespace
) -> None:
    double, single = options.blocks
    model = "flux2-nano" if options.nano else f"klein 4B's widths, {double} double- and {single} single-stream blocks"
    tokens = (options.side // PIXELS) ** 2
    print(f"{model}, {tokens} image tokens; {cpu_name()}, {platform.system()}; {instructions()}\n")
    columns = "contender", "s a step", "x torch fp32", "error", "ready, s", "ready, CPU s", "peak memory, MiB"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    medians = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in results.items()}
    exact = velocities.get("torch, fp32")
    for name, row in medians.items():
        ratio = f"{medians['torch, fp32']['s'] / row['s']:.2f}" if "torch, fp32" in medians else ""
        off = velocities[name] - exact if exact is not None else None
        error = "" if off is None or name == "torch, fp32" else f"{np.linalg.norm(off) / np.linalg.norm(exact):.1e}"
        figures = f"{row['ready']:.1f} | {row['ready_cpu']:.1f} | {row['peak']:.0f}"
        print(f"| {name} | {row['s']:.3f} | {ratio} | {error} | {figures} |")


def instructions() -> str:
    """The instruction sets for matrices that this process sees."""
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        return "AVX2 alone (without_avx512.py)"
    known = {"avx512_vnni": "AVX512-VNNI", "avx512_bf16": "AVX512-BF16", "amx_int8": "AMX", "avx_vnni": "AVX-VNNI"}
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return ", ".join(word for flag, word in known.items() if flag in flags) or "instruction sets not known"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cores = len([1 for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("processor")])
            return f"{line.partition(':')[2].strip()}, {cores} cores"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
