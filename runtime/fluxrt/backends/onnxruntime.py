"""Runs a bundle's graphs with ONNX Runtime on the CPU.

Weights are mapped from the component's one weights file as they are stored, or made from it when a graph is loaded, and then
bound as its inputs (fluxrt.unfold).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrt.backends.arrays import ArrayBackend
from fluxrt.backends.bound import Bound
from fluxrt.backends.graphs import working_memory
from fluxrt.backends.packed import copies, give, with_constants
from fluxrt.backends.saturation import saturates
from fluxrt.checks import check_threads
from fluxrt.cores import allowed_cores, usable_cores
from fluxrt.errors import BackendError, BundleError
from fluxrt.manifest import dimension_size
from fluxrt.memory import ROOM, Need, available_memory, is_repeatable, return_memory
from fluxrt.unfold import input_names, unfold, unfolded_bytes
from fluxrt.weights import component_weights, weights_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np

    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.manifest import Exchange, Graph, OnnxRuntimeTarget, Unfold


LOG = logging.getLogger("fluxrt")
FOLDED = 1 << 20
"""Bytes of the largest constant that ONNX Runtime computes when a session is made. Weights in fp32 would take several times
what the file does, and twice as much while they are made: docs/performance.md, "Memory on a CPU"."""

NO_VNNI = (
    "this CPU has no instructions of VNNI, so that products of int8 would saturate; rows are taken as uint8, which gives the "
    "same numbers in more time"
)
LITTLE = 1 << 30
"""Bytes of unfolded weights that are no question of memory."""
SLOWER = "products take about 1.3 times as long; --memory staged needs less"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where the files of a graph's weights lie, if the graph comes from none."""


