"""Finds GEMMs that give one value everywhere: what is left by a kernel of ONNX Runtime that takes its operands wrongly and says
nothing, as 8-bit MatMulNBits does with accuracy_level 4 and scales that are computed in the graph (1.32: zeros).

1. A graph is loaded in a variant, made in memory from its file: for every GEMM, the least and the most of its result are
   further results. Two numbers a GEMM come out, whatever the size; of a convolution two a channel, so that a bias is no
   difference.
2. Where they are equal, the graph is run again for those of the operands. An operand of one value explains the result, as
   does a weight that is stored as one value, such as zeros. What is stored is read from the weights file: what the graph
   unfolds of it may be what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper

from fluxc.targets.probe import Constant
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend, open_session
from fluxrt.unfold import input_names, unfold
from fluxrt.weights import component_weights

if TYPE_CHECKING:
    from fluxrt.manifest import Graph
    from fluxrt.weights import StoredTensor

GEMMS: Mapping[str, tuple[int, ...]] = {
    "Attention": (2,),
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "FusedGemm": (0, 1),
    "FusedMatMul": (0, 1),
    "Gemm": (0, 1),
    "GroupQueryAttention": (2,),
    "MatMul": (0, 1),
    "MatMulBnb4": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "MatMulNBits": (0, 1),
    "MultiHeadAttention": (2,),
    "QLinearMatMul": (0, 3),
}
"""The operators that multiply matrices, with the inputs that explain a result of one value where they have one value: either
factor; of attention the values, since it gives averages of them."""
CONVOLUTIONS = ("Conv", "ConvTranspose")
MAGNITUDES: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype(np.uint32), 0x7FFFFFFF),
    "F16": (np.dtype(np.uint16), 0x7FFF),
    "BF16": (np.dtype(np.uint16), 0x7FFF),
    "F8_E4M3": (np.dtype(np.uint8), 0x7F),
    "U8": (np.dtype(np.uint8), 0x77),
}
"""Stored values as bits, and those of their magnitudes; a byte of a weight is two E2M1 codes."""
READ_AT_ONCE = 1 << 24
"""Bytes of a stored tensor."""


class ProbingBackend(OnnxRuntimeBackend):
    """See fluxc.targets.probe.Probe; every graph is looked at when it is first run."""

    def __init__(self, *of: Any, variant: str, **how: Any) -> None:
        super().__init__(*of, **how)
        self._chosen = variant
        self._variants: dict[str, Variant] = {}
        self._constants: dict[str, list[Constant]] = {}

    def constants(self) -> list[Constant]:
        """See Probe."""
        return [one for found in self._constants.values() for one in found]

    def _variant(self, graph: str) -> Graph:
        """The variant of the graph that is looked at, where it has one and that has room."""
        described = self._described(graph)
        if self._chosen == "unsigned":
            return described.unsigned_variant or described
        faster = described.faster_variant if self._chosen == "faster" else None
        return faster if faster and described.weights in self._unfolds_once() else described

    def _unfold(self, variant: Graph) -> dict[str, np.ndarray]:
        """Rows as the variant takes them, whatever this CPU would."""
        stored = component_weights(self._bundle, variant.weights)
        return unfold(variant.unfolded, stored, self._threads, signed=self._chosen != "unsigned")

    def _content(self, graph: str, path: str) -> bytes | None:
        described = self._variant(graph)
        made = {name: entry.tensors for entry in described.unfolded for name in input_names(entry)}
        variant = Variant(graph, Path(path), made, component_weights(self._bundle, described.weights))
        self._variants[graph] = variant
        return variant.telling(variant.results)

    def _run(self, graph: str, session: Any, described: Graph) -> list[Any]:
        variant = self._variants[graph]
        if graph in self._constants:
            return super()._run(graph, session, described)
        own = [port.name for port in described.outputs]
        results = self._results(graph, session, described, [*own, *told(variant.results)])
        still = _of_one_value(variant.results, results[len(own) :])
        suspects = [gemm for gemm in variant.gemms if gemm.result.name in still]
        explained = self._constant_operands(variant, described, suspects)
        self._constants[graph] = [
            Constant(variant.graph, gemm.result.name, gemm.op, gemm.layer, still[gemm.result.name])
            for gemm in suspects
            if not any(value.name in explained for value in gemm.operands) and not variant.is_stored_as_one(gemm)
        ]
        return results[: len(own)]

    def _constant_operands(self, variant: Variant, described: Graph, suspects: list[Gemm]) -> dict[str, float]:
        operands = [value for gemm in suspects for value in gemm.operands]
        if not operands:
            return {}
        content, path = variant.telling(operands), str(variant.path)
        loaded, held = self._variant(variant.graph), self._unfolded[variant.graph]
        # What was packed is held by the session alone.
        packed = [entry for entry in loaded.unfolded if not held.keys() >= set(input_names(entry))]
        made = self._unfold(msgspec.structs.replace(loaded, unfold=tuple(packed))) if packed else {}
        constants = {name: array for name, array in made.items() if name not in held}
        session = open_session(path, self._threads, has_arena=False, content=content, constants=constants)
        return _of_one_value(operands, self._results(variant.graph, session, described, told(operands)))


@dataclass(frozen=True)
class Value:
    """A value of a graph; with `rank`, that of a convolution with so many axes, whose channels are looked at one by one."""

    name: str
    rank: int = 0


@dataclass(frozen=True)
class Gemm:
    """A node that multiplies: its result, and the operands that explain one of one value: those that depend on the graph's
    inputs, and the stored tensors that the others are made of."""

    op: str
    result: Value
    operands: tuple[Value, ...]
    stored: tuple[str, ...]

    @property
    def layer(self) -> str | None:
        """Whose weight it multiplies."""
        weights = [name for name in self.stored if name.endswith(".weight")]
        return next((name.removesuffix(".weight") for name in (*weights, *self.stored)), None)


class Variant:
    """A graph file, and what else it can be made to tell. `made` names the `stored` tensors that further inputs are made of."""

    def __init__(
        self,
        graph: str,
        path: Path,
        made: Mapping[str, tuple[str, ...]],
        stored: Mapping[str, StoredTensor],
    ) -> None:
        self.graph, self.path = graph, path
        self._made, self._tensors = made, stored
        self._content = path.read_bytes()
        model = onnx.load_from_string(self._content)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._computed = {value.name for value in model.graph.input} - set(made)
        for node in model.graph.node:
            if any(name in self._computed for name in node.input):
                self._computed.update(node.output)
        self.gemms = [self._gemm(node) for node in model.graph.node if node.op_type in GEMMS]

    @property
    def results(self) -> list[Value]:
        """Of every GEMM."""
        return [gemm.result for gemm in self.gemms]

    def telling(self, values: Iterable[Value]) -> bytes:
        """The graph with the least and the most of `values` as further results, named as `told` names them."""
        model = onnx.load_from_string(self._content)
        graph = model.graph
        for value in dict.fromkeys(values):
            axes = []
            if value.rank:
                axes = [f"{value.name}/axes"]
                numbers = [axis for axis in range(value.rank) if axis != 1]
                graph.initializer.append(helper.make_tensor(axes[0], TensorProto.INT64, [len(numbers)], numbers))
            for op, name in zip(("ReduceMin", "ReduceMax"), told([value]), strict=True):
                graph.node.append(helper.make_node(op, [value.name, *axes], [name], keepdims=0))
                graph.output.append(onnx.ValueInfoProto(name=name))
        content: bytes = model.SerializeToString()
        return content

    def is_stored_as_one(self, gemm: Gemm) -> bool:
        """Whether the weight is stored as one value, or as zeros of both signs; or one of its scales as zero."""
        tensors = sorted((self._tensors[name] for name in gemm.stored), key=lambda one: -one.nbytes)
        return any(self._is_one_value(tensor, is_scale=at > 0) for at, tensor in enumerate(tensors))

    def _gemm(self, node: onnx.NodeProto) -> Gemm:
        factors = [node.input[at] for at in GEMMS[node.op_type]]
        operands = [name for name in factors if name in self._computed]
        stored = [name for factor in factors if factor not in operands for name in self._stored(factor)]
        rank = len(self._initializers[stored[0]].dims) if stored and node.op_type in CONVOLUTIONS else 0
        # Of attention's results the first is the product; the others are what it keeps for a next call.
        result = Value(node.output[0], rank)
        return Gemm(node.op_type, result, tuple(Value(name, rank) for name in operands), tuple(stored))

    def _stored(self, value: str) -> list[str]:
        """The tensors of the weights file that `value`, which depends on no argument, is made of."""
        found, left = {value}, [value]
        while left:
            producer = self._producers.get(left.pop())
            new = [name for name in (producer.input if producer else ()) if name and name not in found]
            found.update(new)
            left += new
        known = (self._initializers.get(name) for name in sorted(found))
        stored = [tensor.name for tensor in known if tensor is not None and tensor.external_data]
        return list(dict.fromkeys([*stored, *(name for value in sorted(found) for name in self._made.get(value, ()))]))

    def _is_one_value(self, tensor: StoredTensor, is_scale: bool) -> bool:
        if tensor.dtype not in MAGNITUDES or (is_scale and tensor.dtype == "U8"):
            return False
        dtype, magnitude = MAGNITUDES[tensor.dtype]
        first, is_one, is_zero = None, not is_scale, True
        for piece in self._pieces(tensor, dtype):
            first = piece[0] if first is None else first
            is_one = is_one and bool((piece == first).all())
            is_zero = is_zero and not (piece & dtype.type(magnitude)).any()
            if not (is_one or is_zero):
                return False
        return first is not None

    def _pieces(self, tensor: StoredTensor, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
        """The bits of a stored tensor, a part at a time."""
        data = tensor.read()
        for at in range(0, tensor.nbytes, READ_AT_ONCE):
            # A copy: a tensor of a safetensors file may begin on an odd byte.
            yield np.frombuffer(data[at : at + READ_AT_ONCE].tobytes(), dtype)


def told(values: Iterable[Value]) -> list[str]:
    """The names of the least and the most of each of `values`, as results of a graph."""
    return [f"{value.name}/{which}" for value in dict.fromkeys(values) for which in ("least", "most")]


def _of_one_value(values: Iterable[Value], results: Sequence[np.ndarray]) -> dict[str, float]:
    """Those of `values` that are one value everywhere, with it; `results` are those that `told` names. A NaN equals nothing."""
    pairs = zip(dict.fromkeys(values), results[::2], results[1::2], strict=True)
    return {value.name: float(np.min(least)) for value, least, most in pairs if np.array_equal(least, most)}
