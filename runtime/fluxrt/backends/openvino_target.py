"""The manifest's entries of kind `openvino`, and what stands in the way of one on a machine."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from fluxrt.errors import BackendError
from fluxrt.install import install_extra
from fluxrt.manifest import Graph, Plan, Target

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle
    from fluxrt.machine import Machine

PACKAGE = "openvino"
DEVICES = {"CPU": "cpu", "AUTO": "cpu", "GPU": "gpu", "NPU": "npu"}
"""By device of the recipe what it counts as when a target is chosen. AUTO runs on the CPU where there is no GPU."""
HARDWARE = {"CPU": "CPU", "AUTO": "GPU of Intel, or else CPU", "GPU": "GPU of Intel", "NPU": "NPU of Intel"}


class OpenVinoTarget(Target, frozen=True, tag="openvino"):
    """Graphs by name, for OpenVINO's `plugin`. `compute` says in what they are computed: exact (fp32), bf16, fp16, or int8
    where weights are quantized, with all else in fp32 or, as int8-bf16, in bf16.

    `version` is the OpenVINO that the graphs were audited with, `audit` by graph what was found in it.
    """

    graphs: dict[str, Graph]
    plugin: Literal["CPU", "GPU", "NPU", "AUTO"] = "CPU"
    compute: Literal["exact", "bf16", "fp16", "int8", "int8-bf16"] = "exact"
    performance: Literal["latency", "throughput"] = "latency"
    version: str = ""
    audit: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def device(self) -> str:
        """What it needs."""
        return DEVICES[self.plugin]

    @property
    def activations(self) -> str:
        """Inputs of quantized layers are not rounded as an FP4 GPU rounds them."""
        return "none"

    @property
    def computed_in(self) -> str:
        """As `compute` says."""
        return "" if self.compute == "exact" else self.compute

    @property
    def parts(self) -> tuple[Graph | Plan, ...]:
        """The graphs."""
        return tuple(self.graphs.values())

    @property
    def hardware(self) -> str:
        """By OpenVINO's devices."""
        return f"{HARDWARE[self.plugin]}, with OpenVINO"

    @property
    def extra(self) -> str | None:
        """OpenVINO itself."""
        return PACKAGE

    @property
    def audited(self) -> bool | None:
        """Whether every graph was read back."""
        return all(name in self.audit for name in self.graphs)


def how_to_install() -> str:
    """What to do where OpenVINO is missing, as a clause that starts with a verb."""
    return f"run `{install_extra('fluxrt', PACKAGE)}`"


def load_library() -> Any:
    """The package openvino, which sends nothing; BackendError saying how to install it.

    Its import reports to Google Analytics, unless a file in the user's home refuses that (openvino-telemetry), and writes to
    that home. Where openvino-telemetry cannot be imported it does neither.
    """
    hidden = "openvino_telemetry"
    before = sys.modules.get(hidden)
    sys.modules[hidden] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendError(f"openvino cannot be imported ({error}); {how_to_install()}") from error
    finally:
        del sys.modules[hidden]
        if before is not None:
            sys.modules[hidden] = before
    return openvino


def obstacle(bundle: Bundle, target: OpenVinoTarget, machine: Machine) -> str | None:
    """Why `target` does not run here; OpenVINO is imported only to ask for a GPU or an NPU."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"openvino is not installed; {how_to_install()}"
    if target.device == "cpu":
        return None
    try:
        found = load_library().Core().available_devices
    except Exception as error:  # what a broken installation or driver raises has no common base class
        return f"openvino does not start: {error}"
    if any(name.split(".")[0] == target.plugin for name in found):
        return None
    return f"OpenVINO finds no {target.plugin} here, only {', '.join(found)}; its driver must be installed"
