"""The files of a checkpoint as a stage's input: the stage reads them, its key takes their hashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxc.base.measured import CHECKPOINT_PARTS
from fluxc.base.progress import Report
from fluxc.checkpoint.components import small_files
from fluxc.checkpoint.source import WEIGHTED, Checkpoint

Digests = dict[str, dict[str, str]]
"""By component ("" for the folder itself), then file name: SHA-256."""


@dataclass(frozen=True)
class CheckpointFiles:
    """An opened checkpoint with the hashes of its files; a stage may read those of `parts` alone."""

    checkpoint: Checkpoint
    digests: Digests
    parts: tuple[str, ...] = CHECKPOINT_PARTS

    def of(self, *parts: str) -> CheckpointFiles:
        """The same with other parts."""
        return replace(self, parts=parts)

    def hashes(self) -> Digests:
        """The hashes of `parts`."""
        return {part: self.digests[part] for part in self.parts}

    def fingerprint(self) -> Any:
        """What a stage's key takes of it."""
        return self.hashes()

    def hashed_files(self) -> dict[Path, str]:
        """The files of `parts` themselves, with their hashes."""
        listed = files_read(self.checkpoint)
        return {file: self.digests[part][file.name] for part in self.parts for file in listed[part]}


@dataclass(frozen=True)
class ComponentFiles:
    """A component's weights files with their hashes, for a stage that reads their tensors."""

    digests: dict[Path, str]

    def fingerprint(self) -> Any:
        """The hashes by name."""
        return {file.name: digest for file, digest in self.digests.items()}

    def hashed_files(self) -> dict[Path, str]:
        """The files with their hashes."""
        return self.digests


@dataclass(frozen=True)
class Aside:
    """A folder that a stage keeps unfinished work in; no part of what its result depends on."""

    folder: Path

    def fingerprint(self) -> Any:
        """Nothing of it counts."""
        return None


def files_read(checkpoint: Checkpoint) -> dict[str, list[Path]]:
    """Every file that a build reads of the checkpoint, by component."""
    files = {"": [checkpoint.root / "model_index.json"]}
    for name, component in checkpoint.components.items():
        files[name] = small_files(component) + (component.weight_files if name in WEIGHTED else [])
    return files


def checkpoint_digests(checkpoint: Checkpoint, digest: Callable[[Path], str], report: Report) -> Digests:
    """The hashes of everything a build reads from the checkpoint; `report` counts bytes."""
    files = files_read(checkpoint)
    total = sum(file.stat().st_size for group in files.values() for file in group)
    done = 0
    digests: Digests = {}
    for name, group in files.items():
        digests[name] = {}
        for file in group:
            digests[name][file.name] = digest(file)
            done += file.stat().st_size
            report(done, total)
    return digests
