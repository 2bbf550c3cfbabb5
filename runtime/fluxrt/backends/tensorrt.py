"""Runs TensorRT and TensorRT-RTX engines: weights go to the GPU once, a step becomes one CUDA graph.

1. Everything that can be wrong with library, GPU and bundle is checked before anything is loaded.
2. A plan is read only after its SHA-256 matched.
3. Buffers and working memory keep their addresses for as long as the sizes stay the same, so what was captured stays valid.
   Both are as large as any program of this rank needs before the first one runs; where components take turns (`keep`), the
   working memory is as large as any program of the present ones needs, and what was captured goes when a component does.
4. A sequence of graphs runs eagerly the first time (TensorRT-RTX compiles kernels then). The second time it runs eagerly and
   as a CUDA graph, from the same state; if both leave the same bytes, the graph is launched from then on. What the host puts
   goes before the launch.
5. The ranks of a sharded target capture a sequence that holds collectives together, or none of them does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from fluxrt.backends.buffers import (
    ALIGNMENT,
    Arena,
    Buffer,
    Sizes,
    buffer_of,
    check_sizes,
    plan_arena,
    plan_buffers,
    profile_for,
)
from fluxrt.backends.engines import Context, Engines
from fluxrt.backends.library import check_finished, check_gpu, check_version, load_library
from fluxrt.backends.nccl import Communicator
from fluxrt.backends.numbers import from_bf16, to_bf16
from fluxrt.backends.upload import upload
from fluxrt.cuda import CudaDriver, Driver, OutOfMemoryError
from fluxrt.errors import BackendError, RequestError
from fluxrt.memory import Need
from fluxrt.sharding import FIRST_RANK
from fluxrt.weights import component_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.manifest import Program, TensorRTTarget

Moves = tuple[tuple[str, str], ...]


@dataclass
class _Loaded:
    """A program and its variants on the GPU: where their weights lie."""

    arena: Arena
    address: int


@dataclass
class _Sequence:
    """Graphs that run one after the other, and what then moves from buffer to buffer.

    `contexts` are its own, by plan and profile. It was run `runs` times on the present buffers, and is launched as `graph` once
    it was captured; `refused` says that it cannot be.
    """

    graphs: tuple[str, ...]
    moves: Moves
    contexts: dict[tuple[str, int], Context] = field(default_factory=dict)
    runs: int = 0
    graph: int | None = None
    refused: bool = False


class TensorRTBackend:
    """One target of a bundle on one GPU. `notes` says what did not go as it should and was worked around.

    With `captures` false nothing becomes a CUDA graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: TensorRTTarget,
        driver: Driver | None = None,
        library: Any | None = None,
        group: Group | None = None,
        communicator: Communicator | None = None,
        *,
        captures: bool = True,
    ) -> None:
        self._bundle, self._target, self._engine = bundle, target, target.engine
        check_finished(bundle, target)
        self._trt = load_library(target.engine) if library is None else library
        check_version(bundle, target, str(self._trt.__version__))
        self._driver: Driver = CudaDriver(group.rank if group else 0) if driver is None else driver
        check_gpu(bundle, target, self._driver.gpu)
        if group and communicator is None:
            communicator = Communicator(group)
        self._group, self._communicator, self._captures = group, communicator, captures
        self.notes: list[str] = []
        ranks = (group, communicator) if group and communicator else None
        self._engines = Engines(bundle, target, self._driver, self._trt, ranks, self.notes)
        others = group is not None and group.rank > 0
        self._stages = [stage for stage in self._engine.programs if not (others and stage in FIRST_RANK)]
        self._kept = self._stages
        self._arenas: dict[str, Arena] = {}
        self._programs: dict[str, _Loaded] = {}
        self._sequences: dict[tuple[tuple[str, ...], Moves], _Sequence] = {}
        self._sizes: Sizes | None = None
        self._buffers: dict[str, Buffer] = {}
        self._addresses: dict[str, int] = {}
        self._memory: dict[int, int] = {}
        self._buffer_memory = 0
        self._scratch = (0, 0)
        self._alive: list[Any] = []
        self._written: set[str] = set()

    def prepare(self, sizes: dict[str, int]) -> None:
        """Read this rank's plans, and allocate every buffer and the working memory for these sizes.

        Buffers of other sizes, and what was captured on them, are given back.
        """
        self._driver.activate()
        if sizes == self._sizes:
            return
        check_sizes(self._engine, sizes)
        buffers = plan_buffers(self._engine, sizes, self._stages)
        self._forget()
        self._reserve_scratch(self._kept, sizes)
        offsets, end = {}, 0
        for name, buffer in buffers.items():
            offsets[name] = end
            end += _aligned(buffer)
        self._buffer_memory = self._allocate(end, f"the buffers of {sizes['tokens']} image tokens")
        self._buffers, self._sizes = buffers, dict(sizes)
        self._addresses = {name: self._buffer_memory + offset for name, offset in offsets.items()}

    def put(self, name: str, array: np.ndarray) -> None:
        """Copy `array` into a buffer; fp32 given for bf16 is rounded to nearest even."""
        import numpy as np

        self._driver.activate()
        buffer = self._buffer(name)
        if tuple(array.shape) != buffer.shape:
            raise RequestError(
                f"{name} has shape {list(array.shape)}, the plans were compiled for {list(buffer.shape)}; "
                "ask for what the bundle was built for, or rebuild it"
            )
        data = np.ascontiguousarray(_to_device(array, buffer.dtype))
        self._alive.append(data)
        self._driver.upload(self._addresses[name], data)
        self._written.add(name)

    def get(self, name: str) -> np.ndarray:
        """A buffer's content, bf16 as fp32."""
        self._driver.activate()
        buffer = self._buffer(name)
        if name not in self._written:
            raise BackendError(f"nothing has produced {name!r}")
        return _from_device(self._read((name,))[name], buffer)

    def run(self, graphs: tuple[str, ...], feedback: Mapping[str, str] | None = None) -> None:
        """Run programs in order on the buffers; see Backend.run."""
        self._driver.activate()
        key = (graphs, tuple((feedback or {}).items()))
        sequence = self._sequences.setdefault(key, _Sequence(*key))
        if sequence.graph is None:
            self._load(sequence)
        self._check_written(graphs)
        if sequence.graph is not None:
            self._driver.launch(sequence.graph)
        elif sequence.runs == 0 or sequence.refused or not self._captures:
            self._enqueue(sequence)
            if sequence.runs == 0:
                self.synchronize()
                self._engines.save_kernels()
        else:
            self._capture(sequence)
        sequence.runs += 1

    def save(self, name: str) -> np.ndarray:
        """A buffer's bytes."""
        self._driver.activate()
        return self._read((name,))[name]

    def restore(self, name: str, saved: np.ndarray) -> None:
        """Put back what `save` read."""
        self._driver.activate()
        self._buffer(name)
        self._write({name: saved})
        self._written.add(name)

    def place(self, source: str, target: str, number: int) -> None:
        """Copy on the GPU."""
        self._driver.activate()
        rows, all_rows = self._buffer(source), self._buffer(target)
        if source not in self._written:
            raise BackendError(f"nothing has produced {source!r}")
        assert rows.dtype == all_rows.dtype
        assert (number + 1) * rows.nbytes <= all_rows.nbytes
        self._driver.copy(self._addresses[target] + number * rows.nbytes, self._addresses[source], rows.nbytes)
        self._written.add(target)

    def keep(self, graphs: tuple[str, ...] | None) -> None:
        """Give back weights and CUDA graphs of other programs, and the working memory that only they need.

        Their contexts stay: they are small, hold compiled kernels, and making one anew takes all ranks.
        """
        self._driver.activate()
        self._kept = [stage for stage in self._stages if graphs is None or _stem(stage) in graphs]
        self.synchronize()
        for sequence in self._sequences.values():
            if not set(sequence.graphs) <= set(self._kept):
                self._drop_graph(sequence)
        for name in self._programs.keys() - {_stem(stage) for stage in self._kept}:
            loaded = self._programs.pop(name)
            if loaded.arena.nbytes:
                self._free(loaded.address)
        if self._sizes is not None:
            wanted = self._engines_wanted(self._kept, self._sizes)
            if wanted != self._scratch[1]:
                self._resize_scratch(wanted)

    def need(self, sizes: dict[str, int]) -> Need | None:
        """All weights of this rank, the buffers, and the working memory of its hungriest plan; nothing of TensorRT's own."""
        self._driver.activate()
        check_sizes(self._engine, sizes)
        weights = sum(self._arena(stem).nbytes for stem in {_stem(stage) for stage in self._stages})
        buffers = sum(_aligned(buffer) for buffer in plan_buffers(self._engine, sizes, self._stages).values())
        free = self._driver.memory()[0] + sum(self._memory.values())
        return Need(weights + buffers + self._engines_wanted(self._stages, sizes), free, "GPU memory")

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The buffers the program `graph` leaves its results in."""
        return self._program(graph).outputs

    def synchronize(self) -> None:
        """Wait until the GPU has done everything it was asked for."""
        self._driver.activate()
        self._driver.synchronize()
        self._alive.clear()

    def held(self) -> dict[str, int]:
        """Bytes of the GPU's memory that "weights", "buffers" and "working memory" take; TensorRT's own are not among them."""
        return {
            "weights": sum(loaded.arena.nbytes for loaded in self._programs.values()),
            "buffers": self._memory.get(self._buffer_memory, 0),
            "working memory": self._scratch[1],
        }

    def close(self) -> None:
        """Give back graphs, contexts, engines, weights and buffers, and the GPU itself."""
        self._driver.activate()
        self._release()
        if self._communicator:
            self._communicator.close()
        self._driver.close()

    def _capture(self, sequence: _Sequence) -> None:
        """Run a sequence that has run before, eagerly and as a CUDA graph, which is kept if both leave the same bytes."""
        refusing = self._not_capturable(sequence)
        why = self._agree(sequence, f"TensorRT says that {', '.join(refusing)} cannot be" if refusing else "")
        if why:
            self._refuse(sequence, why)
            return
        overwritten, written = self._changes(sequence)
        results = self._results(sequence)
        before = self._read(overwritten)
        self._enqueue(sequence)
        eager = self._read(results)
        # What the eager run left in between would make up for a call of the graph that computes nothing, or with other weights.
        for name in written:
            self._driver.fill(self._addresses[name], self._buffers[name].nbytes, 0xFF)
        self._write(before)
        graph, why = self._record(sequence)
        why = self._agree(sequence, why)
        if graph is not None and not why:
            self._driver.launch(graph)
            launched = self._read(results)
            differing = [name for name in results if eager[name].tobytes() != launched[name].tobytes()]
            why = self._agree(sequence, f"it left another {', '.join(differing)} than eagerly" if differing else "")
            self._write(before if why else {})
        if not why:
            sequence.graph = graph
            return
        if graph is not None:
            self._driver.destroy(graph)
        self._refuse(sequence, why)

    def _refuse(self, sequence: _Sequence, why: str) -> None:
        """Run a sequence eagerly, now and from now on."""
        sequence.refused = True
        graphs = ", ".join(sequence.graphs)
        self.notes.append(f"{graphs}: not captured as a CUDA graph, every call is launched: {why}")
        self._enqueue(sequence)

    def _record(self, sequence: _Sequence) -> tuple[int | None, str]:
        """A CUDA graph of a sequence, or why there is none."""
        self._driver.begin_capture()
        try:
            self._enqueue(sequence)
            return self._driver.end_capture(), ""
        except OutOfMemoryError as error:
            self._driver.abandon_capture()
            raise self._out_of_memory(f"a CUDA graph of {', '.join(sequence.graphs)}", error) from error
        except BaseException as error:
            self._driver.abandon_capture()
            # TensorRT's own errors are RuntimeErrors; an interrupt must not be taken for a refusal.
            if not isinstance(error, BackendError | RuntimeError):
                raise
            return None, str(error) or type(error).__name__

    def _agree(self, sequence: _Sequence, why: str) -> str:
        """`why` of this rank or another, where the sequence makes ranks exchange something: NCCL wants all captured or none."""
        plans = self._plans_of(sequence)
        if self._group is None or not any(self._engine.plans[name].expected.get("collectives") for name in plans):
            return why
        return self._group.agree(why)

    def _changes(self, sequence: _Sequence) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The buffers that a sequence reads and then writes, so that it cannot be repeated without them, and all it writes."""
        read: dict[str, None] = {}
        written: dict[str, None] = {}
        for graph in sequence.graphs:
            for call in self._program(graph).calls:
                plan = self._engine.plans[call.plan]
                read |= dict.fromkeys(name for port in plan.inputs if (name := buffer_of(call, port)) not in written)
                written |= dict.fromkeys(buffer_of(call, port) for port in plan.outputs)
        for source, target in sequence.moves:
            read |= {} if source in written else {source: None}
            written[target] = None
        return tuple(name for name in read if name in written), tuple(written)

    def _results(self, sequence: _Sequence) -> tuple[str, ...]:
        """What a sequence is run for: its programs' results, and the buffers that some of them move to."""
        results = [name for graph in sequence.graphs for name in self._program(graph).outputs]
        return tuple(dict.fromkeys((*results, *(target for _, target in sequence.moves))))

    def _not_capturable(self, sequence: _Sequence) -> list[str]:
        """The plans of a sequence that TensorRT-RTX does not let be captured; full TensorRT has no such question."""
        contexts = {name: self._context(sequence, name).handle for name in self._plans_of(sequence)}
        return [
            name
            for name, context in contexts.items()
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._driver.stream)
        ]

    def _enqueue(self, sequence: _Sequence) -> None:
        for graph in sequence.graphs:
            loaded, first = self._programs[_stem(graph)], self._first_call(graph)
            for number, call in enumerate(self._program(graph).calls, start=first):
                plan = self._engine.plans[call.plan]
                context = self._context(sequence, call.plan).handle
                for port in (*plan.inputs, *plan.outputs):
                    self._bind(context, port.name, self._addresses[buffer_of(call, port)])
                for weight in plan.weights:
                    self._bind(context, weight.name, loaded.address + loaded.arena.offsets[number, weight.name])
                if not context.execute_async_v3(self._driver.stream):
                    raise BackendError(
                        f"plan {call.plan} of {graph}, call {number - first}, did not run: {self._engines.told()}"
                    )
        for source, target in sequence.moves:
            self._driver.copy(self._addresses[target], self._addresses[source], self._buffers[source].nbytes)

    def _check_written(self, graphs: tuple[str, ...]) -> None:
        """Refuse to compute with a buffer that nothing has put or computed; what these graphs leave counts as filled."""
        for graph in graphs:
            for call in self._program(graph).calls:
                plan = self._engine.plans[call.plan]
                missing = [name for port in plan.inputs if (name := buffer_of(call, port)) not in self._written]
                if missing:
                    raise BackendError(f"graph {graph!r} needs {', '.join(missing)}, which nothing has produced")
                self._written.update(buffer_of(call, port) for port in plan.outputs)

    def _bind(self, context: Any, port: str, address: int) -> None:
        if not context.set_tensor_address(port, address):
            raise BackendError(f"a plan has no input or output {port!r}; the bundle is wrong, rebuild it")

    def _load(self, sequence: _Sequence) -> None:
        """Bring the weights of a sequence to the GPU, once, and make its contexts ready for the present sizes."""
        if self._sizes is None:
            raise BackendError(f"{', '.join(sequence.graphs)}: no sizes were prepared")
        self._reserve_scratch(sequence.graphs, self._sizes)
        for name in self._plans_of(sequence):
            profile = profile_for(name, self._engine.plans[name], self._sizes)
            if (name, profile) not in sequence.contexts:
                sequence.contexts[name, profile] = self._engines.make_context(name, profile)
            context = sequence.contexts[name, profile]
            if context.scratch != self._scratch:
                context.handle.set_device_memory(*self._scratch)
                context.scratch = self._scratch
            self._engines.set_shapes(name, context, self._sizes)
        for graph in sequence.graphs:
            if _stem(graph) not in self._programs:
                self._programs[_stem(graph)] = self._upload(_stem(graph))

    def _reserve_scratch(self, stages: Iterable[str], sizes: Sizes) -> None:
        """Working memory for the hungriest plan of `stages`, unless there is as much."""
        wanted = self._engines_wanted(stages, sizes)
        if wanted > self._scratch[1]:
            self._resize_scratch(wanted)

    def _resize_scratch(self, wanted: int) -> None:
        """Working memory of `wanted` bytes, in place of another; what was captured with that is dropped. Contexts get it when
        their sequence runs next."""
        self.synchronize()
        self._drop_graphs()
        address, size = self._scratch
        if size:
            self._scratch = (0, 0)
            self._free(address)
        if wanted:
            self._scratch = (self._allocate(wanted, "the plans' working memory"), wanted)

    def _engines_wanted(self, stages: Iterable[str], sizes: Sizes) -> int:
        plans = self._plans_in(stages)
        return self._engines.working_memory(plans, sizes) if plans else 0

    def _plans_of(self, sequence: _Sequence) -> list[str]:
        return self._plans_in(sequence.graphs)

    def _plans_in(self, stages: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(call.plan for stage in stages for call in self._program(stage).calls))

    def _context(self, sequence: _Sequence, name: str) -> Context:
        assert self._sizes is not None
        return sequence.contexts[name, profile_for(name, self._engine.plans[name], self._sizes)]

    def _upload(self, stem: str) -> _Loaded:
        arena = self._arena(stem)
        if not arena.nbytes:
            return _Loaded(arena, 0)
        address = self._allocate(arena.nbytes, f"the weights of {stem}")
        upload(self._driver, address, arena, component_weights(self._bundle, self._common(stem).weights))
        return _Loaded(arena, address)

    def _arena(self, stem: str) -> Arena:
        """Where the weights of a program and of its variants lie, each tensor once, from the headers of its files."""
        if stem not in self._arenas:
            program = self._common(stem)
            self._arenas[stem] = plan_arena(program, self._engine, component_weights(self._bundle, program.weights))
        return self._arenas[stem]

    def _variants(self, stem: str) -> list[str]:
        return [name for name in self._engine.programs if _stem(name) == stem]

    def _common(self, stem: str) -> Program:
        """The calls of a program and of its variants, one after the other."""
        programs = [self._program(name) for name in self._variants(stem)] or [self._program(stem)]
        return msgspec.structs.replace(programs[0], calls=tuple(call for program in programs for call in program.calls))

    def _first_call(self, graph: str) -> int:
        """The number of a program's first call among those of all variants."""
        variants = self._variants(_stem(graph))
        return sum(len(self._program(name).calls) for name in variants[: variants.index(graph)])

    def _read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The bytes of buffers, once the GPU has done what it was asked for."""
        import numpy as np

        found = {}
        for name in names:
            found[name] = np.empty(self._buffer(name).nbytes, np.uint8)
            self._driver.download(self._addresses[name], found[name])
        self.synchronize()
        return found

    def _write(self, content: Mapping[str, np.ndarray]) -> None:
        """Put back what `_read` read."""
        for name, data in content.items():
            self._alive.append(data)
            self._driver.upload(self._addresses[name], data)

    def _program(self, graph: str) -> Program:
        if graph not in self._engine.programs:
            raise BackendError(f"{self._bundle.root}: target {self._target.name!r} has no program {graph!r}")
        return self._engine.programs[graph]

    def _buffer(self, name: str) -> Buffer:
        if name not in self._buffers:
            raise BackendError(f"no program of target {self._target.name!r} reads or writes {name!r}")
        return self._buffers[name]

    def _allocate(self, nbytes: int, what: str) -> int:
        try:
            address = self._driver.allocate(nbytes)
        except OutOfMemoryError as error:
            raise self._out_of_memory(f"{what} ({nbytes / 2**20:,.0f} MiB)", error) from error
        self._memory[address] = nbytes
        return address

    def _out_of_memory(self, what: str, error: OutOfMemoryError) -> OutOfMemoryError:
        """Free everything, and the error to raise."""
        self._release()
        return OutOfMemoryError(
            f"{self._driver.gpu.name} has no room for {what}: {error}. Everything this bundle held there is free again; ask "
            "for a smaller size or guidance 1, load it with --memory staged, free the GPU, or choose another --target"
        )

    def _free(self, address: int) -> None:
        del self._memory[address]
        self._driver.free(address)

    def _drop_graphs(self) -> None:
        for sequence in self._sequences.values():
            self._drop_graph(sequence)

    def _drop_graph(self, sequence: _Sequence) -> None:
        if sequence.graph is not None:
            self._driver.destroy(sequence.graph)
        sequence.graph, sequence.runs = None, 0

    def _forget(self) -> None:
        """Give the buffers back, and the graphs that hold their addresses."""
        self.synchronize()
        self._drop_graphs()
        for sequence in self._sequences.values():
            sequence.refused = False
        if self._buffer_memory:
            self._free(self._buffer_memory)
        self._buffer_memory, self._sizes, self._buffers, self._addresses = 0, None, {}, {}
        self._written.clear()

    def _release(self) -> None:
        self.synchronize()
        self._drop_graphs()
        self._sequences.clear()
        self._engines.clear()
        self._programs.clear()
        for address in self._memory:
            self._driver.free(address)
        self._memory, self._scratch, self._buffer_memory = {}, (0, 0), 0
        self._sizes, self._buffers, self._addresses = None, {}, {}
        self._written.clear()


def _stem(program: str) -> str:
    """The name that variants of a program share: "body" of "body-precise"."""
    return program.partition("-")[0]


def _aligned(buffer: Buffer) -> int:
    return -(-max(buffer.nbytes, 1) // ALIGNMENT) * ALIGNMENT


def _to_device(array: np.ndarray, dtype: str) -> np.ndarray:
    import numpy as np

    return to_bf16(array) if dtype == "bfloat16" else np.asarray(array, dtype=np.dtype(dtype))


def _from_device(data: np.ndarray, buffer: Buffer) -> np.ndarray:
    import numpy as np

    if buffer.dtype == "bfloat16":
        return from_bf16(data.view(np.uint16)).reshape(buffer.shape)
    return data.view(np.dtype(buffer.dtype)).reshape(buffer.shape)
