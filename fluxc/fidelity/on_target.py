"""What ran on the target, as a bundle keeps it: entries of the manifest's `fidelity`, and files of its report.

They are about a bundle and no part of what runs, so a bundle is the same one before and after they were added.
"""

from __future__ import annotations

import msgspec

from fluxrt.manifest import File, Manifest, OnTarget, manifest_digest

FILES = "report/on-target-"
"""What the names of its files in the report begin with."""


def entries_of(manifest: Manifest) -> tuple[OnTarget, ...]:
    """The entries of `manifest`, one for each machine whose figures were added."""
    found = manifest.fidelity.on_target
    return () if isinstance(found, msgspec.UnsetType) else found


def with_entries(manifest: Manifest, entries: tuple[OnTarget, ...], files: dict[str, File]) -> Manifest:
    """`manifest` with these entries and the report's `files` about them, in place of those it had."""
    others = {name: file for name, file in manifest.files.items() if not name.startswith(FILES)}
    # Without any, the manifest is to the byte what a build writes.
    fidelity = msgspec.structs.replace(manifest.fidelity, on_target=entries or msgspec.UNSET)
    return msgspec.structs.replace(
        manifest,
        fidelity=fidelity,
        files=dict(sorted((others | files).items())),
    )


def digest_without_entries(manifest: Manifest) -> str:
    """The digest `manifest` has without them: SHA-256 of what was built, whatever was added afterwards."""
    return manifest_digest(with_entries(manifest, (), {}))
