"""The comparison stage: every target of a bundle in the making against the reference: figures, evidence, images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import Made
from fluxc.base.progress import Report
from fluxc.recipe.targets import Target
from fluxrt.bundle import Bundle


@dataclass(frozen=True)
class Draft:
    """A bundle that is being made: of its manifest, what its images and its report depend on."""

    bundle: Bundle

    def fingerprint(self) -> Any:
        """Its files' hashes, targets, prompting, sampling and the steps of each body; every step is computed, so not the step
        cache."""
        manifest = self.bundle.manifest
        files = {name: [file.size, file.sha256] for name, file in manifest.files.items()}
        return [
            files,
            msgspec.to_builtins([manifest.targets, manifest.prompting, manifest.sampling]),
            msgspec.to_builtins(manifest.step_precision or None),
        ]


@dataclass(frozen=True)
class CompareInputs:
    """`reference` is what ReferenceInputs with these prompts, size, steps, guidance and seed came to, `title` says how; None
    with the `level` "none", where nothing is compared."""

    title: str
    level: str
    reference: Made | None
    prompts: list[str]
    size: tuple[int, int]
    steps: int
    guidance: float
    seed: int
    targets: tuple[Target, ...]
    draft: Draft


def run(inputs: CompareInputs, folder: Path, report: Report) -> None:
    """Write figures.json, evidence.json and evidence/, report/images/ and images.json."""
    from fluxc.fidelity.run import measure, measure_nothing

    if inputs.reference is None:
        measure_nothing(folder, inputs)
    else:
        measure(folder, inputs, report)


def load(folder: Path) -> Path:
    """The folder."""
    return folder
