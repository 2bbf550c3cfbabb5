"""Runs a bundle's graphs with ONNX Runtime's CUDA provider; what graphs leave stays on the GPU for the next one.

Sessions record which provider each node was given. A node that does the work of a layer and is not on the GPU is an error: it
would be right, and many times slower, without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxrt.backends.numbers import to_bf16
from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fluxrt.bundle import Bundle, Graph, Target

PROVIDER = "CUDAExecutionProvider"
WORK = {
    "MatMul",
    "Gemm",
    "MatMulBlockQuantizedFp4Weight",
    "Attention",
    "Conv",
    "LayerNormalization",
    "RMSNormalization",
}
ONNX_BF16 = 16


class OnnxRuntimeCudaBackend:
    """Buffers are OrtValues, on the GPU once a graph wrote them. `device` and `providers` are others in tests alone."""

    def __init__(
        self, bundle: Bundle, target: Target, device: str = "cuda", providers: tuple[str, ...] = (PROVIDER,)
    ) -> None:
        import onnxruntime

        self._bundle, self._target, self._device, self._providers = bundle, target, device, providers
        missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
        if missing:
            raise BackendError(
                f"target {target.name!r} needs ONNX Runtime's {missing[0]}, which the installed onnxruntime "
                f"{onnxruntime.__version__} does not have; pip install onnxruntime-gpu in its place, or choose another --target"
            )
        self._sessions: dict[str, Any] = {}
        self._buffers: dict[str, Any] = {}
        self._dtypes = {
            port.name: port.dtype for graph in target.graphs.values() for port in (*graph.inputs, *graph.outputs)
        }

    def prepare(self, sizes: dict[str, int]) -> None:
        """Sessions take any size."""

    def put(self, name: str, array: np.ndarray) -> None:
        """Fill a buffer; fp32 given for bf16 is rounded to nearest even. ONNX Runtime copies it to the GPU when it is read."""
        from onnxruntime import OrtValue

        if self._dtypes.get(name) == "bfloat16":
            self._buffers[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(to_bf16(array), ONNX_BF16)
        elif self._dtypes.get(name) == "float16":
            self._buffers[name] = OrtValue.ortvalue_from_numpy(array.astype("float16"))
        else:
            self._buffers[name] = OrtValue.ortvalue_from_numpy(array)

    def get(self, name: str) -> np.ndarray:
        """A buffer's content, fp16 as fp32; BackendError when it is bf16, or nothing was put or computed under this name."""
        import numpy as np

        if name not in self._buffers:
            raise BackendError(f"nothing has produced {name!r}")
        if self._dtypes.get(name) == "bfloat16":
            raise BackendError(f"{name!r} is bf16, which ONNX Runtime does not give to numpy; read what it leads to")
        array: np.ndarray = self._buffers[name].numpy()
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def play(self, graphs: tuple[str, ...], carry: Mapping[str, str] | None = None) -> None:
        """Run graphs in order, bound to buffers; see Backend.play."""
        for graph in graphs:
            described = self._described(graph)
            binding = self._session(graph).io_binding()
            for port in described.inputs:
                if port.name not in self._buffers:
                    raise BackendError(f"graph {graph!r} needs {port.name}, which nothing has produced")
                binding.bind_ortvalue_input(port.name, self._buffers[port.name])
            for port in described.outputs:
                binding.bind_output(port.name, self._device)
            self._session(graph).run_with_iobinding(binding)
            self._buffers.update(zip((port.name for port in described.outputs), binding.get_outputs(), strict=True))
        for source, target in (carry or {}).items():
            self._buffers[target] = self._buffers.pop(source)

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The results of `graph`."""
        return tuple(port.name for port in self._described(graph).outputs)

    def close(self) -> None:
        """Drop sessions and buffers."""
        self._sessions.clear()
        self._buffers.clear()

    def _described(self, graph: str) -> Graph:
        if graph not in self._target.graphs:
            raise BackendError(f"{self._bundle.root}: target {self._target.name!r} has no graph {graph!r}")
        return self._target.graphs[graph]

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            path = self._bundle.checked_file(self._described(graph).file)
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=list(self._providers))
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise BackendError(
                    f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it with {self._providers[0]}: {error}; "
                    "it needs version 1.31 or later and a GPU of compute capability 9.0 or later"
                ) from error
            self._check_placement(graph, session)
            self._sessions[graph] = session
        return self._sessions[graph]

    def _check_placement(self, graph: str, session: Any) -> None:
        """Refuse a session that does a layer's work on another provider than the one asked for."""
        wanted = self._providers[0]
        if wanted not in session.get_providers():
            raise BackendError(
                f"graph {graph!r}: ONNX Runtime could not start {wanted} and would run on {session.get_providers()[0]}; "
                "check that CUDA and cuDNN are installed as onnxruntime-gpu needs them, or choose another --target"
            )
        for part in session.get_provider_graph_assignment_info():
            strays = {node.op_type for node in part.get_nodes()} & WORK
            if strays and part.ep_name != wanted:
                raise BackendError(
                    f"graph {graph!r}: nodes that do a layer's work ({', '.join(sorted(strays))}) were given to "
                    f"{part.ep_name}, not {wanted}; this ONNX Runtime has no kernel for them on the GPU, use the version "
                    "the bundle was built with"
                )
