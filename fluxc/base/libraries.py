"""What libraries print of themselves: it goes to the log, and is shown with -v."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WORDS = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TORCH_LOGS": "-all"}
"""Read by the libraries when they are loaded: nothing but errors."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let libraries that are loaded in the body print errors alone, unless the user's environment asks for more."""
    added = {name: word for name, word in WORDS.items() if name not in os.environ}
    os.environ.update(added)
    handler = _ToOurs()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        for name in added:
            os.environ.pop(name, None)


class _ToOurs(logging.Handler):
    """Makes what a library logs a detail of our log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on; our own records come here too, and were shown."""
        if record.name.partition(".")[0] not in ("fluxc", "fluxrt"):
            logging.getLogger("fluxc").debug("%s: %s", record.name, record.getMessage())
