"""A denoising step on a GPU: fluxrt's targets beside diffusers in bf16, eager, compiled, and as CUDA graphs.

    python benchmarks/gpu_step.py                     # klein 4B's shapes, random weights, 1024x1024
    python benchmarks/gpu_step.py --bundle artifacts/flux2-nano-cuda     # also: is its CUDA image the CPU's?
    python benchmarks/gpu_step.py --rtx-plan artifacts/flux2-nano-rtx-sm80/engines/tensorrt_rtx/single.plan
    python benchmarks/gpu_step.py --dry-run           # the same code on a CPU, tiny, figures without meaning

Needs torch with CUDA, onnxruntime-gpu 1.31 or later, and tensorrt-rtx-cu13 or tensorrt-cu13; what is missing is a row that says
so. TensorRT's plans are built for the GPU at hand, in NVFP4 where it multiplies in it, else in FP8 or bf16. Each contender runs
in a process of its own; a step is prologue, body and epilogue (diffusers: the transformer's forward and the Euler update),
timed until the GPU is done. Memory is what the process holds on the GPU after the last step (total minus free), which for both
allocators is their peak.

Random weights of the real shapes take as long as real ones. With --rtx-plan, a TensorRT-RTX plan is deserialized, to see
whether one built for another compute capability loads at all. The script itself has been run with --dry-run alone, where
TensorRT-RTX builds every plan, and fakes of CUDA and TensorRT (fluxc/rehearsal) run them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cpu_step import cpu_name
from plans import PRESET, tensors_of, write_random

from fluxc.models.published import MODELS
from fluxrt import manifest as format
from fluxrt.bundle import Bundle
from fluxrt.sharding import sizes_of

TEXT_LENGTH, SIGMA, NEXT_SIGMA = 512, 0.7, 0.68
TINY = {
    **MODELS["klein-4b"],
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "joint_attention_dim": 256,
}
CONTENDERS = {
    "eager": "diffusers, bf16, eager",
    "compile": "diffusers, bf16, torch.compile",
    "graphs": "diffusers, bf16, torch.compile with CUDA graphs",
    "fluxrt": "fluxrt, ONNX Runtime on CUDA, NVFP4 weights",
    "tensorrt-rtx": "fluxrt, TensorRT-RTX",
    "tensorrt-rtx-baked": "fluxrt, TensorRT-RTX, weights inside the plans",
    "tensorrt": "fluxrt, TensorRT",
    "tensorrt-baked": "fluxrt, TensorRT, weights inside the plans",
}


@dataclass(frozen=True)
class Running:
    """A contender that is ready: one step, waiting until the GPU has done it, and (free, total) bytes of the GPU; `format` is
    what Linears are in, where the contender's name does not say, and `notes` what was worked around."""

    step: Callable[[], None]
    wait: Callable[[], None]
    memory: Callable[[], tuple[int, int]]
    format: str = ""
    notes: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="klein-4b")
    parser.add_argument("--side", type=int, default=1024, help="pixels a side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--bundle", type=Path, help="a bundle with an onnxruntime target on the CPU and one on CUDA")
    parser.add_argument("--rtx-plan", type=Path, help="a TensorRT-RTX plan to load")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: to check the script")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    print(
        f"{options.model}, {options.side}x{options.side}, one branch, random weights, preset {PRESET}; {device_name(options)}\n"
    )
    print("| contender | ms a step, median | worst | against eager | memory, GiB |")
    print("|---|---|---|---|---|")
    eager, notes = None, []
    for name in options.contenders:
        run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name], capture_output=True, text=True)
        if run.returncode:
            print(f"| {CONTENDERS[name]} | failed: {run.stderr.strip().splitlines()[-1][:160]} | | | |")
            continue
        r = json.loads(run.stdout.splitlines()[-1])
        eager = r["median"] if name == "eager" else eager
        ratio = f"{eager / r['median']:.2f}x" if eager else ""
        format = f", {r['format']}" if r["format"] else ""
        print(f"| {CONTENDERS[name]}{format} | {r['median']:.2f} | {r['worst']:.2f} | {ratio} | {r['memory']:.2f} |")
        notes += [f"{CONTENDERS[name]}: {note}" for note in r["notes"]]
    print("\n".join(["", *notes]))
    if options.bundle:
        print(f"\n{compare_images(options.bundle)}")
    if options.rtx_plan:
        print(f"\n{load_plan(options.rtx_plan)}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median and worst milliseconds of a step after three to warm up, GiB held on the GPU, and the format of Linears."""
    config = TINY if options.dry_run else MODELS[options.model]
    tokens = 64 if options.dry_run else (options.side // 16) ** 2
    length = 32 if options.dry_run else TEXT_LENGTH
    device = "cpu" if options.dry_run else "cuda"
    with tempfile.TemporaryDirectory(prefix="gpu-step-") as scratch:
        if options.one == "fluxrt":
            running = on_torch(fluxrt_step(config, tokens, length, Path(scratch), device), device)
        elif options.one.startswith("tensorrt"):
            running = tensorrt_step(config, tokens, length, Path(scratch), options.one, options.dry_run)
        else:
            running = on_torch(diffusers_step(config, tokens, length, options.one, device), device)
        times = []
        for number in range(3 + options.steps):
            began = time.perf_counter()
            running.step()
            running.wait()
            if number >= 3:
                times.append(1e3 * (time.perf_counter() - began))
        free, total = running.memory()
    memory = (total - free) / 2**30
    return {
        "median": statistics.median(times),
        "worst": max(times),
        "memory": memory,
        "format": running.format,
        "notes": running.notes,
    }


def on_torch(step: Callable[[], None], device: str) -> Running:
    """Waited for, and its memory counted, by torch."""
    import torch

    if device == "cpu":
        return Running(step, lambda: None, lambda: (0, 0))
    return Running(step, torch.cuda.synchronize, torch.cuda.mem_get_info)


def diffusers_step(config: dict[str, Any], tokens: int, length: int, how: str, device: str) -> Callable[[], None]:
    import torch
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = Flux2Transformer2DModel.from_config(config).to(torch.bfloat16).eval()
    if how != "eager":
        model = torch.compile(model, mode="max-autotune" if how == "graphs" else "max-autotune-no-cudagraphs")
    side = int(tokens**0.5)
    given = {
        "hidden_states": torch.randn(1, tokens, config["in_channels"], device=device, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(
            1, length, config["joint_attention_dim"], device=device, dtype=torch.bfloat16
        ),
        "timestep": torch.full((1,), SIGMA, device=device),
        "guidance": torch.full((1,), 4.0, device=device) if config["guidance_embeds"] else None,
        "img_ids": Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 16, side, side)).to(device),
        "txt_ids": Flux2KleinPipeline._prepare_text_ids(torch.empty(1, length, 1)).to(device),
    }

    @torch.no_grad()
    def step() -> None:
        velocity = model(**given, return_dict=False)[0]
        given["hidden_states"] + (NEXT_SIGMA - SIGMA) * velocity

    return step


class Unsealed(Bundle):
    """A folder with graphs and weights and no manifest."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def checked_file(self, name: str) -> Path:
        return self.root / name


def fluxrt_step(config: dict[str, Any], tokens: int, length: int, folder: Path, device: str) -> Callable[[], None]:
    """fluxrt's own backend on graphs of this shape; on a CPU the fp32 form of them, which its provider runs."""
    import torch

    from fluxc.base.safetensors import read_header
    from fluxc.graph.compose import compose_body
    from fluxc.graph.export import trace_transformer
    from fluxc.models.flux2_transformer import Flux2Transformer
    from fluxc.quantize.plan import precision_plan
    from fluxc.recipe.structs import ComponentPrecision
    from fluxc.recipe.targets import OnnxRuntimeTarget
    from fluxc.targets.onnxruntime.build import build_graphs
    from fluxrt.backends.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaBackend

    plan = precision_plan(
        "transformer", Flux2Transformer.read(config).linears, ComponentPrecision(default="nvfp4", preset=PRESET)
    )
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    write_random(file, tensors_of(config, plan))
    pieces = trace_transformer(config, length, False, torch.bfloat16 if device == "cuda" else torch.float32)
    body = compose_body(pieces, config["num_layers"], config["num_single_layers"], length)
    graphs = {"prologue": pieces["prologue"], "body": body, "epilogue": pieces["epilogue"]}
    target = OnnxRuntimeTarget(device=device) if device == "cuda" else OnnxRuntimeTarget(compute="exact")
    built = build_graphs(
        graphs, {"transformer": read_header(file)}, {"transformer": file.name}, {"transformer": plan}, target, {}
    )
    for graph in built.values():
        for name, model in graph.files.items():
            (folder / name).write_bytes(model.SerializeToString())
    graphs_of = {name: graph.entry for name, graph in built.items()}
    entry = format.OnnxRuntimeTarget(target.name, target.activations, graphs_of, device)
    providers = (PROVIDER,) if device == "cuda" else ("CPUExecutionProvider",)
    backend = OnnxRuntimeCudaBackend(Unsealed(folder), entry, device, providers)
    rng = np.random.default_rng(0)
    backend.put("latents", rng.standard_normal((1, tokens, config["in_channels"]), dtype=np.float32))
    backend.put("text", rng.standard_normal((1, length, config["joint_attention_dim"]), dtype=np.float32))
    backend.put("columns", np.array(int(tokens**0.5)))
    backend.put("guidance", np.array(4.0, np.float32))

    def step() -> None:
        backend.put("sigma", np.array(SIGMA, np.float32))
        backend.put("next_sigma", np.array(NEXT_SIGMA, np.float32))
        backend.run(("prologue", "body", "epilogue"), {"next_latents": "latents"})

    return step


def tensorrt_step(config: dict[str, Any], tokens: int, length: int, folder: Path, name: str, dry_run: bool) -> Running:
    """fluxrt's TensorRT backend on plans of this shape, built here; on a CPU with fakes of the GPU and the library."""
    import torch

    from fluxc.base.safetensors import read_header
    from fluxc.graph.export import trace_transformer
    from fluxc.models.flux2_transformer import Flux2Transformer
    from fluxc.quantize.plan import precision_plan
    from fluxc.recipe.structs import ComponentPrecision
    from fluxc.recipe.targets import TensorRTRtxTarget, TensorRTTarget
    from fluxc.rehearsal.gpu import RTX, FakeDriver, FakeLibrary
    from fluxc.targets.tensorrt.build import build_engine, largest_segment, write_sources
    from fluxc.targets.tensorrt.cut import Component, Cutter
    from fluxc.targets.tensorrt.library import FORMATS_OF, load_library
    from fluxc.targets.tensorrt.timing import LooseFiles
    from fluxrt.backends.tensorrt import TensorRTBackend
    from fluxrt.cuda import CudaDriver, Driver

    driver: Driver = FakeDriver(RTX) if dry_run else CudaDriver()
    gpu = driver.gpu
    kind = "tensorrt_rtx" if name.startswith("tensorrt-rtx") else "tensorrt"
    module = load_library("tensorrt_rtx" if dry_run else kind)
    number_format = next((f for f in ("nvfp4", "fp8") if f in FORMATS_OF[gpu.compute_capability]), "bf16")
    options, entry_of = {
        "tensorrt_rtx": (TensorRTRtxTarget, format.TensorRTRtxTarget),
        "tensorrt": (TensorRTTarget, format.TensorRTTarget),
    }[kind]
    weights = "baked" if name.endswith("baked") else "bound"
    target = options(compute_capabilities=(gpu.compute_capability,), weights=weights)
    precision = ComponentPrecision(default=number_format, preset=PRESET)
    plan = precision_plan("transformer", Flux2Transformer.read(config).linears, precision)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    write_random(file, tensors_of(config, plan))
    side = int(tokens**0.5)
    sizes = sizes_of(1, (side, side)) | {"tokens": tokens}
    cutter = Cutter([sizes], False, target.name, f"engines/{target.name}")
    component = Component("transformer", read_header(file), plan, file.relative_to(folder).as_posix())
    limit = largest_segment(target.memory_gib) if weights == "baked" else None
    cutter.transformer(trace_transformer(config, length, False, torch.bfloat16), component, length, limit)
    write_sources(cutter.cut, folder)
    entry = entry_of(target.name, build_engine(target, cutter.cut, folder, module=module))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    loose = LooseFiles(folder, files)
    library = FakeLibrary(loose, entry, driver) if isinstance(driver, FakeDriver) else module
    backend = TensorRTBackend(loose, entry, driver, library)
    backend.prepare(sizes)
    rng = np.random.default_rng(0)
    backend.put("latents", rng.standard_normal((1, tokens, config["in_channels"]), dtype=np.float32))
    backend.put("text", rng.standard_normal((1, length, config["joint_attention_dim"]), dtype=np.float32))
    backend.put("columns", np.array(side))
    if entry.reads("guidance"):
        backend.put("guidance", np.array(4.0, np.float32))

    def step() -> None:
        backend.put("sigma", np.array(SIGMA, np.float32))
        backend.put("next_sigma", np.array(NEXT_SIGMA, np.float32))
        backend.run(("prologue", "body", "epilogue"), {"next_latents": "latents"})

    return Running(step, driver.synchronize, driver.memory, number_format.upper(), backend.notes)


def compare_images(path: Path) -> str:
    """The PSNR of an image on CUDA against the CPU's, both of one bundle's onnxruntime targets."""
    import fluxrt
    from fluxc.fidelity.metrics import psnr
    from fluxrt.bundle import open_bundle

    targets = open_bundle(path).manifest.targets
    names = [
        next(t.name for t in targets if t.kind == "onnxruntime" and t.device == device) for device in ("cpu", "cuda")
    ]
    prompt = "a small white ring at the top on a red background"
    request = fluxrt.Request(prompt, seed=7)
    images = [
        np.asarray(fluxrt.load(path, target=name).generate(request).images[0], np.float64) / 255 for name in names
    ]
    return f"{names[1]} generates {prompt!r} at {psnr(images[1], images[0]):.1f} dB of {names[0]}"


def load_plan(path: Path) -> str:
    """What TensorRT-RTX says to a plan on this GPU."""
    import tensorrt_rtx as trt

    from fluxc.targets.tensorrt.program import read_programs

    plan = path.read_bytes()
    built_for = ", ".join(read_programs(plan)[0].accelerators)
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    return (
        f"{path.name}, built for {built_for}: {'does not load' if engine is None else 'loads'} on {device_name(None)}"
    )


def device_name(options: argparse.Namespace | None) -> str:
    import torch

    if (options is not None and options.dry_run) or not torch.cuda.is_available():
        return f"dry run on {cpu_name()}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
