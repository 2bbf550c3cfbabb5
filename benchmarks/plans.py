"""TensorRT-RTX plans of a whole FLUX.2 transformer, built without a GPU: how large, how long, how much memory.

    python benchmarks/plans.py                        # klein 4B, klein 9B and dev bound, klein 4B baked
    python benchmarks/plans.py --model dev
    python benchmarks/plans.py --model klein-4b --baked --memory-gib 16      # needs 3 GB of disk

Every model in a process of its own; memory is the peak the kernel counted (VmHWM), before building and with it. Bound plans
hold code alone and need shapes only. Baked plans hold the weights, here random ones in ModelOpt layout.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cpu_step import cpu_name

from fluxc.base.memory import memory_peak
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import MODELS
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.quantize.writer import planned_tensors
from fluxc.recipe.structs import ComponentPrecision
from fluxc.recipe.targets import TensorRTRtxTarget
from fluxrt.sharding import sizes_of

PRESET = "modelopt-flux2"
TEXT_LENGTH, TOKENS = 512, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one model (default: the published table)")
    parser.add_argument("--baked", action="store_true", help="weights inside the plans")
    parser.add_argument("--memory-gib", type=float, default=16.0, help="memory for building baked plans")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.baked, options.memory_gib)))
        return
    cases = [(options.model, options.baked)] if options.model else [*((m, False) for m in MODELS), ("klein-4b", True)]
    import tensorrt_rtx

    print(
        f"{cpu_name()}, {os.cpu_count()} cores; TensorRT-RTX {tensorrt_rtx.__version__}; {TOKENS} image tokens, ",
        end="",
    )
    print(f"{TEXT_LENGTH} text tokens, compute capability 12.0 and 12.1, preset {PRESET}\n")
    print(
        "| model | weights | plans | size, MB | trace, s | build and audit, s | peak memory, GiB | of it before building |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model, baked in cases:
        arguments = ["--one", "--model", model, "--memory-gib", str(options.memory_gib)] + ["--baked"] * baked
        run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{model}: {run.stderr[-2000:]}")
        r = json.loads(run.stdout.splitlines()[-1])
        print(
            f"| {model} | {'baked' if baked else 'bound'} | {r['plans']} | {r['bytes'] / 1e6:.1f} | {r['trace']:.1f} | "
            f"{r['build']:.2f} | {r['peak']:.2f} | {r['before']:.2f} |"
        )
        print(f"  {model}: {r['audit']}", file=sys.stderr)


def measure(model: str, baked: bool, memory_gib: float) -> dict[str, Any]:
    """Trace, cut, build and audit the transformer's plans."""
    import torch

    from fluxc.graph.export import trace_transformer
    from fluxc.targets.tensorrt.build import build_engine, largest_segment, write_sources
    from fluxc.targets.tensorrt.cut import Component, Cutter

    config = MODELS[model]
    began = time.perf_counter()
    pieces = trace_transformer(config, TEXT_LENGTH, False, torch.bfloat16)
    traced = time.perf_counter()
    plan = precision_plan(
        "transformer", Flux2Transformer.read(config).linears, ComponentPrecision(default="nvfp4", preset=PRESET)
    )
    with tempfile.TemporaryDirectory(prefix="plans-") as scratch:
        folder = Path(scratch)
        weights = tensors_of(config, plan)
        if baked:
            file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
            file.parent.mkdir()
            write_random(file, weights)
            weights = read_header(file)
        before = peak_gib()
        start = time.perf_counter()
        target = TensorRTRtxTarget(weights="baked" if baked else "bound")
        side = int(TOKENS**0.5)
        request = sizes_of(1, (side, side)) | {"tokens": TOKENS}
        cutter = Cutter([request], False, target.name, f"engines/{target.name}")
        limit = largest_segment(memory_gib) if baked else None
        cutter.transformer(pieces, Component("transformer", weights, plan, ""), TEXT_LENGTH, limit)
        write_sources(cutter.cut, folder)
        engine = build_engine(target, cutter.cut, folder)
        took = time.perf_counter() - start
        files = [folder / str(entry.file) for entry in engine.plans.values()]
        return {
            "plans": len(files),
            "bytes": sum(file.stat().st_size for file in files),
            "trace": traced - began,
            "build": took,
            "peak": peak_gib(),
            "before": before,
            "audit": {
                name: [found["gemms"], found["attentions"], found["kernels"], found["copied_bytes"], found["faults"]]
                for name, found in engine.audit.items()
            },
        }


def tensors_of(config: dict[str, Any], plan: list[LayerPlan]) -> dict[str, TensorRef]:
    """The tensors a weights file of this model would hold under `plan`."""
    source = {
        name: TensorRef(name, "BF16", shape, Path(), 0, 2 * int(np.prod(shape)))
        for name, shape in Flux2Transformer.read(config).tensors.items()
    }
    return planned_tensors(source, plan)


def write_random(file: Path, tensors: dict[str, TensorRef]) -> None:
    """A weights file of random codes, block scales around one and small bf16 values."""
    rng = np.random.default_rng(0)
    header: dict[str, Any] = {}
    position = 0
    for name, ref in tensors.items():
        header[name] = {"dtype": ref.dtype, "shape": list(ref.shape), "data_offsets": [position, position + ref.nbytes]}
        position += ref.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for ref in tensors.values():
            if ref.dtype == "F32":
                data = np.full(ref.nbytes // 4, 0.01, np.float32).tobytes()
            elif ref.dtype == "BF16":
                data = (rng.integers(0x3C00, 0x3D00, ref.nbytes // 2, dtype=np.uint16)).tobytes()
            elif ref.dtype == "F8_E4M3":
                data = rng.integers(0x30, 0x40, ref.nbytes, dtype=np.uint8).tobytes()
            else:
                data = rng.integers(0, 256, ref.nbytes, dtype=np.uint8).tobytes()
            out.write(data)


def peak_gib() -> float:
    return memory_peak() / 2**30


if __name__ == "__main__":
    main()