def session_options() -> Any:
    """Options of every session: nothing is printed, since what would be is raised too, and threads without work sleep.

    docs/performance.md, "How ONNX Runtime's threads wait", has what spinning would gain and cost.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    return options


def open_session(
    path: str,
    threads: int | None,
    has_arena: bool,
    folded: int | None = FOLDED,
    *,
    content: bytes | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
) -> Any:
    """A session on the CPU of the graph file at `path`; `folded` None lets ONNX Runtime fold constants of any size.

    An arena keeps what the widest layer took for the next one: faster, and too much where components take turns.
    `content` is a graph to load in place of the file's, with weights in the same folder. Inputs that `constants` names become
    constants (fluxrt.backends.packed).
    """
    import onnxruntime

    options = session_options()
    if folded is not None:
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(folded))
    options.enable_cpu_mem_arena = has_arena
    # With it the second run takes all that the first one took once more, in one piece, and the first one's stays.
    options.enable_mem_pattern = False
    if threads:
        options.intra_op_num_threads = threads
    if constants:
        content = with_constants(Path(path).read_bytes() if content is None else content, constants)
        give(options, constants)
    if content is not None:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(Path(path).parent))
    # Otherwise it prints what goes wrong and tries again.
    return onnxruntime.InferenceSession(content or path, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _default_threads() -> int | None:
    """None, which leaves it to ONNX Runtime: a thread a core, bound to it. It counts cores that a quota does not grant, so
    with a quota the number is ours."""
    usable = usable_cores()
    return usable if usable < allowed_cores() else None


class OnnxRuntimeBackend(ArrayBackend):
    """Sessions are made when a graph first runs and kept for the life of the backend; buffers are numpy arrays.

    The body of a sharded target is several graphs; `group` carries out the exchanges between them.
    """

    _target: OnnxRuntimeTarget

    def __init__(
        self, bundle: Bundle, target: OnnxRuntimeTarget, threads: int | None = None, group: Group | None = None
    ) -> None:
        super().__init__(bundle, target)
        self._threads = _default_threads() if threads is None else check_threads(threads)
        self._group = group
        self._last_uses: dict[str, list[list[str]]] = {}
        self._sessions: dict[str, Any] = {}
        self._takes_turns = False
        self._unfolded: dict[str, dict[str, np.ndarray]] = {}
        self._bound: dict[str, Bound] = {}
        self._loaded: dict[str, Graph] = {}
        self._faster: frozenset[str] | None = None

    def _run_graph(self, graph: str) -> None:
        parts = self._parts(graph)
        if parts is None:
            self._run_one(graph)
        else:
            self._run_sharded(graph, parts)

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The results of `graph`."""
        parts = self._parts(graph)
        return super().outputs(str(parts[-1]) if parts else graph)

    def _parts(self, graph: str) -> Sequence[str | Exchange] | None:
        """What a body comes to on one of several ranks; None for what is one graph."""
        return self._target.sharding.bodies.get(graph) if self._target.sharding else None

    def keep(self, graphs: tuple[str, ...] | None) -> None:
        """Drop the sessions of other graphs, with what they mapped, and return their memory to the system."""
        self._takes_turns = graphs is not None
        others = [name for name in self._sessions if graphs is not None and name.partition("-")[0] not in graphs]
        for name in others:
            for held in (self._sessions, self._loaded, self._unfolded, self._bound):
                held.pop(name, None)
        # Whether there is room to unfold is another question now.
        self._faster = None
        if others:
            return_memory()

    def need(self, sizes: dict[str, int]) -> Need | None:
        """The weights that stay in memory as they are stored, each once, what is made of others and is not made yet, and what
        computing takes; see working_memory.

        The ranks of a sharded target map the same files.
        """
        return Need(self._needed(self._target.graphs, sizes), self._free_memory(), self._where)

    def _needed(self, graphs: Iterable[str], sizes: dict[str, int]) -> int:
        described = [self._loaded.get(graph, self._target.graphs[graph]) for graph in graphs]
        weights = {file for graph in described for file in weights_files(self._bundle, graph.weights)}
        gone = {(graph.weights, name) for graph in described for one in graph.unfolded for name in one.tensors}
        stored = {entry: component_weights(self._bundle, entry) for entry in {entry for entry, _ in gone}}
        let_go = sum(stored[entry][name].nbytes for entry, name in gone if name in stored[entry])
        made = self._still_unfolded(self._target.graphs[g].unfolded for g in graphs if g not in self._unfolded)
        ranks = self._group.ranks if self._group else 1
        working = working_memory(self._target.graphs, self._bundle, sizes)
        return sum(file.stat().st_size for file in weights) - let_go + ranks * (working + made)

    _where = "memory"

    def _free_memory(self) -> int | None:
        return available_memory()

    def close(self) -> None:
        """Drop sessions and buffers."""
        for held in (self._sessions, self._loaded, self._unfolded, self._bound):
            held.clear()
        super().close()

    def _run_one(self, graph: str) -> None:
        described = self._ready(graph)
        results = self._run(graph, self._session(graph), described)
        for port, result in zip(described.outputs, results, strict=True) if self._sizes else ():
            self._check_shape(described.file, port, self._shape_of(result))
        self._buffers.update(zip((port.name for port in described.outputs), results, strict=True))

    def _run_sharded(self, body: str, parts: Sequence[str | Exchange]) -> None:
        """The parts of a body in order; what one leaves for others is dropped after its last use."""
        assert self._group is not None
        if body not in self._last_uses:
            self._last_uses[body] = self._find_last_uses(parts)
        for part, done_with in zip(parts, self._last_uses[body], strict=True):
            if isinstance(part, str):
                self._run_one(part)
            else:
                self._buffers[part.receives] = self._group.all_to_all(self._buffers[part.sends])
            for name in done_with:
                del self._buffers[name]

    def _find_last_uses(self, parts: Sequence[str | Exchange]) -> list[list[str]]:
        """For every part of a body, the buffers made in the body that no later part reads."""
        made: set[str] = set()
        last: dict[str, int] = {}
        for at, part in enumerate(parts):
            if isinstance(part, str):
                graph = self._described(part)
                reads, makes = [port.name for port in graph.inputs], [port.name for port in graph.outputs]
            else:
                reads, makes = [part.sends], [part.receives]
            last |= {name: at for name in reads if name in made}
            made.update(makes)
        return [[name for name, use in last.items() if use == at] for at in range(len(parts))]

    def _run(self, graph: str, session: Any, described: Graph) -> list[Any]:
        """The outputs of `described`, in order, from the buffers its inputs name.

        From its second run with the same sizes on a graph writes into arrays that are there already, which no buffer holds and
        nobody was given.
        """
        names = [port.name for port in described.outputs]
        if not self._sizes:
            return self._results(graph, session, described, names)
        shapes = tuple(dimension_size(d, self._sizes) for port in described.outputs for d in port.shape)
        bound = self._bound.get(graph)
        if bound is None or bound.shapes != shapes:
            self._bound[graph] = Bound(session, names, self._unfolded.get(graph, {}), shapes)
            return self._results(graph, session, described, names)
        inputs = {port.name: self._buffers[port.name] for port in described.inputs}
        results = [self._pool.take(graph, port, self._sizes, self._buffers) for port in described.outputs]
        try:
            bound.run(inputs, results)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise _failed(described, error) from error
        return results

    def _results(self, graph: str, session: Any, described: Graph, names: Sequence[str]) -> list[np.ndarray]:
        """The results `names` of a session of `graph`, or of a variant of it."""
        inputs = {port.name: self._buffers[port.name] for port in described.inputs}
        try:
            results: list[np.ndarray] = session.run(names, inputs | self._unfolded.get(graph, {}))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise _failed(described, error) from error
        return results

    def _open(self, graph: str, path: str, constants: Mapping[str, np.ndarray]) -> Any:
        """A session of the graph file at `path`, with these inputs as constants."""
        return open_session(
            path,
            self._threads,
            has_arena=not self._takes_turns,
            content=self._content(graph, path),
            constants=constants,
        )

    def _content(self, graph: str, path: str) -> bytes | None:
        """A graph that is loaded in place of the file at `path`, with its weights; None for the file itself."""
        return None

    def _shape_of(self, result: Any) -> tuple[int, ...]:
        shape: tuple[int, ...] = result.shape
        return shape

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            for name in self._loading_order(graph):
                self._load(name)
        return self._sessions[graph]

    def _loading_order(self, graph: str) -> list[str]:
        """The graphs to load when one is wanted: before it others of its component whose rows are to be packed, the largest
        first, since that takes their memory twice for a moment."""
        graphs = self._target.graphs
        described = graphs.get(graph)
        beside = [name for name, other in graphs.items() if described and other.weights == described.weights]
        packed = {name: size for name in beside if (size := _packed_bytes(graphs[name])) and name not in self._sessions}
        return [*sorted(packed.keys() - {graph}, key=lambda name: -packed[name]), graph]

    def _load(self, graph: str) -> None:
        import onnxruntime

        variant = self._variant(graph)
        path = self._bundle.checked_file(variant.file)
        began = time.perf_counter()
        try:
            made = self._unfold(variant) if variant.unfolded else {}
            unfolded = time.perf_counter()
            # Weights in fp32 would gain little, and their sums would be of another order.
            packed = {name: a for name, a in made.items() if a.itemsize == 1} if self._packs(variant) else {}
            self._sessions[graph] = self._open(graph, str(path), packed)
            self._loaded[graph] = variant
            self._unfolded[graph] = {name: array for name, array in made.items() if name not in packed}
            LOG.debug(
                "graph %s: weights made of those stored in %.2f s, and loaded in %.2f s",
                graph,
                unfolded - began,
                time.perf_counter() - unfolded,
            )
        except (BackendError, BundleError):
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}; "
                "the bundle names the version it was built with under provenance.tools"
            ) from error

    def _packs(self, variant: Graph) -> bool:
        """Whether ONNX Runtime packs a graph's int8 weights, which takes their memory once more while it loads. A build may be
        told to take less than is free, so that it packs only what is little."""
        extra = _packed_bytes(variant) * (self._group.ranks if self._group else 1)
        if not extra or not copies():
            return False
        if is_repeatable():
            return extra <= LITTLE
        free = self._free_memory()
        has_room = free is None or extra <= ROOM * free
        if not has_room:
            size = f"{extra / 2**30:.1f} GiB"
            LOG.info("%s: too little memory is free to pack its int8 weights (%s); %s", variant.file, size, SLOWER)
        return has_room

    def _unfold(self, variant: Graph) -> dict[str, np.ndarray]:
        """What is made of weights for a graph, on all of this backend's threads; what another graph holds already is shared."""
        stored = component_weights(self._bundle, variant.weights)
        forms = sorted({entry.form for entry in variant.unfolded})
        LOG.debug("graph %s computes in %s", variant.file, " and ".join(forms))
        held = {name: array for arrays in self._unfolded.values() for name, array in arrays.items()}
        missing = [entry for entry in variant.unfolded if not held.keys() >= set(input_names(entry))]
        made = held | unfold(missing, stored, self._threads, signed=not saturates())
        return {name: made[name] for entry in variant.unfolded for name in input_names(entry)}

    def _still_unfolded(self, wanted: Iterable[Iterable[Unfold]]) -> int:
        """Bytes of what is to be made of weights, each once, and is not there."""
        held = {name for arrays in self._unfolded.values() for name in arrays}
        entries = {tuple(input_names(entry)): entry for graph in wanted for entry in graph}
        return unfolded_bytes(entry for names, entry in entries.items() if not held.issuperset(names))

    def _variant(self, graph: str) -> Graph:
        """The graph as this machine computes it best: in which form, and from which file."""
        described = self._described(graph)
        unsigned = described.unsigned_variant
        if unsigned is not None and saturates():
            if NO_VNNI not in self.notes:
                self.notes.append(NO_VNNI)
            return unsigned
        faster = described.faster_variant
        if faster is not None and described.weights in self._unfolds_once():
            return faster
        return described

    def _unfolds_once(self) -> frozenset[str]:
        """The weights files whose layers are unfolded to fp32 when their graphs are loaded: all of them where that is little or
        there is room beside all else, or that of the transformer, which every step reads; otherwise none."""
        if self._faster is None:
            self._faster = frozenset()
            graphs = self._target.graphs
            everything = {graph.weights for graph in graphs.values()}
            if self._still_unfolded(_faster(graph) for graph in graphs.values()) <= LITTLE:
                self._faster = frozenset(everything)
            together = list(graphs)
            for weights in () if self._faster or is_repeatable() else (everything, {graphs["prologue"].weights}):
                if self._takes_turns:
                    together = [name for name, graph in graphs.items() if graph.weights in weights]
                extra = self._extra([name for name in graphs if graphs[name].weights in weights])
                free = self._free_memory()
                if free is None or self._needed(together, self._sizes) + extra <= ROOM * free:
                    self._faster = frozenset(weights)
                    break
        return self._faster

    def _extra(self, graphs: Iterable[str]) -> int:
        """Bytes that the faster variants of graphs still take, on every rank together."""
        ranks = self._group.ranks if self._group else 1
        there = self._unfolded
        return ranks * self._still_unfolded(_faster(self._target.graphs[name]) for name in graphs if name not in there)


def _faster(graph: Graph) -> tuple[Unfold, ...]:
    """What is unfolded for the faster variant of a graph; nothing where it has none."""
    variant = graph.faster_variant
    return variant.unfolded if variant else ()


def _packed_bytes(graph: Graph) -> int:
    """Bytes of the int8 rows that a graph takes."""
    return unfolded_bytes(entry for entry in graph.unfolded if entry.form == "int8")


def _failed(described: Graph, error: Exception) -> BackendError:
    return BackendError(
        f"{described.file}: ONNX Runtime failed while it ran: {str(error).strip()}; check the bundle with "
        "`fluxc verify`, and the memory that is free"
    )
