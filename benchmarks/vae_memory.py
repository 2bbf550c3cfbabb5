"""Working memory of FLUX.2's VAE decoder by image size: attention whole beside attention over query tiles. Needs no GPU.

    python benchmarks/vae_memory.py                       # TensorRT-RTX plans, and ONNX Runtime's fp32 graph by calculation
    python benchmarks/vae_memory.py --sizes 1024 2048
    python benchmarks/vae_memory.py --run 512             # decode noise on this CPU: the peak the kernel counted (VmHWM)

Plans are built from shapes, their weights bound, and state their working memory themselves. ONNX Runtime's is calculated: the
most bytes of values that are alive between two nodes in the graph's order, functions unfolded, nothing computed in place.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cpu_step import cpu_name
from onnx import TensorProto, helper, inliner, numpy_helper
from plans import peak_gib

from fluxc.base.safetensors import TensorRef
from fluxc.graph.attention import attention_apart, attention_in_tiles
from fluxc.graph.bind import argument_names
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.predict.work import decoder_working
from fluxc.recipe.targets import TensorRTRtxTarget
from fluxc.targets.decoder import Decoder
from fluxrt.sharding import sizes_of

VAE = Flux2VAE()
SMALLEST = 256
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 1536, 2048], help="pixels a side")
    parser.add_argument("--run", type=int, metavar="SIDE", help="run the fp32 graph on this CPU instead")
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return
    import tensorrt_rtx

    full, half = traced("float32"), traced("bfloat16")
    print(f"TensorRT-RTX {tensorrt_rtx.__version__}, compute capability 12.0; GiB; a range begins at {SMALLEST}\n")
    columns = [f"{what}, {part}" for what in ("one size", "range") for part in ("whole", "tiled", "predicted")]
    columns = ["size", "tiles", *columns, "ONNX Runtime, whole", "ONNX Runtime, tiled"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for side in options.sizes:
        one, ranged = decoder_of(side), Decoder(VAE, (grid(SMALLEST), grid(side)), between=True)
        row: list[float] = []
        for decoder in (one, ranged):
            row += [plan_bytes(half, decoder, 1), plan_bytes(half, decoder, decoder.tiles), decoder_working(decoder)]
        row += [alive(full, side, 1), alive(full, side, one.tiles)]
        tiles = f"{one.tiles}" if one.tiles == ranged.tiles else f"{one.tiles}, {ranged.tiles} in the range"
        print(f"| {side}x{side} | {tiles} | {' | '.join(f'{nbytes / GIB:.2f}' for nbytes in row)} |")


def grid(side: int) -> tuple[int, int]:
    return side // VAE.pixels_per_token, side // VAE.pixels_per_token


def decoder_of(side: int) -> Decoder:
    return Decoder(VAE, (grid(side),))


def traced(dtype: str) -> onnx.ModelProto:
    """The neutral graph of diffusers' default AutoencoderKLFlux2, which is FLUX.2's."""
    import torch
    from diffusers import AutoencoderKLFlux2

    from fluxc.graph.export import trace_vae_decoder

    with torch.device("meta"):
        config = {name: value for name, value in AutoencoderKLFlux2().config.items() if not name.startswith("_")}
    return trace_vae_decoder(config, getattr(torch, dtype))


def plan_bytes(model: onnx.ModelProto, decoder: Decoder, tiles: int) -> int:
    """The working memory that a plan of `model` states."""
    from fluxc.targets.tensorrt.build import build_engine, write_sources
    from fluxc.targets.tensorrt.cut import Component, Cutter

    weights = {n: TensorRef(n, "BF16", shape, Path(), 0, 2 * math.prod(shape)) for n, shape in VAE.tensors.items()}
    target = TensorRTRtxTarget(compute_capabilities=("12.0",))
    requests = [sizes_of(1, (r, c)) for r, c in decoder.grids]
    cutter = Cutter(requests, decoder.between, target.name, "engines")
    cutter.vae_decoder(model, Component("vae", weights, [], ""), tiles)
    with tempfile.TemporaryDirectory(prefix="vae-") as folder:
        write_sources(cutter.cut, Path(folder))
        return int(build_engine(target, cutter.cut, Path(folder)).audit["vae_decoder"]["working_bytes"])


def onnxruntime_graph(model: onnx.ModelProto, side: int, tiles: int) -> onnx.ModelProto:
    """The onnxruntime target's graph for one size; the attention taken apart, for its scores to be seen."""
    from fluxc.targets.onnxruntime.lower import lower

    apart = attention_apart(attention_in_tiles(model, tiles))
    for node in apart.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    lowered = lower(apart, argument_names(model), dict.fromkeys(VAE.tensors, "F32"), {})
    graph = lowered.graph
    constants = [tensor for tensor in graph.initializer if tensor.name not in VAE.tensors]
    latents = helper.make_tensor_value_info("latent_grid", TensorProto.FLOAT, [1, *grid(side), VAE.latent_channels * 4])
    weights = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in VAE.tensors.items()]
    for field, values in ((graph.input, [latents, *weights]), (graph.initializer, constants)):
        del field[:]
        field.extend(values)
    graph.output[0].type.tensor_type.ClearField("shape")
    return lowered


