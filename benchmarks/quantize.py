"""Quantizing bf16 weights to NVFP4, tensor amax included: fluxc beside its peers and a plain copy, in one run.

    python benchmarks/quantize.py                    # on the CPU, every core torch takes
    python benchmarks/quantize.py --device cuda

Contenders take turns, so that a busy moment of the machine hits them all, and repeat quick calls within a turn, so that
threads of the one before have gone to sleep; times are medians over calls, then rounds. The first turn of each, which warms
it up, is not timed: its codes and block scales are compared with fluxc's.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from cpu_step import cpu_name

from fluxc.formats import nvfp4
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import KLEIN_4B
from fluxc.recipe.structs import Scales

BASE, COPY = "fluxc max", "copy"
TURN = 0.2

Tensors = tuple[torch.Tensor, torch.Tensor]
"""Codes uint8 [out, in/2], low nibble first, and block scales float8_e4m3fn [out, in/16], row-major."""


def amax(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax()


@dataclass(frozen=True)
class Contender:
    """One way to quantize: `load` imports what it needs and returns weight -> result, which is what is timed.

    `read` turns a result and the weight's shape into `Tensors`.
    """

    package: str
    module: str
    load: Callable[[], Callable]
    read: Callable[..., Tensors]
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def fluxc(scales: Scales, reuse: bool = True) -> Callable:
    """fluxc's quantizer; with `reuse`, into memory that was touched before, as its writer does and as the copy does."""
    room: dict[torch.Size, nvfp4.Quantized] = {}

    def quantize(weight: torch.Tensor) -> nvfp4.Quantized:
        if reuse and weight.shape not in room:
            room[weight.shape] = nvfp4.empty(*weight.shape, weight.device)
        return nvfp4.quantize(weight, scales=scales, out=room.get(weight.shape))

    return quantize


def modelopt() -> Callable:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return lambda weight: NVFP4QTensor.quantize(weight, 16)


def torchao() -> Callable:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    return lambda weight: nvfp4_quantize(weight, 16, per_tensor_amax_to_scale(amax(weight)))


def diffusers() -> Callable:
    from diffusers.quantizers.bfl.utils import quantize_nvfp4

    return quantize_nvfp4


def comfy_kitchen() -> Callable:
    from comfy_kitchen import quantize_nvfp4
    from comfy_kitchen.registry import registry

    def quantize(weight: torch.Tensor) -> Tensors:
        with registry.use_backend("eager"):
            return quantize_nvfp4(weight, amax(weight).float() / (6 * 448), hi_first=False)

    return quantize


