"""What OpenVINO computes in on this machine: the device, the precision it has, the settings of a compiled graph.

A device lists what it can do (OPTIMIZATION_CAPABILITIES). The CPU plugin asks the processor for that list, and its kernels may
be held to less (ONEDNN_MAX_CPU_ISA); a product of 4-bit weights in a precision that has no kernel then comes back empty,
without an error. So a small product is computed first, and compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxrt.backends.openvino_graph import multiplies_angles, read_executed
from fluxrt.backends.openvino_weights import GROUP, values_of
from fluxrt.errors import BackendError

if TYPE_CHECKING:
    import numpy as np

INT8 = "int8"
HINT = "INFERENCE_PRECISION_HINT"
"""The property that says in what a graph is computed."""
WORDS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
PRECISION = {"exact": "f32", "bf16": "bf16", "fp16": "f16", INT8: "f32", "int8-bf16": "bf16"}
CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""What a device calls it, under OPTIMIZATION_CAPABILITIES."""
ROUNDING = {"f32": 1e-4, "bf16": 0.02, "f16": 0.01}
"""The most that a product of 4-bit weights may be off in each precision, relative."""
INT8_ERROR = (1e-3, 0.1)
"""The least and the most with int8 weights and inputs: an error below says that inputs were not rounded."""


@dataclass(frozen=True)
class Settled:
    """Where and in what graphs are computed: OpenVINO's `device`, `precision` ("f32", "bf16", "f16"), whether quantized weights
    become int8, and, in sentences, what was asked for and cannot be had. `has_fp32`: whether the device computes in fp32."""

    device: str
    precision: str
    int8: bool
    notes: tuple[str, ...] = ()
    has_fp32: bool = True

    @property
    def static(self) -> bool:
        """Whether graphs are compiled for one size alone."""
        return self.device == "NPU"

    def for_graph(self, model: Any) -> Settled:
        """Where and in what this graph is computed: if its products take angles, in fp32, on the CPU if the device has none."""
        if self.precision == "f32" or not multiplies_angles(model):
            return self
        return replace(self, precision="f32", device=self.device if self.has_fp32 else "CPU", has_fp32=True)

    def __str__(self) -> str:
        return f"{self.device}, {WORDS[self.precision]}" + (", int8 weights and inputs" if self.int8 else "")


