"""Runs a bundle's graphs with ONNX Runtime on the CPU; weights are mapped from the component's one weights file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrt.checks import check_threads
from fluxrt.cores import allowed_cores, usable_cores
from fluxrt.errors import BackendError, BundleError
from fluxrt.manifest import dimension_size
from fluxrt.memory import DECODE, Need, available_memory, return_memory
from fluxrt.weights import component_weights, weights_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.manifest import Graph, OnnxRuntimeTarget, Port, Sharding


LOG = logging.getLogger("fluxrt")
FOLDED = 1 << 20
"""Bytes of the largest constant that ONNX Runtime computes when a session is made. Weights in fp32 would take several times
what the file does, and twice as much while they are made: docs/performance.md, "Memory on a CPU"."""

UNFOLDED = {"U8": 16, "F8_E4M3": 4, "BF16": 2, "F16": 2}
"""Bytes that a weight takes while it is multiplied, by the bytes that are stored."""
DECODER_ACTIVATIONS = 8
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
    reserves: bool = True,
    content: bytes | None = None,
) -> Any:
    """A session on the CPU of the graph file at `path`; `folded` None lets ONNX Runtime fold constants of any size.

    An arena keeps what the widest layer took for the next one: faster, and too much where components take turns. One that
    `reserves` takes all that a run took in one piece from the second run of a shape on, beside what the first one left.
    `content` is a graph to load in place of the file's, with weights in the same folder.
    """
    import onnxruntime

    options = session_options()
    if folded is not None:
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(folded))
    options.enable_cpu_mem_arena = has_arena
    options.enable_mem_pattern = reserves
    if threads:
        options.intra_op_num_threads = threads
    if content is not None:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(Path(path).parent))
    # Otherwise it prints what goes wrong and tries again.
    return onnxruntime.InferenceSession(content or path, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _default_threads() -> int | None:
    """None, which leaves it to ONNX Runtime: a thread a core, bound to it. It counts cores that a quota does not grant, so
    with a quota the number is ours."""
    usable = usable_cores()
    return usable if usable < allowed_cores() else None


class OnnxRuntimeBackend:
    """Sessions are made when a graph first runs and kept for the life of the backend; buffers are numpy arrays.

    The body of a sharded target is several graphs; `group` carries out the exchanges between them.
    """

    def __init__(
        self, bundle: Bundle, target: OnnxRuntimeTarget, threads: int | None = None, group: Group | None = None
    ) -> None:
        self._bundle = bundle
        self._target = target
        self._threads = _default_threads() if threads is None else check_threads(threads)
        self._group = group
        self._last_uses: list[list[str]] = []
        self._sessions: dict[str, Any] = {}
        self._buffers: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._takes_turns = False
        self._gathered: Any = None
        self.notes: list[str] = []

    def prepare(self, sizes: dict[str, int]) -> None:
        """Sessions take any size; results are held against these."""
        self._sizes = dict(sizes)

    def put(self, name: str, array: np.ndarray) -> None:
        """Fill a buffer; the array itself is kept."""
        self._buffers[name] = array

    def get(self, name: str) -> np.ndarray:
        """A buffer's content; BackendError when nothing was put or computed under this name."""
        array: np.ndarray = self._buffer(name)
        return array

    def run(self, graphs: tuple[str, ...], feedback: Mapping[str, str] | None = None) -> None:
        """Run graphs in order; raises BackendError when one is missing, does not load, or an input is missing."""
        for graph in graphs:
            if graph == "body" and self._target.sharding:
                self._run_sharded(self._target.sharding)
            else:
                self._run_one(graph)
        for source, target in (feedback or {}).items():
            self._buffers[target] = self._buffers.pop(source)

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The results of `graph`."""
        last = self._target.sharding.body[-1] if graph == "body" and self._target.sharding else graph
        return tuple(port.name for port in self._described(str(last)).outputs)

    def save(self, name: str) -> np.ndarray:
        """A buffer's array: a graph's result is a new one, so none is written to again."""
        return self.get(name)

    def restore(self, name: str, saved: np.ndarray) -> None:
        """Put what `save` gave."""
        self.put(name, saved)

    def place(self, source: str, target: str, number: int) -> None:
        """The buffer itself of a single image; those of several are gathered on the host."""
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

    def keep(self, graphs: tuple[str, ...] | None) -> None:
        """Drop the sessions of other graphs, with what they mapped, and return their memory to the system."""
        self._takes_turns = graphs is not None
        others = [name for name in self._sessions if graphs is not None and name.partition("-")[0] not in graphs]
        for name in others:
            del self._sessions[name]
        if others:
            return_memory()

    def need(self, sizes: dict[str, int]) -> Need | None:
        """The weights, each file once, which stay in memory as they are stored, and what computing takes; see working_memory.

        The ranks of a sharded target map the same files.
        """
        described = self._target.graphs.values()
        weights = {file for graph in described for file in weights_files(self._bundle, graph.weights)}
        ranks = self._group.ranks if self._group else 1
        working = working_memory(self._target, self._bundle, sizes)
        return Need(sum(file.stat().st_size for file in weights) + ranks * working, self._free_memory(), self._where)

    _where = "memory"

    def _free_memory(self) -> int | None:
        return available_memory()

    def synchronize(self) -> None:
        """Nothing to wait for: a session returns when it is done."""

    def close(self) -> None:
        """Drop sessions and buffers."""
        self._sessions.clear()
        self._buffers.clear()

    def _run_one(self, graph: str) -> None:
        described = self._described(graph)
        missing = [port.name for port in described.inputs if port.name not in self._buffers]
        if missing:
            raise BackendError(f"graph {graph!r} needs {', '.join(missing)}, which nothing has produced")
        results = self._run(self._session(graph), described)
        for port, result in zip(described.outputs, results, strict=True) if self._sizes else ():
            self._check_shape(described.file, port, self._shape_of(result))
        self._buffers.update(zip((port.name for port in described.outputs), results, strict=True))

    def _run_sharded(self, sharding: Sharding) -> None:
        """The parts of the body in order; what one leaves for others is dropped after its last use."""
        assert self._group is not None
        if not self._last_uses:
            self._last_uses = self._find_last_uses(sharding)
        for part, done_with in zip(sharding.body, self._last_uses, strict=True):
            if isinstance(part, str):
                self._run_one(part)
            else:
                self._buffers[part.receives] = self._group.all_to_all(self._buffers[part.sends])
            for name in done_with:
                del self._buffers[name]

    def _find_last_uses(self, sharding: Sharding) -> list[list[str]]:
        """For every part of the body, the buffers made in the body that no later part reads."""
        made: set[str] = set()
        last: dict[str, int] = {}
        for at, part in enumerate(sharding.body):
            if isinstance(part, str):
                graph = self._described(part)
                reads, makes = [port.name for port in graph.inputs], [port.name for port in graph.outputs]
            else:
                reads, makes = [part.sends], [part.receives]
            last |= {name: at for name in reads if name in made}
            made.update(makes)
        return [[name for name, use in last.items() if use == at] for at in range(len(sharding.body))]

    def _run(self, session: Any, described: Graph) -> list[Any]:
        """The outputs of `described`, in order, from the buffers its inputs name."""
        return self._results(session, described, [port.name for port in described.outputs])

    def _results(self, session: Any, described: Graph, names: Sequence[str]) -> list[np.ndarray]:
        """The results `names` of a session of `described`, or of a variant of it."""
        try:
            results: list[np.ndarray] = session.run(
                names, {port.name: self._buffers[port.name] for port in described.inputs}
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(
                f"{described.file}: ONNX Runtime failed while it ran: {str(error).strip()}; check the bundle with "
                "`fluxc verify`, and the memory that is free"
            ) from error
        return results

    def _open(self, graph: str, path: str) -> Any:
        """A session of the graph file at `path`."""
        return open_session(
            path,
            self._threads,
            has_arena=not self._takes_turns,
            reserves=graph not in DECODE,
            content=self._content(graph, path),
        )

    def _content(self, graph: str, path: str) -> bytes | None:
        """A graph that is loaded in place of the file at `path`, with its weights; None for the file itself."""
        return None

    def _shape_of(self, result: Any) -> tuple[int, ...]:
        shape: tuple[int, ...] = result.shape
        return shape

    def _check_shape(self, file: str, port: Port, shape: tuple[int, ...]) -> None:
        """Refuse a result of another shape than the manifest says, for the sizes that were prepared."""
        wanted = tuple(dimension_size(dimension, self._sizes) for dimension in port.shape)
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
        if graph not in self._target.graphs:
            raise BackendError(f"{self._bundle.root}: target {self._target.name!r} has no graph {graph!r}")
        return self._target.graphs[graph]

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            import onnxruntime

            path = self._bundle.checked_file(self._described(graph).file)
            began = time.perf_counter()
            try:
                self._sessions[graph] = self._open(graph, str(path))
                LOG.debug("graph %s: loaded in %.2f s", graph, time.perf_counter() - began)
            except BackendError:
                raise
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise BackendError(
                    f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}; "
                    "the bundle names the version it was built with under provenance.tools"
                ) from error
        return self._sessions[graph]


def working_memory(target: OnnxRuntimeTarget, bundle: Bundle, sizes: dict[str, int]) -> int:
    """Bytes that the hungriest graph of `target` takes beside weights, estimated.

    The decoder: DECODER_ACTIVATIONS activations of the last block in fp32, one a pixel and channel (benchmarks/vae_memory.py),
    of an image or a tile; with tiles also images.
    A block of the transformer: the widest Linear's weight unfolded, and attention's scores of all heads before and after
    softmax (benchmarks/cpu_memory.py).
    """
    graphs = target.graphs
    rows, columns = sizes.get("tile_rows", sizes["rows"]), sizes.get("tile_columns", sizes["columns"])
    pixels = bundle.manifest.sampling.pixels_per_token**2 * rows * columns
    decoder = component_weights(bundle, graphs["vae_decoder"].weights)
    last = decoder.get("decoder.conv_out.weight")
    # fp32 or bf16 [3, width, 3, 3].
    width = last.nbytes // (27 * (4 if last.dtype == "F32" else 2)) if last else 128
    decoding = DECODER_ACTIVATIONS * 4 * width * pixels
    # Of a canvas there are the one before, the one after, and the tile as large as they are.
    decoding += 3 * 4 * 3 * sizes.get("height", 0) * sizes.get("width", 0)
    weights = component_weights(bundle, graphs["prologue"].weights)
    widest = max(
        (UNFOLDED[tensor.dtype] * tensor.nbytes for tensor in weights.values() if tensor.dtype in UNFOLDED), default=0
    )
    rope = next((port for port in graphs["prologue"].outputs if port.name == "rope_cos"), None)
    hidden = next((port for port in graphs["prologue"].outputs if port.name == "hidden"), None)
    scores = 0
    if rope and hidden:
        tokens, channels, head = dimension_size(rope.shape[0], sizes), hidden.shape[-1], rope.shape[-1]
        scores = 2 * 4 * sizes["batch"] * int(channels) // int(head) * tokens**2
    return max(decoding, widest + scores)
