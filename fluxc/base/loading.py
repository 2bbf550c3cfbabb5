"""What diffusers, transformers and tokenizers raise for a file they cannot take, as an error that names the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxc.base.errors import CheckpointError, FluxError


@contextmanager
def loading(where: Path, what: str = "diffusers cannot load it") -> Iterator[None]:
    """Raise CheckpointError naming `where` for whatever a library in the body raises, but for lack of memory."""
    try:
        yield
    except (FluxError, MemoryError):
        raise
    except Exception as error:
        # The libraries have no error of their own for a bad file: KeyError, TypeError and plain Exception are all seen.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{where}: {what} ({type(error).__name__}: {said[:400]}); use the checkpoint as published"
        ) from error
