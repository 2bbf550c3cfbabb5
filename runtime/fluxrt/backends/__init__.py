"""Backends run a target's graphs on named buffers; all follow the `Backend` protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fluxrt.memory import Need


class Backend(Protocol):
    """Holds named buffers, on the host or on a GPU, and runs graphs that read and write them.

    `notes` says what did not go as it should and was worked around.
    """

    notes: list[str]

    def prepare(self, sizes: dict[str, int]) -> None:
        """Make ready for images in which dimensions count so much, by the names of fluxrt.sharding.sizes_of, with tiles also
        those of fluxrt.tiles.tile_sizes."""
        ...

    def put(self, name: str, array: np.ndarray) -> None:
        """Fill a buffer."""
        ...

    def get(self, name: str) -> np.ndarray:
        """A buffer's content; bf16 comes as fp32."""
        ...

    def run(self, graphs: tuple[str, ...], feedback: Mapping[str, str] | None = None) -> None:
        """Run graphs one after the other, each on the buffers its inputs name, into those its outputs name.

        `feedback` says which buffers become which others at the end, as a step's result becomes the next one's input.
        """
        ...

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The buffers a graph leaves its results in."""
        ...

    def save(self, name: str) -> np.ndarray:
        """A copy on the host of a buffer's content, as it lies there, for `restore`; it stays what it is whatever runs."""
        ...

    def restore(self, name: str, saved: np.ndarray) -> None:
        """Fill a buffer with what `save` gave, to the bit."""
        ...

    def place(self, source: str, target: str, number: int) -> None:
        """Copy the buffer `source`, of one image, to where image `number` has its rows in the buffer `target`, of all images.

        Called for every image in order; the target is filled with the last one.
        """
        ...

    def need(self, sizes: dict[str, int]) -> Need | None:
        """What images of `sizes` take with everything loaded, and what is free for it; None where that is not known."""
        ...

    def keep(self, graphs: tuple[str, ...] | None) -> None:
        """From here on only `graphs` run: give back the weights of all others, and what memory only they need. None: all run.

        Buffers keep their content. A graph that runs all the same is loaded again.
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything that was asked for is done."""
        ...

    def close(self) -> None:
        """Give back whatever the backend holds."""
        ...


def run(backend: Backend, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put `inputs`, run one graph, and get its results."""
    for name, array in inputs.items():
        backend.put(name, array)
    backend.run((graph,))
    return {name: backend.get(name) for name in backend.outputs(graph)}
