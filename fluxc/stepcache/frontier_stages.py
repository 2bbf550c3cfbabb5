"""The stages of the frontier: images with every step, with so many skipped by each method, as served; the report's figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fluxc.base.cache import Made
from fluxc.base.progress import Report
from fluxrt.bundle import Bundle

if TYPE_CHECKING:
    from fluxc.stepcache.frontier import FrontierRequest

PARTS = ("transformer/", "text_encoder/", "vae/", "tokenizer/")
"""The files of a bundle that its images depend on."""


@dataclass(frozen=True)
class DraftTarget:
    """A target of a bundle in the making: of its manifest, what its images depend on."""

    bundle: Bundle
    target: str

    def fingerprint(self) -> Any:
        """The hashes of PARTS, prompting, sampling, the target's own entry and the steps of each body."""
        manifest = self.bundle.manifest
        told = [manifest.prompting, manifest.sampling, self.bundle.target(self.target), manifest.step_precision or None]
        files = {name: [f.size, f.sha256] for name, f in manifest.files.items() if name.startswith(PARTS)}
        return [files, msgspec.to_builtins(told)]


@dataclass(frozen=True)
class PointInputs:
    """`methods` say how each skips; `exclude` whose images are kept. `full` are those of every step, none where they are made.

    `judges` are the files of LPIPS (`lpips`) and of a CLIP model (`image_text`), if any.
    """

    subject: DraftTarget
    request: FrontierRequest
    methods: dict[str, dict[str, Any]]
    keep: tuple[str, ...]
    full: Made | None
    judges: dict[str, list[Path]]


def run(inputs: PointInputs, folder: Path, report: Report) -> None:
    """Write full.npy, or figures.json and METHOD.npy of the methods that are kept."""
    import numpy as np

    from fluxc.stepcache import frontier

    subject, request = inputs.subject, inputs.request
    total, done = len(request.prompts) * len(inputs.methods), 0

    def advance() -> None:
        nonlocal done
        done += 1
        report(done, total, f"{done}/{total} images")

    if inputs.full is None:
        images, _ = frontier.generate_all(subject.bundle, subject.target, request, {}, advance)
        np.save(folder / "full.npy", images)
        return
    from fluxc.fidelity.perceptual import Judges

    lpips, clip = inputs.judges.get("lpips"), inputs.judges.get("image_text")
    judges = Judges(lpips[0] if lpips else None, clip[0].parent if clip else None)
    original = np.load(inputs.full.folder / "full.npy")
    frontier.measure_point(
        folder, subject.bundle, subject.target, request, inputs.methods, original, inputs.keep, judges, advance
    )


def load(folder: Path) -> Made:
    """The folder."""
    return Made(folder)


@dataclass(frozen=True)
class FiguresInputs:
    """For the report: images with every step (`full`) and as served, `points` by skipped steps, of the step cache's `mode`, and
    the trace that its polynomial was fitted on. `reference`: images as the trace of the checkpoint's own model skips."""

    target: str
    request: FrontierRequest
    mode: str
    traced: Path
    full: Made
    served: Made
    points: dict[int, Made]
    reference: Made | None = None


def write_figures(inputs: FiguresInputs, folder: Path, report: Report) -> None:
    """Write step-cache.json, and images of every prompt with the step cache into report/images/."""
    import numpy as np

    from fluxc.stepcache.figures import Compared, write
    from fluxc.stepcache.file import read_trace

    def figures_of(made: Made) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((made.folder / "figures.json").read_text())
        return found

    points = {count: made.folder for count, made in inputs.points.items()}
    compared = Compared(
        points={count: figures_of(made) for count, made in inputs.points.items()},
        chosen=figures_of(inputs.served)["chosen"],
        reference=figures_of(inputs.reference)["reference"] if inputs.reference else None,
        full=np.load(inputs.full.folder / "full.npy"),
        served=np.load(inputs.served.folder / "chosen.npy"),
        by_count={count: np.load(path / f"{inputs.mode}.npy") for count, path in points.items()},
    )
    write(folder, inputs.target, compared, read_trace(inputs.traced).trace)
