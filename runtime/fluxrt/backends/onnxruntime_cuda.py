"""Runs a bundle's graphs with ONNX Runtime's CUDA provider; what graphs leave stays on the GPU for the next one.

Sessions record which provider each node was given. A node that does the work of a layer and is not on the GPU is an error: it
would be right, and many times slower, without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxrt.backends.numbers import to_bf16
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.errors import BackendError

if TYPE_CHECKING:
    import numpy as np

    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Graph, OnnxRuntimeTarget

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


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """Buffers are OrtValues, on the GPU once a graph wrote them. `device` and `providers` are others in tests alone."""

    def __init__(
        self, bundle: Bundle, target: OnnxRuntimeTarget, device: str = "cuda", providers: tuple[str, ...] = (PROVIDER,)
    ) -> None:
        import onnxruntime

        super().__init__(bundle, target)
        self._device, self._providers = device, providers
        missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
        if missing:
            raise BackendError(
                f"target {target.name!r} needs ONNX Runtime's {missing[0]}, which the installed onnxruntime "
                f"{onnxruntime.__version__} does not have; pip install onnxruntime-gpu in its place, or choose another --target"
            )
        self._dtypes = {
            port.name: port.dtype for graph in target.graphs.values() for port in (*graph.inputs, *graph.outputs)
        }

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

    def _shape_of(self, result: Any) -> tuple[int, ...]:
        return tuple(result.shape())

    def _run(self, session: Any, described: Graph) -> list[Any]:
        binding = session.io_binding()
        for port in described.inputs:
            binding.bind_ortvalue_input(port.name, self._buffers[port.name])
        for port in described.outputs:
            binding.bind_output(port.name, self._device)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(
                f"{described.file}: ONNX Runtime failed while it ran: {error}; if memory ran out, ask for a smaller size or "
                "guidance 1; if a library is missing, install CUDA and cuDNN as onnxruntime-gpu needs them"
            ) from error
        results: list[Any] = binding.get_outputs()
        return results

    def _open(self, graph: str, path: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = onnxruntime.InferenceSession(path, options, providers=list(self._providers))
        self._check_placement(graph, session)
        return session

    def _check_placement(self, graph: str, session: Any) -> None:
        """Refuse a session that does a layer's work on another provider than the one asked for."""
        wanted = self._providers[0]
        if wanted not in session.get_providers():
            raise BackendError(
                f"graph {graph!r}: ONNX Runtime could not start {wanted} and would run on {session.get_providers()[0]}; "
                "check that CUDA and cuDNN are installed as onnxruntime-gpu needs them, or choose another --target"
            )
        for part in session.get_provider_graph_assignment_info():
            elsewhere = {node.op_type for node in part.get_nodes()} & WORK
            if elsewhere and part.ep_name != wanted:
                raise BackendError(
                    f"graph {graph!r}: nodes that do a layer's work ({', '.join(sorted(elsewhere))}) were given to "
                    f"{part.ep_name}, not {wanted}; this ONNX Runtime has no kernel for them on the GPU, use the version "
                    "the bundle was built with"
                )
