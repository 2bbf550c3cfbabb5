"""Runs a bundle's graphs with ONNX Runtime's CUDA provider; what graphs leave stays on the GPU for the next one.

Sessions record which provider each node was given. A node that does the work of a layer and is not on the GPU is an error: it
would be right, and many times slower, without a word. A kernel may refuse its input only when it computes; `try_graphs` finds
that out before the first image.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import re
from typing import TYPE_CHECKING, Any

from fluxrt.backends.numbers import to_bf16
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend, session_options
from fluxrt.backends.trials import Trials
from fluxrt.cuda import first_gpu, free_memory
from fluxrt.errors import BackendError
from fluxrt.install import extra_requirements, install_instead
from fluxrt.manifest import dimension_size
from fluxrt.sharding import sizes_of
from fluxrt.system import check_driver
from fluxrt.tiles import with_tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from fluxrt.bundle import Bundle
    from fluxrt.cuda import Gpu
    from fluxrt.manifest import Graph, OnnxRuntimeTarget

PROVIDER = "CUDAExecutionProvider"

OPTIONS = {
    # Every session has an arena of its own; doubling each of them, the default, would take up to twice what graphs need.
    # The default search times every algorithm of every convolution, each with its workspace, at every new size.
    PROVIDER: {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"},
}
WORK = {
    "MatMul",
    "Gemm",
    "MatMulBlockQuantizedFp4Weight",
    "Attention",
    "Conv",
    "LayerNormalization",
    "RMSNormalization",
}
ONNX_TYPES = {"bfloat16": 16, "float16": 10, "float32": 1}
ONNX_BF16 = ONNX_TYPES["bfloat16"]
HOST = ("text", "encoded")
"""Results that go to the host at once: the text is kept there while the text encoder and its arena on the GPU are gone."""
_FAILED_NODE = re.compile(r"while running (\w+) node\. Name:'([^']*)'")


def how_to_install() -> str:
    """What to do for ONNX Runtime with CUDA, as a clause that starts with a verb."""
    return f"run `{install_command()}`"


def install_command() -> str:
    """The command that installs ONNX Runtime with CUDA here.

    The plain package and this one share a folder, so neither may be left. The extra's own extras are the CUDA and cuDNN
    libraries that it loads.
    """
    packages = extra_requirements("fluxrt", "onnxruntime-gpu")
    return install_instead(("onnxruntime", "onnxruntime-gpu"), *packages)


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """Buffers are OrtValues, on the GPU once a graph wrote them. `device` and `providers` are others in tests alone."""

    def __init__(
        self, bundle: Bundle, target: OnnxRuntimeTarget, device: str = "cuda", providers: tuple[str, ...] = (PROVIDER,)
    ) -> None:
        import onnxruntime

        super().__init__(bundle, target)
        self._device, self._providers = device, providers
        self._preloaded = _preload() if PROVIDER in providers else ""
        missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
        if missing:
            raise BackendError(
                f"target {target.name!r} needs ONNX Runtime's {missing[0]}, which the installed onnxruntime "
                f"{onnxruntime.__version__} does not have; {how_to_install()}, or choose another --target"
            )
        self._dtypes = {
            port.name: port.dtype for graph in target.graphs.values() for port in (*graph.inputs, *graph.outputs)
        }

    def try_graphs(self, find_gpu: Callable[[], Gpu] = first_gpu) -> None:
        """Run every graph once, on zeros at the bundle's smallest size; what ran on this GPU before is not run again.

        "Before" means with this GPU, driver and ONNX Runtime (trials.py); where the GPU cannot be named, every graph runs.
        Raises BackendError for a driver that is too old, and naming graph and node when one fails. Buffers are afterwards as
        they were.
        """
        import onnxruntime

        gpu = None
        with contextlib.suppress(BackendError):
            gpu = find_gpu()
        if gpu is not None:
            check_driver(gpu)
        trials = Trials(gpu, f"onnxruntime {onnxruntime.__version__}", self.notes) if gpu else None
        files = self._bundle.manifest.files
        kept, self._buffers = self._buffers, {}
        try:
            for name, described in self._target.graphs.items():
                digest = files[described.file].sha256
                if trials is None or not trials.has_run(digest):
                    self._try(name, described)
                    # Before the next one: whether all of them fit at once is not known yet.
                    self._sessions.clear()
                    if trials is not None:
                        trials.remember(digest)
        except BackendError:
            self.close()
            raise
        finally:
            self._buffers = kept

    def _try(self, name: str, described: Graph) -> None:
        import numpy as np
        import onnxruntime

        sampling = self._bundle.manifest.sampling
        height, width = min(sampling.sizes, key=lambda size: size[0] * size[1])
        grid = (height // sampling.pixels_per_token, width // sampling.pixels_per_token)
        sizes = with_tiles(sampling, sizes_of(1, grid))
        for port in described.inputs:
            shape = [dimension_size(dimension, sizes) for dimension in port.shape]
            # Graphs divide by the number of columns, and a mask of zeros leaves attention nothing.
            fill = sizes.get(port.name, 1) if port.dtype in ("int64", "bool") else 0
            # put() makes bf16 of fp32.
            self.put(port.name, np.full(shape, fill, "float32" if port.dtype == "bfloat16" else port.dtype))
        session = self._session(name)
        try:
            self._run(name, session, described)
        except BackendError as error:
            found = _FAILED_NODE.search(str(error))
            node = f"its node {found[2]!r} ({found[1]})" if found else "a node"
            built = self._bundle.manifest.provenance.tools.get("onnxruntime")
            raise BackendError(
                f"graph {name!r}: {node} failed in a trial run at {height}x{width}: this ONNX Runtime "
                f"({onnxruntime.__version__}) cannot compute it on this machine. Use the version the bundle was built with "
                f"({built}), or choose another --target. {error}"
            ) from error

    def put(self, name: str, array: np.ndarray) -> None:
        """Fill a buffer; fp32 given for bf16 is rounded to nearest even. ONNX Runtime copies it to the GPU when it is read."""
        from onnxruntime import OrtValue

        dtype = self._dtypes.get(name)
        if dtype == "bfloat16":
            self._buffers[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(to_bf16(array), ONNX_BF16)
        else:
            self._buffers[name] = OrtValue.ortvalue_from_numpy(array.astype(dtype, copy=False) if dtype else array)

    def get(self, name: str) -> np.ndarray:
        """A buffer's content, fp16 as fp32; BackendError when it is bf16, or nothing was put or computed under this name."""
        import numpy as np

        value = self._buffer(name)
        if self._dtypes.get(name) == "bfloat16":
            raise BackendError(f"{name!r} is bf16, which ONNX Runtime does not give to numpy; read what it leads to")
        array: np.ndarray = value.numpy()
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def save(self, name: str) -> np.ndarray:
        """The bytes of a buffer that lies on the host, one of HOST: bf16, fp16 as uint16, for numpy has no bf16."""
        import numpy as np

        value = self._buffer(name)
        kind, shape = np.dtype(np.float32 if self._dtypes[name] == "float32" else np.uint16), value.shape()
        return np.frombuffer(ctypes.string_at(value.data_ptr(), kind.itemsize * math.prod(shape)), kind).reshape(shape)

    def restore(self, name: str, saved: np.ndarray) -> None:
        """An OrtValue of what `save` gave."""
        from onnxruntime import OrtValue

        self._buffers[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(saved, ONNX_TYPES[self._dtypes[name]])

    _where = "GPU memory"

    def _free_memory(self) -> int | None:
        """What the driver says is free, where cuda-bindings is there to ask it."""
        with contextlib.suppress(BackendError):
            return free_memory()
        return None

    def _variant(self, graph: str) -> Graph:
        """The graph itself: only a CPU has variants."""
        return self._described(graph)

    def _shape_of(self, result: Any) -> tuple[int, ...]:
        return tuple(result.shape())

    def _run(self, graph: str, session: Any, described: Graph) -> list[Any]:
        binding = session.io_binding()
        for port in described.inputs:
            binding.bind_ortvalue_input(port.name, self._buffers[port.name])
        for port in described.outputs:
            binding.bind_output(port.name, "cpu" if port.name in HOST else self._device)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(
                f"{described.file}: ONNX Runtime failed while it ran: {str(error).strip()}; if memory ran out, ask for a "
                f"smaller size or guidance 1; if a library is missing: {how_to_install()}"
            ) from error
        results: list[Any] = binding.get_outputs()
        return results

    def _open(self, graph: str, path: str, constants: Mapping[str, np.ndarray]) -> Any:
        import onnxruntime

        options = session_options()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = [(name, OPTIONS.get(name, {})) for name in self._providers]
        # Otherwise it prints what goes wrong and goes on with the CPU.
        session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
        self._check_placement(graph, session)
        return session

    def _check_placement(self, graph: str, session: Any) -> None:
        """Refuse a session that does a layer's work on another provider than the one asked for."""
        wanted = self._providers[0]
        if wanted not in session.get_providers():
            raise BackendError(
                f"graph {graph!r}: ONNX Runtime could not start {wanted} and would run on {session.get_providers()[0]}; "
                f"its libraries of CUDA or cuDNN are missing or of another version{self._preloaded}; {how_to_install()}, or "
                "choose another --target"
            )
        for part in session.get_provider_graph_assignment_info():
            elsewhere = {node.op_type for node in part.get_nodes()} & WORK
            if elsewhere and part.ep_name != wanted:
                raise BackendError(
                    f"graph {graph!r}: nodes that do a layer's work ({', '.join(sorted(elsewhere))}) were given to "
                    f"{part.ep_name}, not {wanted}; this ONNX Runtime has no kernel for them on the GPU, use the version "
                    "the bundle was built with"
                )


def _preload() -> str:
    """Load the CUDA and cuDNN libraries that pip installed, which the system's search does not find; what went wrong, to
    be put after a sentence. ONNX Runtime before 1.21 has no way to."""
    import onnxruntime

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
    lines = "; ".join(line for line in said.getvalue().splitlines() if line.strip())
    return f" ({lines})" if lines else ""
