"""One caller at a time: the buffers of a pipeline belong to the image it is making."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fluxrt.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Turns:
    """Callers of other threads wait for their turn. One that calls from inside its own turn is refused, or it would wait
    for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A turn; RequestError where the caller is in one already, as `on_step` and `on_image` are."""
        me = threading.get_ident()
        if self._holder == me:
            raise RequestError(
                "this pipeline is in the middle of a request, and on_step and on_image run inside it; generate or close after "
                "it has returned, or load the bundle a second time"
            )
        with self._lock:
            self._holder = me
            try:
                yield
            finally:
                self._holder = None
