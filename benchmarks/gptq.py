"""Solving one weight (`rounding: gptq`) beside modelopt's GPTQ, rounding to the nearest, and a copy of it: time and error.

    python benchmarks/gptq.py                        # the shapes of klein 4B, without modelopt; then one it can do on a CPU
    python benchmarks/gptq.py --threads 1

Inputs are correlated, with some channels six times larger. *Error*: of the layer's output on other inputs of the kind,
relative, root mean square. fluxc's time is that of the factor and of the columns, given apart; a factor serves all layers of a
fusion group. modelopt's functions are those its `gptq` calls, with its own rounding of NVFP4 on a CPU, under block scales of
the weight as it was; they round the whole weight for every column, so only a small weight is given to them. Contenders take
turns; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from cpu_step import cpu_name

from fluxc.formats import cpu
from fluxc.formats.gptq import factor, solve
from fluxc.recipe.structs import Scales

KLEIN = {
    "attn.to_out": (3072, 3072),
    "ff.linear_in": (18432, 3072),
    "ff.linear_out": (3072, 9216),
    "single: to_qkv_mlp_proj": (27648, 3072),
    "single: to_out": (3072, 12288),
}
SMALL = (1024, 1024)
"""[out, in] of what modelopt is given too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{cpu_name()}, {options.threads} threads\n")
    print(
        "| layer | [out, in] | copy, s | nearest, s | factor, s | columns, s | ns a weight and core | GFLOP/s of the factor |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in KLEIN.items():
        weight, x, _ = problem(shape, 2 * shape[1])
        moments = x.T @ x
        del x
        times = race(ours(weight, moments), options.rounds)
        per = 1e9 * times["columns"] * options.threads / weight.size
        rate = 2 / 3 * shape[1] ** 3 / times["factor"] / 1e9
        figures = [f"{times[what]:.2f}" for what in ("copy", "nearest", "factor", "columns")]
        print(f"| {name} | {shape} | {' | '.join(figures)} | {per:.0f} | {rate:.0f} |", flush=True)
    print(f"\n{SMALL}\n\n| what | seconds | error |\n|---|---|---|")
    weight, x, other = problem(SMALL, 4 * SMALL[1])
    for name, make in contenders(weight, x).items():
        began = time.perf_counter()
        found = make()
        took = time.perf_counter() - began
        error = np.linalg.norm(other @ (weight - found).T) / np.linalg.norm(other @ weight.T)
        print(f"| {name} | {took:.2f} | {error:.4f} |", flush=True)


def problem(shape: tuple[int, int], tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight fp32 [out, in], inputs to solve it against [tokens, in], and some to judge by."""
    rng = np.random.default_rng(0)
    columns = shape[1]
    weight = rng.standard_normal(shape, np.float32) / np.float32(columns**0.5)
    mixing = rng.standard_normal((columns // 4, columns), np.float32) / np.float32((columns // 4) ** 0.5)
    x = rng.standard_normal((tokens + 256, columns // 4), np.float32) @ mixing
    x += np.float32(0.3) * rng.standard_normal(x.shape, np.float32)
    x[:, ::17] *= 6
    return weight, x[:tokens], x[tokens:]


def scale_of(weight: np.ndarray, scales: Scales) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Patterns, largest magnitudes of blocks, and the tensor scale."""
    patterns = weight.view(np.uint32)
    amax = cpu.block_amax(patterns, "F32")
    return patterns, amax, cpu.joint_tensor_scale([(patterns, "F32")], cpu.largest(amax, "F32"), "nvfp4", scales)


def ours(weight: np.ndarray, moments: np.ndarray) -> dict[str, Callable[[], object]]:
    patterns, amax, scale = scale_of(weight, "mse")
    upper = factor(moments)
    target = np.empty_like(weight)
    return {
        "copy": lambda: np.copyto(target, weight),
        "nearest": lambda: cpu.nvfp4(patterns, "F32", amax, scale, "mse"),
        "factor": lambda: factor(moments),
        "columns": lambda: solve(weight, upper, scale, "mse"),
    }


def race(makes: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after a turn that warms up."""
    times: dict[str, list[float]] = {name: [] for name in makes}
    for turn in range(rounds + 1):
        for name, make in makes.items():
            began = time.perf_counter()
            make()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(took) for name, took in times.items()}


def contenders(weight: np.ndarray, x: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """What gives a rounded weight fp32 of `weight`, by name."""

    def nearest(scales: Scales) -> np.ndarray:
        patterns, amax, scale = scale_of(weight, scales)
        return cpu.nvfp4_values(cpu.nvfp4(patterns, "F32", amax, scale, scales), scale)

    def solved(scales: Scales) -> np.ndarray:
        scale = scale_of(weight, scales)[2]
        return cpu.nvfp4_values(solve(weight, factor(x.T @ x), scale, scales), scale)

    def modelopts() -> np.ndarray:
        from modelopt.torch.quantization.qtensor import NVFP4QTensor
        from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update

        given = torch.from_numpy(weight.copy())
        scale = torch.tensor(scale_of(weight, "max")[2])
        scales = NVFP4QTensor.get_weights_scaling_factor(given, 16, scale)[0]

        def rounded(now: torch.Tensor) -> torch.Tensor:
            stored, *_ = NVFP4QTensor.quantize(now, 16, scales, scale)
            return stored.dequantize(dtype=torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16})

        moments = torch.from_numpy(x.T @ x)
        gptq_blockwise_update(given, compute_hessian_inverse(moments, given, 0.01), 128, rounded)
        return given.numpy()

    found: dict[str, Callable[[], np.ndarray]] = {"copy": lambda: weight.copy()}
    for scales in ("max", "mse"):
        found[f"fluxc, nearest, {scales}"] = lambda scales=scales: nearest(scales)
        found[f"fluxc, gptq, {scales}"] = lambda scales=scales: solved(scales)
    return found | {"modelopt, gptq, max": modelopts}


if __name__ == "__main__":
    main()
