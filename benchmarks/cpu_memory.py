"""Memory and time of ONNX Runtime sessions on a CPU, at klein 4B's widths with random weights, by how weights are stored.

    python benchmarks/cpu_memory.py                             # a few layers, in every format; at most 5 GiB of RAM
    python benchmarks/cpu_memory.py --layers 27 --blocks 5 20   # the whole of klein 4B, in its formats; 7 GB of disk
    python benchmarks/cpu_memory.py --side 1024                 # of a larger image, the decoder's memory above all

Each row is a process of its own, which makes one session as fluxrt does, and runs it twice. Rows that say "folded" let ONNX
Runtime compute constants of any size when the session is made, as it does by itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cpu_step import cpu_name, peak_mib

from fluxrt.sharding import sizes_of

TEXT_TOKENS = 512
MIB = 2**20
KINDS = {"float32": np.float32, "int64": np.int64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="layers of the text encoder (klein 4B reads 27)")
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--side", type=int, default=256, help="image side in pixels")
    parser.add_argument("--rows", help="run only rows whose name holds this")
    parser.add_argument("--session", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.session:
        print(
            json.dumps(
                measure(Path(options.session[0]), options.session[1] == "folded", json.loads(options.session[2]))
            )
        )
        return
    print(f"{cpu_name()}; {options.layers} layers, {options.blocks} blocks, {options.side}x{options.side}; MiB\n")
    columns = "session", "stored", "made, peak", "made", "run, peak", "made in, CPU s", "run in, CPU s"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, component, format, form, folds in rows(options):
        if options.rows and options.rows not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="cpu-memory-") as folder:
            sizes = write_graph(Path(folder), component, format, form, options)
            stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / MIB
            command = [sys.executable, __file__, "--session", folder, folds, json.dumps(sizes)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        f = json.loads(output.splitlines()[-1])
        figures = [f"{stored:.0f}", *(f"{f[key]:.0f}" for key in ("made_peak", "made", "run_peak"))]
        print(f"| {name} | {' | '.join(figures)} | {f['made_s']:.1f} | {f['run_s']:.1f} |", flush=True)


def rows(options: argparse.Namespace) -> list[tuple[str, str, str, str, str]]:
    """(name, component, format, form of NVFP4, whether constants are folded)."""
    whole = options.layers > 9
    found = [
        ("text encoder, FP8", "text_encoder", "fp8", "8-bit", ""),
        ("transformer, NVFP4, 8-bit", "transformer", "nvfp4", "8-bit", ""),
        ("transformer, NVFP4, 4-bit", "transformer", "nvfp4", "4-bit", ""),
        ("VAE decoder", "vae", "bf16", "8-bit", ""),
    ]
    if whole or options.side > 256:
        return found
    return [
        *found[:1],
        ("text encoder, NVFP4, 8-bit", "text_encoder", "nvfp4", "8-bit", ""),
        ("text encoder, bf16", "text_encoder", "bf16", "8-bit", ""),
        ("text encoder, FP8, folded", "text_encoder", "fp8", "8-bit", "folded"),
        *found[1:3],
        ("transformer, FP8", "transformer", "fp8", "8-bit", ""),
        ("transformer, bf16", "transformer", "bf16", "8-bit", ""),
        ("transformer, NVFP4, 8-bit, folded", "transformer", "nvfp4", "8-bit", "folded"),
        ("transformer, bf16, folded", "transformer", "bf16", "8-bit", "folded"),
        *found[3:],
    ]


def write_graph(folder: Path, component: str, format: str, form: str, options: argparse.Namespace) -> dict[str, int]:
    """The lowered graph of a component and its weights file; what its dimensions count."""
    from fluxc.base.safetensors import read_header
    from fluxc.graph.bind import argument_names, bind
    from fluxc.quantize.plan import precision_plan
    from fluxc.recipe.structs import ComponentPrecision
    from fluxc.targets.onnxruntime.lower import lower

    neutral, shapes, linears = neutral_graph(component, options)
    plan = {}
    if format != "bf16":
        plan = {entry.layer.name: entry for entry in precision_plan(component, linears, ComponentPrecision(format))}
    arguments = argument_names(neutral)
    wanted = {value.name for value in neutral.graph.input} - arguments
    write_random(folder / "weights.safetensors", {n: s for n, s in shapes.items() if n in wanted}, plan)
    refs = read_header(folder / "weights.safetensors")
    lowered = lower(neutral, arguments, {n: ref.dtype for n, ref in refs.items()}, plan, "none", form)
    bind(lowered, arguments, refs)
    (folder / "graph.onnx").write_bytes(lowered.SerializeToString())
    rows = options.side // 16
    return sizes_of(1, (rows, rows))


def neutral_graph(
    component: str, options: argparse.Namespace
) -> tuple[Any, dict[str, tuple[int, ...]], tuple[Any, ...]]:
    """A component's graph without weights, its tensors' shapes, and its Linears."""
    from vae_memory import VAE, decoder_of, traced

    from fluxc.families.klein import KLEIN
    from fluxc.graph.attention import attention_in_tiles
    from fluxc.graph.compose import compose_body, compose_text_encoder
    from fluxc.graph.export import trace_text_encoder, trace_transformer
    from fluxc.models.flux2_transformer import Flux2Transformer
    from fluxc.models.published import KLEIN_4B, QWEN3_4B
    from fluxc.models.qwen3 import Qwen3

    if component == "vae":
        return attention_in_tiles(traced("float32"), decoder_of(options.side).tiles), dict(VAE.tensors), ()
    if component == "text_encoder":
        pieces = trace_text_encoder(QWEN3_4B, TEXT_TOKENS, KLEIN)
        taken = tuple(options.layers * part // 3 for part in (1, 2, 3))
        encoder = Qwen3.read(QWEN3_4B)
        return compose_text_encoder(pieces, taken), encoder.tensors(options.layers), encoder.linears(options.layers)
    double, single = options.blocks
    config = {
        **KLEIN_4B,
        "axes_dims_rope": [32] * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
        "timestep_guidance_channels": 256,
    }
    config |= {"num_layers": double, "num_single_layers": single}
    pieces = trace_transformer(config, TEXT_TOKENS, False)
    model = Flux2Transformer.read(config)
    blocks = tuple(layer for layer in model.linears if "transformer_blocks." in layer.name)
    return compose_body(pieces, double, single, TEXT_TOKENS), model.tensors, blocks


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], plan: dict[str, Any]) -> None:
    """A safetensors file of random weights, quantized ones as their format stores them; written a tensor at a time."""
    parts: list[tuple[str, str, tuple[int, ...]]] = []
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        format = plan[layer].format if layer in plan else "bf16"
        if format == "nvfp4":
            out, width = shape
            parts += [(name, "U8", (out, width // 2)), (f"{name}_scale", "F8_E4M3", (out, width // 16))]
            parts += [(f"{name}_scale_2", "F32", ())]
        elif format == "fp8":
            parts += [(name, "F8_E4M3", shape), (f"{name}_scale", "F32", ())]
        else:
            parts.append((name, "BF16", shape))
    bits = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
    header, end = {}, 0
    for name, dtype, shape in parts:
        begin, end = end, end + bits[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, dtype, shape in parts:
            count = int(np.prod(shape))
            if dtype == "F32":
                file.write(np.float32(1e-3).tobytes())
            elif dtype == "BF16":
                file.write((rng.integers(0x3C00, 0x3D00, count, np.uint16)).tobytes())
            else:
                # Codes of E4M3 below its NaN; any byte is two E2M1 values.
                file.write(rng.integers(0, 0x70, count, np.uint8).tobytes())


def measure(folder: Path, folds: bool, sizes: dict[str, int]) -> dict[str, float]:
    """One session made and run twice: resident memory and its peaks, MiB, and seconds of CPU time."""
    from fluxrt.backends.onnxruntime import FOLDED, open_session
    from fluxrt.manifest import dimension_size
    from fluxrt.memory import resident

    began = time.process_time()
    session = open_session(str(folder / "graph.onnx"), None, has_arena=False, folded=None if folds else FOLDED)
    made = {"made_s": time.process_time() - began, "made_peak": peak_mib(), "made": resident() / MIB}
    rng, feeds = np.random.default_rng(1), {}
    for port in session.get_inputs():
        shape = [dimension_size(dimension, sizes) for dimension in port.shape]
        is_whole = "int64" in port.type
        feeds[port.name] = np.ones(shape, np.int64) if is_whole else rng.standard_normal(shape).astype(np.float32)
    seconds = []
    for _ in range(2):
        began = time.process_time()
        session.run(None, feeds)
        seconds.append(time.process_time() - began)
    return made | {"run_s": min(seconds), "run_peak": peak_mib()}


if __name__ == "__main__":
    main()
