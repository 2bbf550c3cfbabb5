"""What ONNX Runtime's forms of a product and of attention cost on a CPU: why fluxrt packs int8 rows, and fuses attention.

    python benchmarks/cpu_operators.py

klein 4B's widths, 1024 image and 512 text tokens, random numbers. Each form runs in a process of its own; medians of runs.
*Bound*: the int8 weight is an input, packed at each run. *Packed*: it is a constant, as fluxrt hands it over. *CPU s* is of all
threads, *GFLOP/s* for a second of that. *Memory*: by how much the peak of the process grew with the runs, weights aside.
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
from cpu_step import cpu_name, instructions, peak_mib
from onnx import TensorProto, helper

TOKENS, HEADS, HEAD = 1536, 24, 128
PRODUCTS = {"3072 to 9216": (3072, 9216), "12288 to 3072": (12288, 3072)}
ATTENTIONS = ("Attention", "MultiHeadAttention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--form", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(*options.form, options.runs)))
        return
    print(f"{TOKENS} tokens; {cpu_name()}; {instructions()}\n")
    print("| what | form | CPU s | GFLOP/s | memory, MiB |\n|---|---|---|---|---|")
    forms = [(name, form) for name in PRODUCTS for form in ("bound", "packed")]
    for name, form in (*forms, *(("attention", form) for form in ATTENTIONS)):
        command = [sys.executable, __file__, "--runs", str(options.runs), "--form", name, form]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, rate, memory = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {form} | {seconds:.3f} | {rate:.0f} | {memory:.0f} |", flush=True)


def measure(name: str, form: str, runs: int) -> tuple[float, float, float]:
    """(CPU seconds of a run, GFLOP/s, MiB by which the peak grew)"""
    from fluxrt.backends.onnxruntime import open_session

    rng = np.random.default_rng(0)
    if name in PRODUCTS:
        inner, outer = PRODUCTS[name]
        model, feeds, work = product(inner, outer), product_feeds(rng, inner, outer), 2 * TOKENS * inner * outer
    else:
        model, feeds, work = attention(form), attention_feeds(rng, form), 4 * TOKENS**2 * HEADS * HEAD
    constants = {"b": feeds.pop("b")} if form == "packed" else {}
    with tempfile.TemporaryDirectory(prefix="cpu-operators-") as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(model.SerializeToString())
        session = open_session(str(path), None, has_arena=True, constants=constants)
    constants.clear()
    before, times = peak_mib(), []
    for _ in range(runs + 1):
        began = time.process_time()
        session.run(None, feeds)
        times.append(time.process_time() - began)
    seconds = statistics.median(times[1:])
    return seconds, work / seconds / 1e9, peak_mib() - before


def product(inner: int, outer: int) -> Any:
    """A product as `compute: int8` has it."""
    value = helper.make_tensor_value_info
    inputs = [value("a", TensorProto.UINT8, [TOKENS, inner]), value("step", TensorProto.FLOAT, [])]
    inputs += [value("zero", TensorProto.UINT8, []), value("b", TensorProto.INT8, [inner, outer])]
    inputs.append(value("scale", TensorProto.FLOAT, [outer]))
    node = helper.make_node("MatMulIntegerToFloat", ["a", "b", "step", "scale", "zero"], ["y"], domain="com.microsoft")
    return model_of(node, inputs, value("y", TensorProto.FLOAT, [TOKENS, outer]))


def product_feeds(rng: np.random.Generator, inner: int, outer: int) -> dict[str, np.ndarray]:
    return {
        "a": rng.integers(0, 256, (TOKENS, inner), np.uint8),
        "step": np.array(1, np.float32),
        "zero": np.array(128, np.uint8),
        "b": rng.integers(-127, 128, (inner, outer), np.int8),
        "scale": rng.random(outer, np.float32),
    }


def attention(form: str) -> Any:
    """Attention of opset 23 on [1, heads, tokens, values], or MultiHeadAttention on [1, tokens, heads * values]."""
    value = helper.make_tensor_value_info
    shape = [1, HEADS, TOKENS, HEAD] if form == "Attention" else [1, TOKENS, HEADS * HEAD]
    how = {} if form == "Attention" else {"domain": "com.microsoft", "num_heads": HEADS}
    node = helper.make_node(form, ["q", "k", "v"], ["y"], **how)
    inputs = [value(name, TensorProto.FLOAT, shape) for name in "qkv"]
    return model_of(node, inputs, value("y", TensorProto.FLOAT, shape))


def attention_feeds(rng: np.random.Generator, form: str) -> dict[str, np.ndarray]:
    shape = (1, HEADS, TOKENS, HEAD) if form == "Attention" else (1, TOKENS, HEADS * HEAD)
    return {name: rng.standard_normal(shape, np.float32) for name in "qkv"}


def model_of(node: Any, inputs: list[Any], output: Any) -> Any:
    graph = helper.make_graph([node], "fluxc", inputs, [output])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


if __name__ == "__main__":
    main()