def alive(model: onnx.ModelProto, side: int, tiles: int) -> int:
    """The most bytes of values alive between two nodes: each from the node that gives it to the last that reads it."""
    from onnxscript import optimizer

    # Twice: it folds the arithmetic of shapes, then that of the unfolded functions.
    graph = optimizer.optimize(onnxruntime_graph(model, side, tiles))
    functions: list[Any] = [("", "GroupNormalization")]
    graph = inliner.inline_selected_functions(graph, functions, exclude=False, inline_schema_functions=True)
    inferred = onnx.shape_inference.infer_shapes(optimizer.optimize(graph), data_prop=True, strict_mode=True).graph
    nbytes = {}
    for value in (*inferred.value_info, *inferred.output):
        kind, dims = value.type.tensor_type.elem_type, [d.dim_value for d in value.type.tensor_type.shape.dim]
        assert all(dims), f"{value.name}: {dims}"
        nbytes[value.name] = math.prod(dims) * helper.tensor_dtype_to_np_dtype(kind).itemsize
    last = {name: at for at, node in enumerate(inferred.node) for name in node.input}
    last |= {value.name: len(inferred.node) for value in inferred.output}
    held: dict[str, int] = {}
    most = 0
    for at, node in enumerate(inferred.node):
        held |= {name: nbytes[name] for name in node.output if name}
        most = max(most, sum(held.values()))
        held = {name: size for name, size in held.items() if last.get(name, 0) > at}
    return most


def run(side: int) -> None:
    """Decode noise with random weights by ONNX Runtime on this CPU, in one thread, as the graph is tiled for this size."""
    import onnxruntime

    model, tiles = traced("float32"), decoder_of(side).tiles
    calculated = alive(model, side, tiles)
    graph = onnxruntime_graph(model, side, tiles)
    rng = np.random.default_rng(0)
    latents, *weights = graph.graph.input
    for value in weights:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = np.abs(rng.standard_normal(shape, np.float32)) * np.float32(0.02)
        graph.graph.initializer.append(numpy_helper.from_array(array, value.name))
        graph.graph.input.remove(value)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = [d.dim_value for d in latents.type.tensor_type.shape.dim]
    before, began = peak_gib(), time.perf_counter()
    session.run(None, {"latent_grid": rng.standard_normal(shape, np.float32)})
    took = time.perf_counter() - began
    print(
        f"{cpu_name()}; ONNX Runtime {onnxruntime.__version__}; {side}x{side} in {tiles} tiles: {took:.0f} s, peak "
        f"{peak_gib():.2f} GiB, {before:.2f} before; calculated {calculated / GIB:.2f}"
    )


if __name__ == "__main__":
    main()
