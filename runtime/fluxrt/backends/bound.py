"""Sessions of ONNX Runtime whose inputs and results lie in arrays that stay, so that a step allocates nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


class Bound:
    """A session whose results are `names`, with what is made of weights bound once; `shapes` are the sizes it was bound for."""

    def __init__(
        self, session: Any, names: list[str], weights: Mapping[str, np.ndarray], shapes: tuple[int, ...]
    ) -> None:
        from onnxruntime import OrtValue

        self.shapes = shapes
        self._session, self._binding = session, session.io_binding()
        # What is bound refers to the arrays, and does not keep them.
        self._weights = weights
        for name, array in weights.items():
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        self._names = names

    def run(self, inputs: Mapping[str, np.ndarray], results: list[np.ndarray]) -> None:
        """Fill `results`, in the order of their names, from `inputs`."""
        from onnxruntime import OrtValue

        kept = [OrtValue.ortvalue_from_numpy(array) for array in (*inputs.values(), *results)]
        for name, value in zip((*inputs, *self._names), kept, strict=True):
            bind = self._binding.bind_ortvalue_input if name in inputs else self._binding.bind_ortvalue_output
            bind(name, value)
        self._session.run_with_iobinding(self._binding)
