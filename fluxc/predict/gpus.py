"""Peak rates of GPUs as NVIDIA states them, without sparsity. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    """One GPU: dense GEMMs in FLOP/s by format (with FP32 sums), memory in bytes/s and bytes, and bytes/s that it can send
    to others; `link` names what it sends over.
    """

    name: str
    compute_capability: str
    gemms: dict[str, float]
    memory_bandwidth: float
    memory: float
    link_bandwidth: float
    link: str = "NVLink 5"


_H100 = Gpu("H100 SXM", "9.0", {"bf16": 989e12, "fp8": 1979e12}, 3.35e12, 80e9, 450e9, "NVLink 4")
_B200 = Gpu("B200", "10.0", {"bf16": 2.25e15, "fp8": 4.5e15, "nvfp4": 9e15}, 8e12, 180e9, 900e9)
GPUS = {
    "h100": _H100,
    "h200": replace(_H100, name="H200 SXM", memory_bandwidth=4.8e12, memory=141e9),
    "b200": _B200,
    "b300": replace(
        _B200,
        name="B300",
        compute_capability="10.3",
        gemms={"bf16": 2.25e15, "fp8": 4.5e15, "nvfp4": 13.125e15},
        memory=288e9,
    ),
    "gb200": replace(_B200, name="GB200", gemms={"bf16": 2.5e15, "fp8": 5e15, "nvfp4": 1e16}, memory=186e9),
    "gb300": replace(
        _B200,
        name="GB300",
        compute_capability="10.3",
        gemms={"bf16": 2.5e15, "fp8": 5e15, "nvfp4": 1.5e16},
        memory=279e9,
    ),
    "rtx-pro-6000": Gpu(
        "RTX PRO 6000 Blackwell",
        "12.0",
        {"bf16": 503e12, "fp8": 1007e12, "nvfp4": 2015e12},
        1.792e12,
        96e9,
        64e9,
        "PCIe 5.0 x16",
    ),
    "rtx-5090": Gpu(
        "RTX 5090", "12.0", {"bf16": 209.5e12, "fp8": 419e12, "nvfp4": 1676e12}, 1.792e12, 32e9, 64e9, "PCIe 5.0 x16"
    ),
}
"""By the name `--on` takes. From the data sheets of H100, H200, DGX B200 and HGX B300 (an eighth of the system; B300's
memory is the GPU's own, 288 GB), GB200 and GB300 NVL72 (a 72nd), RTX PRO 6000 Blackwell Workstation Edition, and the RTX
Blackwell architecture paper."""
