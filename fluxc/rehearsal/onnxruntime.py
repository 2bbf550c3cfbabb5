"""ONNX Runtime on a made-up CUDA: a target's graphs in ONNX's reference evaluator, in the types that they have.

MatMulBlockQuantizedFp4Weight is written out here from the operator's schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fluxc.rehearsal.operators import (
    DTYPES,
    E2M1,
    E4M3,
    Attention,
    LayerNormalization,
    MatMul,
    RMSNormalization,
)
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.bundle import Bundle
from fluxrt.errors import BackendError
from fluxrt.manifest import Graph, OnnxRuntimeTarget

TYPES = {**DTYPES, "float16": np.float16}


class MatMulBlockQuantizedFp4Weight(OpRun):
    """e2m1(B) * weight_scale_2 * e4m3(weight_scale), rounded to the type of A, then A B^T."""

    op_domain = "com.microsoft"

    def _run(
        self,
        a: np.ndarray,
        b: np.ndarray,
        weight_scale: np.ndarray,
        weight_scale_2: np.ndarray,
        *_: Any,
        block_size: int = 16,
    ) -> tuple[np.ndarray]:
        assert b.dtype == weight_scale.dtype == np.uint8
        values = np.stack([b & 15, b >> 4], axis=-1).reshape(len(b), -1).view(E2M1).astype(np.float32)
        scales = np.repeat(weight_scale.view(E4M3).astype(np.float32), block_size, axis=1)
        weight = (values * weight_scale_2 * scales).astype(a.dtype)
        return ((a.astype(np.float32) @ weight.astype(np.float32).T).astype(a.dtype),)


OPERATORS: list[type[OpRun]] = [MatMulBlockQuantizedFp4Weight, MatMul, Attention, LayerNormalization, RMSNormalization]


class MadeUpCudaBackend(OnnxRuntimeBackend):
    """Takes and gives what fluxrt's backend for CUDA does; bf16 can only be read by graphs, as there."""

    def __init__(self, bundle: Bundle, target: OnnxRuntimeTarget) -> None:
        super().__init__(bundle, target)
        parts = target.graphs.values()
        self._dtypes = {port.name: port.dtype for graph in parts for port in (*graph.inputs, *graph.outputs)}

    def put(self, name: str, array: np.ndarray) -> None:
        """Fill a buffer, in its type."""
        self._buffers[name] = array.astype(TYPES[self._dtypes[name]]) if name in self._dtypes else array

    def get(self, name: str) -> np.ndarray:
        """A buffer's content, fp16 as fp32; BackendError when it is bf16, or there is nothing under this name."""
        array: np.ndarray = self._buffer(name)
        if self._dtypes.get(name) == "bfloat16":
            raise BackendError(f"{name!r} is bf16, which ONNX Runtime does not give to numpy; read what it leads to")
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def save(self, name: str) -> np.ndarray:
        """A buffer in its type, bf16 too."""
        array: np.ndarray = self._buffer(name)
        return array

    def restore(self, name: str, saved: np.ndarray) -> None:
        """Put what `save` gave."""
        self._buffers[name] = saved

    def _open(self, graph: str, path: str, constants: Mapping[str, np.ndarray]) -> ReferenceEvaluator:
        return ReferenceEvaluator(onnx.load(path), new_ops=OPERATORS)

    def _run(self, graph: str, session: ReferenceEvaluator, described: Graph) -> list[Any]:
        return list(session.run(None, {port.name: self._buffers[port.name] for port in described.inputs}))
