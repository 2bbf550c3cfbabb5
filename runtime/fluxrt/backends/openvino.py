"""Runs a bundle's graphs with OpenVINO: one request a graph, which reads and writes the named buffers where they lie."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from fluxrt.backends.arrays import ArrayBackend
from fluxrt.backends.graphs import working_memory
from fluxrt.backends.openvino_cache import CompiledGraphs
from fluxrt.backends.openvino_device import WORDS, settings, settle
from fluxrt.backends.openvino_graph import read_executed
from fluxrt.backends.openvino_target import load_library
from fluxrt.backends.openvino_weights import int8_rows, keep_compressed, weight_bytes
from fluxrt.checks import check_threads
from fluxrt.cores import usable_cores
from fluxrt.errors import BackendError
from fluxrt.manifest import dimension_size
from fluxrt.memory import Need, available_memory, return_memory
from fluxrt.weights import component_weights, weights_files

if TYPE_CHECKING:
    import numpy as np

    from fluxrt.backends.openvino_device import Settled
    from fluxrt.backends.openvino_target import OpenVinoTarget
    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Graph


LOG = logging.getLogger("fluxrt")
HELD = {
    "f32": {"U8": 2.0, "F8_E4M3": 8.0, "BF16": 3.0, "F16": 3.0, "F32": 3.0},
    "bf16": {"U8": 2.0, "F8_E4M3": 4.0, "BF16": 2.0, "F16": 2.0, "F32": 2.0},
    "int8": {"U8": 5.0, "F8_E4M3": 3.0, "BF16": 3.0, "F16": 3.0, "F32": 3.0},
}
"""Bytes in memory for each stored byte of a weight, on the CPU: what is mapped or unfolded, and the copy that kernels read."""


class OpenVinoBackend(ArrayBackend):
    """Graphs are compiled when they first run, and kept; on an NPU for one size at a time, elsewhere for any."""

    _target: OpenVinoTarget

    def __init__(self, bundle: Bundle, target: OpenVinoTarget, threads: int | None = None) -> None:
        openvino = load_library()
        super().__init__(bundle, target)
        self._version = str(openvino.__version__).partition("-")[0]
        self._core = openvino.Core()
        self._settled = settle(self._core, target.plugin, target.compute)
        self._threads = usable_cores() if threads is None else check_threads(threads)
        _, unknown = settings(self._core, self._settled, target.performance, self._threads)
        for note in (*self._settled.notes, *unknown):
            self._note(note)
        LOG.info("target %s: OpenVINO %s on %s", target.name, self._version, self._settled)
        self._layers = {
            graph.weights.partition("/")[0]: {
                layer.name
                for layer in bundle.manifest.precision
                if layer.component == graph.weights.partition("/")[0] and layer.format != "bf16"
            }
            for graph in target.graphs.values()
        }
        self._requests: dict[str, Any] = {}
        self._computed: dict[str, Settled] = {}
        self._ran: set[str] = set()
        self._set: dict[tuple[str, str], np.ndarray] = {}

    def prepare(self, sizes: dict[str, int]) -> None:
        """Results are held against these sizes; where graphs are for one size, those of another are dropped."""
        if sizes != self._sizes and self._settled.static:
            self._drop(list(self._requests))
        super().prepare(sizes)

    def keep(self, graphs: tuple[str, ...] | None) -> None:
        """Drop other graphs, with their weights, and return their memory to the system."""
        self._drop([name for name in self._requests if graphs is not None and name not in graphs])

    def need(self, sizes: dict[str, int]) -> Need | None:
        """On the CPU what weights take as they are held there, and what computing takes; of other devices nothing is known."""
        if self._settled.device != "CPU":
            return None
        weights = 0
        for file in {graph.weights for graph in self._target.graphs.values()}:
            held = HELD["int8" if self._settled.int8 else self._precision_of(file)]
            tensors = component_weights(self._bundle, file).values()
            weights += sum(int(held.get(tensor.dtype, 1.0) * tensor.nbytes) for tensor in tensors)
        working = working_memory(self._target.graphs, self._bundle, sizes)
        return Need(weights + working, available_memory(), "memory")

    def _precision_of(self, weights: str) -> str:
        """In what the graphs on a weights file are computed; fp32 where all of them are."""
        if self._settled.precision == "f32":
            return "f32"
        graphs = [name for name, graph in self._target.graphs.items() if graph.weights == weights]
        for name in graphs:
            if name not in self._computed:
                path = str(self._bundle.checked_file(self._described(name).file))
                self._computed[name] = self._settled.for_graph(self._core.read_model(path))
        found = {self._computed[name].precision for name in graphs}
        return found.pop() if len(found) == 1 else self._settled.precision

    def close(self) -> None:
        """Drop graphs and buffers."""
        self._requests.clear()
        self._set.clear()
        super().close()

    def _run_graph(self, graph: str) -> None:
        described = self._ready(graph)
        request = self._request(graph)
        ports = described.outputs if self._sizes else ()
        results = {port.name: self._pool.take(graph, port, self._sizes, self._buffers) for port in ports}
        try:
            for port in described.inputs:
                self._set_tensor(graph, request, port.name, self._buffers[port.name])
            for name, array in results.items():
                self._set_tensor(graph, request, name, array)
            request.infer()
            found = {port.name: request.get_tensor(port.name) for port in described.outputs}
        except RuntimeError as error:
            raise BackendError(
                f"{described.file}: OpenVINO failed while it ran: {str(error).strip()}; check the bundle with "
                "`fluxc verify`, and the memory that is free"
            ) from error
        for port in described.outputs:
            self._check_shape(described.file, port, tuple(found[port.name].shape))
            self._buffers[port.name] = results[port.name] if results else found[port.name].data.copy()
        if graph not in self._ran:
            self._ran.add(graph)
            self._check_executed(graph, request)

    def _set_tensor(self, graph: str, request: Any, name: str, array: np.ndarray) -> None:
        """Give `request` the array's own memory, once."""
        import numpy as np
        from openvino import Tensor

        if self._set.get((graph, name)) is array:
            return
        shared = np.require(array, requirements=["C", "W"])
        request.set_tensor(name, Tensor(shared, shared_memory=True))
        # What was set must live as long; a copy is made anew, since its original may change.
        self._set[graph, name] = shared

    def _check_executed(self, graph: str, request: Any) -> None:
        """Note products that the CPU computes in another precision than was settled on."""
        settled = self._computed[graph]
        if settled.device != "CPU":
            return
        wanted = WORDS[settled.precision]
        others = [p for p in read_executed(request.get_compiled_model()).products if p.computed_in != wanted]
        if others:
            names = ", ".join(product.names[0] for product in others[:3]) + (" and more" if len(others) > 3 else "")
            self._note(f"graph {graph}: {names} computed in {others[0].computed_in}, not in {wanted}")

    def _request(self, graph: str) -> Any:
        if graph not in self._requests:
            began = time.perf_counter()
            path = str(self._bundle.checked_file(self._described(graph).file))
            try:
                self._requests[graph] = self._compile(graph, path).create_infer_request()
            except RuntimeError as error:
                raise BackendError(
                    f"{path}: OpenVINO {self._version} cannot load it: {str(error).strip()}; the graph was audited with "
                    f"OpenVINO {self._target.version}"
                ) from error
            LOG.debug("graph %s: loaded in %.2f s", graph, time.perf_counter() - began)
        return self._requests[graph]

    def _compile(self, graph: str, path: str) -> Any:
        """The graph compiled as the target asks, from the cache where it has one."""
        described = self._described(graph)
        model = self._core.read_model(path)
        settled = self._computed[graph] = self._settled.for_graph(model)
        weights = weight_bytes(model)
        if settled.device == "CPU":
            keep_compressed(model)
        if settled.int8:
            int8_rows(model, self._layers[described.weights.partition("/")[0]], self._core)
        if settled.static:
            sizes = {p.name: [dimension_size(d, self._sizes) for d in p.shape] for p in described.inputs}
            model.reshape(sizes)
        wanted, _ = settings(self._core, settled, self._target.performance, self._threads)
        made_from = [str(settled), str(self._sizes) if settled.static else "", repr(sorted(wanted.items()))]

        def make(cache: dict[str, Any]) -> Any:
            return self._core.compile_model(model, settled.device, {**wanted, **cache})

        known = self._digests(described)
        kept = CompiledGraphs(settled.device, self._version, self._note)
        return kept.compiled(make, weights, [*known, *made_from] if known else [])

    def _digests(self, described: Graph) -> list[str]:
        """What the manifest says of the graph's file and of those with its weights; empty while a bundle is being made."""
        root, files = self._bundle.root, self._bundle.manifest.files
        weights = [path.relative_to(root).as_posix() for path in weights_files(self._bundle, described.weights)]
        known = [files[name].sha256 for name in (described.file, *weights) if name in files]
        return known if len(known) == 1 + len(weights) else []

    def _drop(self, graphs: list[str]) -> None:
        for graph in graphs:
            del self._requests[graph]
            self._set = {key: array for key, array in self._set.items() if key[0] != graph}
        if graphs:
            return_memory()

    def _note(self, note: str) -> None:
        """Say what is not as it was asked for, once, in the log and in `notes`."""
        if note not in self.notes:
            LOG.warning("target %s: %s", self._target.name, note)
            self.notes.append(note)
