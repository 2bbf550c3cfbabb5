"""What ran on the target, as a bundle keeps it: entries of the manifest's `fidelity`, and files of its report.

They are about a bundle and no part of what runs, so a bundle is the same one before and after they were added.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fluxrt.manifest import File, Manifest, manifest_digest

FIELD = "on_target"
FILES = "report/on-target-"
"""What the names of its files in the report begin with."""


def entries_of(manifest: Manifest) -> list[dict[str, Any]]:
    """The entries of `manifest`, one for each GPU whose figures were added."""
    found: list[dict[str, Any]] = manifest.fidelity.get(FIELD, [])
    return found


def with_entries(manifest: Manifest, entries: list[dict[str, Any]], files: dict[str, File]) -> Manifest:
    """`manifest` with these entries and the report's `files` about them, in place of those it had."""
    others = {name: file for name, file in manifest.files.items() if not name.startswith(FILES)}
    fidelity = {key: value for key, value in manifest.fidelity.items() if key != FIELD}
    return msgspec.structs.replace(
        manifest,
        fidelity=fidelity | ({FIELD: entries} if entries else {}),
        files=dict(sorted((others | files).items())),
    )


def digest_without_entries(manifest: Manifest) -> str:
    """The digest `manifest` has without them: SHA-256 of what was built, whatever was added afterwards."""
    return manifest_digest(with_entries(manifest, [], {}))
