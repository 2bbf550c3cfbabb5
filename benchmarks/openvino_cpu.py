"""A step of klein 4B's width on a CPU: OpenVINO in fp32, bf16 and int8 beside ONNX Runtime, with NVFP4 weights.

    python benchmarks/openvino_cpu.py                  # one double-stream and two single-stream blocks, 256 image tokens
    python benchmarks/openvino_cpu.py --blocks 5 20    # the whole transformer of klein 4B; 3 GB of disk

Weights are random, of a normal distribution, quantized as a build does. Every row is a process of its own, which makes the
graph as fluxrt does and runs it, once and then `--runs` times; seconds are CPU time of all threads, medians. The error is that
of the residual against ONNX Runtime's in fp32, relative.
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
from types import SimpleNamespace
from typing import Any

import numpy as np
from cpu_memory import KINDS, TEXT_TOKENS, neutral_graph
from cpu_step import cpu_name, peak_mib

from fluxrt.manifest import dimension_size
from fluxrt.sharding import sizes_of

ROWS = ("onnxruntime", "openvino exact", "openvino bf16", "openvino int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--side", type=int, default=256, help="image side in pixels")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        row, folder, side = options.row
        print(json.dumps(measure(row, Path(folder), int(side), options.runs)))
        return
    print(f"{cpu_name()}; {options.blocks} blocks, {options.side}x{options.side}, {TEXT_TOKENS} text tokens\n")
    columns = "engine", "made in, CPU s", "a run, CPU s", "peak memory, MiB", "relative error"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory(prefix="openvino-cpu-") as folder:
        write_graphs(Path(folder), options)
        for row in ROWS:
            command = [sys.executable, __file__, "--row", row, folder, str(options.side), "--runs", str(options.runs)]
            f = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            off = "" if row == ROWS[0] else f"{error(Path(folder), row):.1e}"
            print(f"| {row} | {f['made']:.1f} | {f['run']:.2f} | {f['peak']:.0f} | {off} |", flush=True)


def write_graphs(folder: Path, options: argparse.Namespace) -> None:
    """The body lowered for both engines, and one weights file."""
    from fluxc.base.safetensors import read_header
    from fluxc.graph.bind import argument_names, bind
    from fluxc.quantize.plan import precision_plan
    from fluxc.recipe.structs import ComponentPrecision
    from fluxc.targets.onnxruntime import lower as for_onnxruntime
    from fluxc.targets.openvino import lower as for_openvino

    neutral, shapes, linears = neutral_graph("transformer", options)
    plan = {e.layer.name: e for e in precision_plan("transformer", linears, ComponentPrecision("nvfp4"))}
    arguments = argument_names(neutral)
    wanted = {value.name for value in neutral.graph.input} - arguments
    write_weights(folder / "weights.safetensors", {n: s for n, s in shapes.items() if n in wanted})
    refs = read_header(folder / "weights.safetensors")
    stored = {name: ref.dtype for name, ref in refs.items()}
    for name, module in (("onnxruntime", for_onnxruntime), ("openvino", for_openvino)):
        lowered = module.lower(neutral, arguments, stored, plan)
        bind(lowered, arguments, refs)
        (folder / f"{name}.onnx").write_bytes(lowered.SerializeToString())


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Matrices in NVFP4, vectors of ones in bf16."""
    import ml_dtypes
    import torch
    from safetensors.torch import save_file

    from fluxc.formats import nvfp4

    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        dense = (rng.standard_normal(shape, np.float32) * shape[1] ** -0.5).astype(ml_dtypes.bfloat16)
        coded = nvfp4.quantize(torch.from_numpy(dense.view(np.int16)).view(torch.bfloat16))
        tensors |= {name: coded.codes, f"{name}_scale": coded.block_scales, f"{name}_scale_2": coded.tensor_scale}
    save_file(tensors, path)


def measure(row: str, folder: Path, side: int, runs: int) -> dict[str, float]:
    """Seconds of CPU time and peak memory of one engine; its result is left in `folder`."""
    engine, _, compute = row.partition(" ")
    began = time.process_time()
    made = opened(folder / f"{engine}.onnx", compute)
    seconds = {"made": time.process_time() - began}
    sizes = sizes_of(1, (side // 16, side // 16))
    rng, feeds = np.random.default_rng(1), {}
    for name, kind, shape in made.inputs:
        size = [dimension_size(dimension, sizes) for dimension in shape]
        feeds[name] = rng.standard_normal(size).astype(KINDS[kind])
    taken = []
    for _ in range(runs + 1):
        began = time.process_time()
        result = made.run(feeds)
        taken.append(time.process_time() - began)
    np.save(folder / f"{row}.npy", result)
    return seconds | {"run": statistics.median(taken[1:]), "peak": peak_mib()}


def opened(path: Path, compute: str) -> Any:
    """The graph's inputs, and a function that runs it, as the backend of either engine makes it."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    ports = [
        (v.name, "float32", [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in graph.input
    ]
    if not compute:
        from fluxrt.backends.onnxruntime import open_session

        session = open_session(str(path), None, has_arena=True)
        return SimpleNamespace(inputs=ports, run=lambda feeds: session.run(None, feeds)[0])
    from fluxrt.backends.openvino_device import settings, settle
    from fluxrt.backends.openvino_target import load_library
    from fluxrt.backends.openvino_weights import int8_rows, keep_compressed

    core = load_library().Core()
    settled = settle(core, "CPU", compute)
    assert not settled.notes, settled.notes
    model = core.read_model(str(path))
    keep_compressed(model)
    if settled.int8:
        int8_rows(model, {node.name for node in graph.node if node.op_type == "MatMul"}, core)
    request = core.compile_model(model, "CPU", settings(core, settled, "latency", None)[0]).create_infer_request()

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        request.infer(feeds)
        return request.get_output_tensor(0).data

    return SimpleNamespace(inputs=ports, run=run)


def error(folder: Path, row: str) -> float:
    """Relative to ONNX Runtime's result."""
    exact, found = np.load(folder / f"{ROWS[0]}.npy"), np.load(folder / f"{row}.npy")
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


if __name__ == "__main__":
    main()
