"""What backends on a CPU ask of a target's graphs, whatever runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxrt.errors import BackendError
from fluxrt.manifest import dimension_size
from fluxrt.weights import component_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Graph

    class HasGraphs(Protocol):
        """A target of graphs."""

        @property
        def name(self) -> str: ...

        @property
        def graphs(self) -> dict[str, Graph]: ...


UNFOLDED = {"U8": 16, "F8_E4M3": 4, "BF16": 2, "F16": 2}
"""Bytes that a weight takes while it is multiplied, by the bytes that are stored."""
DECODER_ACTIVATIONS = 8


def graph_of(bundle: Bundle, target: HasGraphs, graph: str) -> Graph:
    """The graph of this name; BackendError where the target has none."""
    if graph not in target.graphs:
        raise BackendError(f"{bundle.root}: target {target.name!r} has no graph {graph!r}")
    return target.graphs[graph]


def working_memory(graphs: Mapping[str, Graph], bundle: Bundle, sizes: Mapping[str, int]) -> int:
    """Bytes that the hungriest of `graphs` takes on a CPU beside weights, estimated.

    The decoder: DECODER_ACTIVATIONS activations of the last block in fp32, one a pixel and channel (benchmarks/vae_memory.py),
    of an image or a tile; with tiles also images.
    A block of the transformer: the widest Linear's weight unfolded, and attention's scores of all heads before and after
    softmax (benchmarks/cpu_memory.py).
    """
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