def settle(core: Any, plugin: str, compute: str) -> Settled:
    """What the target's `plugin` and `compute` come to here; BackendError where the device is missing or computes wrongly."""
    device = _find_device(core, plugin)
    able = set(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    precision, notes = PRECISION[compute], []
    if CAPABILITY[precision] not in able:
        other = "f32" if "FP32" in able else "f16"
        lacks = f"{device} has no {WORDS[precision]} of its own, as compute: {compute} asks"
        notes.append(f"{lacks}; {WORDS[other]} is used")
        precision = other
    asks_int8 = compute.startswith(INT8)
    int8 = asks_int8 and "INT8" in able
    if asks_int8 and not int8:
        notes.append(f"{device} does not compute in int8; {WORDS[precision]} is used, with weights as they are stored")
    while fault := _fault(core, device, precision, int8):
        if precision == "f32" and not int8:
            raise BackendError(f"OpenVINO computes wrongly on {device} here: {fault}; choose another --target")
        is_both = int8 and precision != "f32"
        asked = compute if is_both else INT8 if int8 else WORDS[precision]
        notes.append(f"{asked} is not usable on {device} here: {fault}; {INT8 if is_both else WORDS['f32']} is used")
        precision, int8 = "f32", is_both
    return Settled(device, precision, int8, tuple(notes), "FP32" in able)


def settings(
    core: Any, settled: Settled, performance: str, threads: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The properties graphs are compiled with, and in sentences those that this device does not know."""
    wanted: dict[str, Any] = {
        "PERFORMANCE_HINT": performance.upper(),
        "PERFORMANCE_HINT_NUM_REQUESTS": 1,
        HINT: settled.precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if settled.int8 else 0,
    }
    if settled.device == "CPU":
        # A pinned thread waits for its core while another is free.
        wanted |= {"ENABLE_CPU_PINNING": False, "NUM_STREAMS": 1}
        wanted |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    known = set(core.get_property(settled.device, "SUPPORTED_PROPERTIES"))
    missing = tuple(
        f"{settled.device} does not know the property {name}, which would be {value}"
        for name, value in wanted.items()
        if name not in known and value
    )
    return {name: value for name, value in wanted.items() if name in known}, missing


def int8_fault(core: Any, device: str, columns: int, precision: str = "f32") -> str | None:
    """What is wrong with a product of int8 weights and inputs, `columns` of them, where all else is computed in `precision`;
    None if it is as it must be."""
    return _fault(core, device, precision, True, columns)


def _find_device(core: Any, plugin: str) -> str:
    found = [name.split(".")[0] for name in core.available_devices]
    if plugin == "AUTO":
        return "GPU" if "GPU" in found else "CPU"
    if plugin not in found:
        raise BackendError(f"OpenVINO finds no {plugin} here, only {', '.join(found)}; its driver must be installed")
    return plugin


def _fault(core: Any, device: str, precision: str, int8: bool, columns: int = 256) -> str | None:
    """What is wrong with a small product, of 4-bit or int8 weights, in half a sentence; None if it is right."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 8, columns)).astype(np.float32)
    model, weight = _int8_product(rng, columns) if int8 else _e2m1_product(rng, columns)
    config = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if int8 else 0}
    known = set(core.get_property(device, "SUPPORTED_PROPERTIES"))
    try:
        if device == "NPU":
            model.reshape(list(x.shape))
        compiled = core.compile_model(model, device, {name: config[name] for name in config if name in known})
        y = compiled.create_infer_request().infer([x])[0].copy()
    except RuntimeError as error:
        return f"a product has no kernel ({str(error).strip().splitlines()[-1].partition('. ')[0]})"
    expected = x[0] @ weight.T
    if y.shape != (1, *expected.shape):
        return f"a product has shape {list(y.shape)} in place of {[1, *expected.shape]}"
    off = float(np.linalg.norm(y[0] - expected) / np.linalg.norm(expected))
    least, most = INT8_ERROR if int8 else (0.0, ROUNDING[precision])
    if not least <= off <= most:
        said = "its inputs are not rounded to int8" if off < least else "too much"
        return f"a product of {columns} values is off by {off:.1e}, {said}"
    if device != "CPU":
        return None
    (product,) = read_executed(compiled).products
    return None if product.computed_in == WORDS[precision] else f"a product is computed in {product.computed_in}"


def _int8_product(rng: np.random.Generator, columns: int) -> tuple[Any, np.ndarray]:
    """A graph with one weight [64, columns] of int8 and a scale a row, and the weight in fp32."""
    import numpy as np
    from openvino import Type
    from openvino import opset13 as ops

    codes = rng.integers(-127, 128, (64, columns)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (64, 1)).astype(np.float32)
    weight = ops.multiply(ops.convert(ops.constant(codes), Type.f32), ops.constant(scales))
    return _graph(weight, columns), codes * scales


def _e2m1_product(rng: np.random.Generator, columns: int) -> tuple[Any, np.ndarray]:
    """The same of E2M1 values with a scale for each 16."""
    import numpy as np
    from openvino import Shape, Tensor, Type, op
    from openvino import opset13 as ops

    packed = rng.integers(0, 256, (64, columns // 2)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.5, (64, columns // 16, 1)).astype(np.float32)
    blocks = [64, columns // 16, 16]
    # A tensor made from an array would not keep it alive.
    stored = Tensor(Type.f4e2m1, Shape(blocks))
    stored.data.view(np.uint8).reshape(-1)[:] = packed.reshape(-1)
    scaled = ops.multiply(ops.convert(op.Constant(stored), Type.f32), ops.constant(scales))
    weight = ops.reshape(scaled, ops.constant(np.array([64, columns])), False)
    dense = values_of("f4e2m1", packed).reshape(blocks) * scales
    return _graph(weight, columns), dense.reshape(64, columns)


def _graph(weight: Any, columns: int) -> Any:
    from openvino import Model, Type
    from openvino import opset13 as ops

    x = ops.parameter([-1, -1, columns], Type.f32)
    return Model([ops.result(ops.matmul(x, weight, False, True))], [x], "probe")