def unswizzled(result: Tensors, shape: torch.Size) -> Tensors:
    from comfy_kitchen.float_utils import from_blocked

    codes, scales = result
    return codes, from_blocked(scales.view(torch.uint8), shape[0], shape[1] // 16).view(torch.float8_e4m3fn)


def compressed_tensors() -> Callable:
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        low, high = weight.reshape(weight.shape[0], -1, 16).aminmax(dim=-1)
        global_scale = generate_gparam(low.amin(), high.amax())
        scales, _ = calculate_qparams(low, high, scheme.weights, global_scale)
        state = {"weight": weight, "weight_scale": scales, "weight_global_scale": global_scale}
        return NVFP4PackedCompressor.compress(state, scheme)

    return quantize


FLUXC = {
    name: Contender("fluxc", "fluxc", load, lambda result, shape: result[:2])
    for name, load in {
        BASE: lambda: fluxc("max"),
        "fluxc max, into new tensors": lambda: fluxc("max", reuse=False),
        "fluxc four-over-six": lambda: fluxc("four-over-six"),
        "fluxc mse": lambda: fluxc("mse"),
    }.items()
}
PEERS = {
    "modelopt": Contender("nvidia-modelopt", "modelopt", modelopt, lambda r, shape: (r[0]._quantized_data, r[1])),
    "torchao": Contender("torchao", "torchao", torchao, lambda r, shape: (r[1].view(torch.uint8), r[0])),
    "diffusers": Contender("diffusers", "diffusers", diffusers, lambda r, shape: r[:2], ("cpu",)),
    "compressed-tensors": Contender(
        "compressed-tensors",
        "compressed_tensors",
        compressed_tensors,
        lambda result, shape: (result["weight_packed"], result["weight_scale"]),
        ("cpu",),
    ),
    "comfy-kitchen, eager": Contender("comfy-kitchen", "comfy_kitchen", comfy_kitchen, unswizzled, ("cpu",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    contenders = {n: c for n, c in (FLUXC | PEERS).items() if options.device in c.devices}
    quantizers = {name: contender.load() for name, contender in contenders.items() if contender.installed}
    klein = dict.fromkeys((layer.out_features, layer.in_features) for layer in Flux2Transformer.read(KLEIN_4B).linears)
    print(machine(options.device), versions(contenders), sep="; ")
    for title, shapes in {
        "[6144, 12288]": [(6144, 12288)],
        f"klein-4B's {len(klein)} distinct layer shapes": list(klein),
    }.items():
        weights = [gaussian(shape, options.device) for shape in shapes]
        differences = compare(quantizers, contenders, weights)
        seconds = race(quantizers, weights, options.rounds)
        print_table(title, contenders, seconds, differences, sum(w.nbytes for w in weights), options.rounds)


def gaussian(shape: tuple[int, int], device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.02).to(device, torch.bfloat16)


def compare(
    quantizers: dict[str, Callable], contenders: dict[str, Contender], weights: list[torch.Tensor]
) -> dict[str, tuple[int, int]]:
    """How many codes and how many block scales of each contender differ in any bit from those of `BASE`."""
    differences = dict.fromkeys(quantizers, (0, 0))
    for weight in weights:
        ours = quantizers[BASE](weight)
        for name, quantize in quantizers.items():
            codes, scales = contenders[name].read(quantize(weight), weight.shape)
            changed = codes ^ ours.codes
            nibbles = ((changed & 15) > 0).sum() + ((changed >> 4) > 0).sum()
            blocks = (scales.view(torch.uint8) != ours.block_scales.view(torch.uint8)).sum()
            differences[name] = (differences[name][0] + nibbles.item(), differences[name][1] + blocks.item())
    return differences


def race(quantizers: dict[str, Callable], weights: list[torch.Tensor], rounds: int) -> dict[str, float]:
    """Median seconds each contender takes for all `weights`; the copy goes to memory that was touched before."""
    targets = {weight.shape: weight.clone() for weight in weights}
    runners = {**quantizers, COPY: lambda weight: targets[weight.shape].copy_(weight)}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, quantize in runners.items():
            seconds[name].append(sum(timed(quantize, weight) for weight in weights))
    return {name: statistics.median(times) for name, times in seconds.items()}


def timed(quantize: Callable, weight: torch.Tensor) -> float:
    """Median seconds of the calls that fit into TURN, or of one that does not."""
    seconds: list[float] = []
    while sum(seconds) < TURN:
        synchronize(weight)
        start = time.perf_counter()
        quantize(weight)
        synchronize(weight)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def synchronize(weight: torch.Tensor) -> None:
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


def print_table(
    title: str,
    contenders: dict[str, Contender],
    seconds: dict[str, float],
    differences: dict[str, tuple[int, int]],
    nbytes: int,
    rounds: int,
) -> None:
    print(f"\n{title}: {nbytes / 1e9:.2f} GB of bf16, medians of {rounds} rounds\n")
    print(
        "| contender | GB/s of bf16 read | fluxc is | against a copy | bits other than fluxc's |\n|---|---|---|---|---|"
    )
    for name in [*contenders, COPY]:
        if name not in seconds:
            print(f"| {name} | not installed: pip install {contenders[name].package} | | | |")
            continue
        ratios = f"{seconds[name] / seconds[BASE]:.3g}x | {seconds[COPY] / seconds[name]:.3g}x"
        print(f"| {name} | {nbytes / 1e9 / seconds[name]:.3f} | {ratios} | {difference(name, differences, nbytes)} |")


def difference(name: str, differences: dict[str, tuple[int, int]], nbytes: int) -> str:
    if name in (BASE, COPY):
        return ""
    codes, scales = differences[name]
    if not codes and not scales:
        return "none"
    return f"{codes} of {nbytes // 2} codes, {scales} of {nbytes // 32} scales"


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {platform.system()}, {torch.get_num_threads()} torch threads"


def versions(contenders: dict[str, Contender]) -> str:
    packages = dict.fromkeys(
        ["torch", *(contender.package for contender in contenders.values() if contender.installed)]
    )
    return ", ".join(f"{package} {version(package)}" for package in packages)


if __name__ == "__main__":
    main()
