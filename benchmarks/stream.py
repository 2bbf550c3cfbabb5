"""Quantizing a whole checkpoint from disk to disk, beside `cp` of the same file: time, and peak memory by the kernel's count.

    python benchmarks/stream.py                     # klein 4B's transformer, 7.8 GB; needs 20 GB of disk
    python benchmarks/stream.py --single-blocks 2   # the same, smaller
    python benchmarks/stream.py --shards 4          # the source in four files

Makes a checkpoint of random bf16 weights whose largest magnitudes are those of FLUX.2-dev (medians by kind of layer of the
scales NVIDIA published with its FP8 checkpoint), runs each contender in a process of its own, and removes everything.
Before every run the source is dropped from the page cache and written files are synchronised. fluxc's time includes the
start of Python, the errors of every layer's weight and output, and the final fsync; that of `cp` is given without and with one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cpu_step import cpu_name

from fluxc.base.safetensors import read_header
from fluxc.calibrate.records import ROWS
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import KLEIN_4B
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.writer import write_weights
from fluxc.recipe.structs import ComponentPrecision

WEIGHT_AMAX = {
    "attn.to_q": 0.142,
    "attn.to_k": 0.177,
    "attn.to_v": 0.129,
    "attn.to_out.0": 0.117,
    "attn.add_q_proj": 0.114,
    "attn.add_k_proj": 0.137,
    "attn.add_v_proj": 0.081,
    "attn.to_add_out": 0.120,
    "ff.linear_in": 0.141,
    "ff.linear_out": 0.168,
    "ff_context.linear_in": 0.149,
    "ff_context.linear_out": 0.184,
    "attn.to_qkv_mlp_proj": 0.242,
    "attn.to_out": 0.174,
}
INPUT_AMAX = 30.0
PRESET = "modelopt-flux2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single-blocks", type=int, default=KLEIN_4B["num_single_layers"])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--quantize", nargs=3, metavar=("SOURCE", "OUT", "SCALES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = KLEIN_4B | {"num_single_layers": options.single_blocks}
    if options.quantize:
        quantize(Path(options.quantize[0]), Path(options.quantize[1]), options.quantize[2], config)
        return
    work = Path(tempfile.mkdtemp(prefix="fluxc-stream-", dir=options.folder))
    try:
        files = make_checkpoint(work / "source", config, options.shards)
        race(work, files, config, options)
    finally:
        shutil.rmtree(work)


def quantize(source: Path, out: Path, scales: str, config: dict) -> None:
    """What the measured process does: every tensor of `source`'s files, planned with the preset, into `out`."""
    tensors = {n: ref for file in sorted(source.iterdir()) for n, ref in read_header(file).items()}
    plan = precision_plan(
        "transformer", Flux2Transformer.read(config).linears, ComponentPrecision("nvfp4", preset=PRESET)
    )
    generator = np.random.default_rng(1)
    inputs = {n: generator.standard_normal((ROWS, n), dtype=np.float32) for n in {e.layer.in_features for e in plan}}
    rows = {entry.layer.name: inputs[entry.layer.in_features] for entry in plan}
    write_weights(out, tensors, plan, dict.fromkeys(rows, INPUT_AMAX), scales=scales, input_rows=rows.get)


def make_checkpoint(folder: Path, config: dict, shards: int) -> list[Path]:
    """Random bf16 weights in `shards` safetensors files: stretches of one Gaussian pool, scaled to each layer's amax."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    pool = generator.standard_normal(1 << 24, dtype=np.float32)
    pool /= np.abs(pool).max()
    tensors = Flux2Transformer.read(config).tensors
    names = list(tensors)
    share = -(-len(names) // shards)
    files = []
    for number in range(shards):
        part = {name: tensors[name] for name in names[number * share : (number + 1) * share]}
        header, position = {}, 0
        for name, shape in part.items():
            end = position + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        files.append(folder / f"transformer-{number + 1:05}-of-{shards:05}.safetensors")
        with files[-1].open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in part.items():
                kind = name.removesuffix(".weight").partition("blocks.")[2].partition(".")[2]
                patterns = to_bf16(pool * WEIGHT_AMAX.get(kind, 0.1))
                rest = int(np.prod(shape))
                while rest:
                    start = int(generator.integers(len(patterns) // 2))
                    stretch = patterns[start : start + rest]
                    file.write(stretch.tobytes())
                    rest -= len(stretch)
    return files


def to_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def race(work: Path, files: list[Path], config: dict, options: argparse.Namespace) -> None:
    nbytes = sum(file.stat().st_size for file in files)
    copies = [work / f"copy-{file.name}" for file in files]
    out = work / "quantized.safetensors"
    this = [sys.executable, __file__, "--single-blocks", str(config["num_single_layers"]), "--quantize"]
    contenders = {
        "cp": [["cp", str(a), str(b)] for a, b in zip(files, copies, strict=True)],
        **{
            f"fluxc, {scales}": [[*this, str(files[0].parent), str(out), scales]]
            for scales in ("max", "four-over-six", "mse")
        },
    }
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, commands in contenders.items():
            os.sync()
            for file in files:
                forget(file)
            start = time.perf_counter()
            for command in commands:
                peaks[name] = max(peaks.get(name, 0), run(command))
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            made = copies if name == "cp" else [out]
            for file in made:
                synchronize(file)
            if name == "cp":
                seconds.setdefault("cp and fsync", []).append(time.perf_counter() - start)
                peaks["cp and fsync"] = peaks[name]
            sizes[name] = sum(file.stat().st_size for file in made)
            for file in made:
                file.unlink()
    sizes["cp and fsync"] = sizes["cp"]
    print(
        f"{cpu_name()}, {platform.system()}, {os.cpu_count()} cores; {nbytes / 1e9:.2f} GB of bf16 in {len(files)} file(s)"
    )
    print(f"medians of {options.rounds} rounds\n")
    print("| contender | seconds | of cp | GB/s read | GB written | peak memory, MiB |\n|---|---|---|---|---|---|")
    base = statistics.median(seconds["cp"])
    for name, times in seconds.items():
        median = statistics.median(times)
        row = (f"{median:.1f}", f"{median / base:.2f}x", f"{nbytes / 1e9 / median:.2f}", f"{sizes[name] / 1e9:.2f}")
        print(f"| {name} | {' | '.join(row)} | {peaks[name] / 1024:.0f} |")


def run(command: list[str]) -> int:
    """Run `command`; its peak resident memory in KiB, mapped pages included, as the kernel last gave it (VmHWM)."""
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmHWM:" in status:
            peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    return peak


def forget(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def synchronize(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    main()
