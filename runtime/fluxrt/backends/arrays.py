"""Buffers that are numpy arrays: what backends on the host have in common, whatever runs their graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from fluxrt.backends.graphs import graph_of
from fluxrt.errors import BackendError, BundleError
from fluxrt.manifest import dimension_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fluxrt.backends.graphs import HasGraphs
    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Graph, Port


class Pool:
    """Arrays for results. One that a buffer holds, or that was given to a caller, is not written to."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, str], list[np.ndarray]] = {}

    def take(self, graph: str, port: Port, sizes: Mapping[str, int], buffers: Mapping[str, Any]) -> np.ndarray:
        """An array for the result `port` of `graph`, one that is none of `buffers`."""
        import numpy as np

        own = self._arrays.setdefault((graph, port.name), [])
        held = {id(array) for array in buffers.values()}
        free = next((array for array in own if id(array) not in held), None)
        if free is None:
            free = np.empty([dimension_size(dimension, sizes) for dimension in port.shape], port.dtype)
            own.append(free)
        return free

    def give(self, array: np.ndarray) -> None:
        """Let go of `array`, which a caller has now."""
        for own in self._arrays.values():
            own[:] = [other for other in own if other is not array]

    def clear(self) -> None:
        """Let go of all."""
        self._arrays.clear()


class ArrayBackend(ABC):
    """A Backend of graphs without what runs one, `_run_graph`. Results lie in arrays that stay: a step allocates none."""

    def __init__(self, bundle: Bundle, target: HasGraphs) -> None:
        self._bundle = bundle
        self._target = target
        self._buffers: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._pool = Pool()
        self._gathered: Any = None
        self.notes: list[str] = []

    def prepare(self, sizes: dict[str, int]) -> None:
        """Results are held against these sizes."""
        if sizes != self._sizes:
            self._pool.clear()
        self._sizes = dict(sizes)

    def put(self, name: str, array: np.ndarray) -> None:
        """Fill a buffer; the array itself is kept."""
        self._buffers[name] = array

    def get(self, name: str) -> np.ndarray:
        """A buffer's content; BackendError when nothing was put or computed under this name."""
        array: np.ndarray = self._buffer(name)
        # Whoever has it may keep it.
        self._pool.give(array)
        return array

    def run(self, graphs: tuple[str, ...], feedback: Mapping[str, str] | None = None) -> None:
        """Run graphs in order; raises BackendError when one is missing, does not load, or an input is missing."""
        for graph in graphs:
            self._run_graph(graph)
        for source, target in (feedback or {}).items():
            self._buffers[target] = self._buffers.pop(source)

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The results of `graph`."""
        return tuple(port.name for port in self._described(graph).outputs)

    def save(self, name: str) -> np.ndarray:
        """A buffer's array, which none writes to again."""
        return self.get(name)

    def restore(self, name: str, saved: np.ndarray) -> None:
        """Put what `save` gave."""
        self.put(name, saved)

    def place(self, source: str, target: str, number: int) -> None:
        """The buffer itself of a single image; those of several are gathered in an array of their own."""
        import numpy as np

        images = self._sizes["images"]
        if images == 1:
            self._buffers[target] = self._buffer(source)
            return
        rows = self.save(source)
        if number == 0:
            self._gathered = np.empty((images * len(rows), *rows.shape[1:]), rows.dtype)
        self._gathered[number * len(rows) : (number + 1) * len(rows)] = rows
        if number == images - 1:
            self.restore(target, self._gathered)

    def synchronize(self) -> None:  # noqa: B027 - what is true of every backend here, no gap to be filled
        """Nothing to wait for: a graph has run when it returns."""

    def close(self) -> None:
        """Drop buffers."""
        self._pool.clear()
        self._buffers.clear()

    @abstractmethod
    def _run_graph(self, graph: str) -> None:
        """Run one graph on the buffers that its inputs name, into those that its results name."""

    def _ready(self, graph: str) -> Graph:
        """The graph, whose inputs are all there."""
        described = self._described(graph)
        missing = [port.name for port in described.inputs if port.name not in self._buffers]
        if missing:
            raise BackendError(f"graph {graph!r} needs {', '.join(missing)}, which nothing has produced")
        return described

    def _check_shape(self, file: str, port: Port, shape: tuple[int, ...]) -> None:
        """Refuse a result of another shape than the manifest says, for the sizes that were prepared."""
        wanted = tuple(dimension_size(dimension, self._sizes) for dimension in port.shape) if self._sizes else shape
        if shape != wanted:
            raise BundleError(
                f"{self._bundle.path(file)}: its result {port.name!r} has shape {list(shape)}, the manifest says "
                f"{list(port.shape)}; the bundle is damaged: copy it again or rebuild it"
            )

    def _buffer(self, name: str) -> Any:
        if name not in self._buffers:
            raise BackendError(f"nothing has produced {name!r}")
        return self._buffers[name]

    def _described(self, graph: str) -> Graph:
        return graph_of(self._bundle, self._target, graph)
