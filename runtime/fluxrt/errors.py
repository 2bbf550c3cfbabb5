"""The one family of errors a user may see: what is wrong, where, what to do."""

from __future__ import annotations


class FluxError(Exception):
    """A failure the user can act on; `exit_code` is what the command line returns for it."""

    exit_code = 1


class BundleError(FluxError):
    """A bundle that is missing, damaged, altered or of another format."""


class RequestError(FluxError):
    """A request this bundle cannot serve: size, prompt length, steps, target."""

    exit_code = 2


class BackendError(FluxError):
    """A library, device or graph that cannot run here."""


class OutputError(FluxError):
    """A file that cannot be written: no room, no right, or a name that the system does not take."""


class VerifyError(FluxError):
    """A target that computes something else than what the bundle's evidence records."""
