"""`fluxc verify`: every file's hash, the evidence as `fluxrt verify` replays it, then recorded images generated again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

import fluxrt
from fluxc.base.errors import BuildError
from fluxc.base.progress import Report, StageProgress
from fluxc.base.threads import chosen_threads
from fluxc.fidelity.metrics import psnr
from fluxrt.bundle import Bundle, open_bundle, verify_files
from fluxrt.choose import Machine, obstacle, this_machine
from fluxrt.manifest import RecordedImage, Target
from fluxrt.request import Request
from fluxrt.result import Result
from fluxrt.verify import NO_EVIDENCE, check_passed, verify_evidence

LEAST_PSNR_DB = 40.0
LEAST_PSNR_DB_OF_ANOTHER = 25.0
"""Of an image that a CPU target with the same rounding generated: an engine rounds at other places."""


@dataclass(frozen=True)
class Verified:
    """A check that passed, or, where it could not be made, why.

    `what` is "files", "evidence" where the bundle has none, or a target's name. Of a target, `psnr_db` is the agreement of its
    image with the recorded one, None where the check is not of an image, and `prompts` are what its replay measured
    (fluxrt.verify).
    """

    what: str
    status: Literal["passed", "not run"]
    detail: str
    psnr_db: float | None = None
    prompts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The check in words."""
        return f"{'' if self.what in ('files', 'evidence') else 'target '}{self.what}: {self.detail}"


def verify_bundle(path: Path, target: str | None = None) -> Iterator[str]:
    """`verified` in words, a line for each check."""
    for check in verified(path, target, StageProgress()):
        yield check.line


def verified(path: Path, target: str | None, progress: StageProgress) -> Iterator[Verified]:
    """Check the files, then of `target`, or of every one, the evidence and an image; raises BundleError, VerifyError or
    BuildError at the first that fails.

    Images are compared as 8-bit PNGs. Another CPU may round differently, so they must agree to 40 dB, not to the bit.
    """
    bundle = open_bundle(path)
    if target is not None:
        bundle.target(target)
    with progress.stage("check the files' SHA-256"):
        verify_files(bundle)
    yield Verified("files", "passed", f"{len(bundle.manifest.files)} match their SHA-256")
    machine = Machine(None) if all(t.device == "cpu" for t in bundle.manifest.targets) else this_machine()
    entries = [entry for entry in bundle.manifest.targets if target in (None, entry.name)]
    found = {entry.name: _what_to_generate(bundle, entry, machine) for entry in entries}
    images = sum(not isinstance(what, str) for what in found.values())
    progress.expect(1 + (bundle.manifest.recorded is not None) + images)
    yield from _replayed(bundle, target, machine, progress)
    for entry in entries:
        what = found[entry.name]
        if isinstance(what, str):
            yield Verified(entry.name, "not run", what)
            continue
        recorded, least = what
        with progress.stage(f"generate with {entry.name}") as report:
            result = _generated(path, entry, recorded, report)
        with Image.open(bundle.path(recorded.file)) as image:
            expected = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        agreement = psnr(np.asarray(result.images[0], dtype=np.float64) / 255, expected)
        if agreement < least:
            raise BuildError(
                f"{path}: target {entry.name} generates {recorded.prompt!r} at only {agreement:.1f} dB of the image recorded "
                f"in {recorded.file} (at least {least:.0f} dB is expected on any machine); do not serve with it: "
                "check the runtime's version against provenance.tools, or rebuild"
            )
        exact = "identical" if agreement == 120.0 else f"{agreement:.1f} dB"
        yield Verified(entry.name, "passed", f"the recorded image is generated again ({exact})", agreement)


def _replayed(bundle: Bundle, target: str | None, machine: Machine, progress: StageProgress) -> Iterator[Verified]:
    """The evidence, replayed on each target that runs here; VerifyError naming what does not hold."""
    if bundle.manifest.recorded is None:
        yield Verified("evidence", "not run", NO_EVIDENCE)
        return
    with progress.stage("replay the evidence") as report:

        def on_part(name: str, done: int, total: int) -> None:
            report(done, total, f"target {name}, {done}/{total} parts")

        found = list(verify_evidence(bundle, target, chosen_threads(), machine=machine, on_part=on_part))
    failed = [checked for checked in found if checked.status == "failed"]
    if failed:
        check_passed(bundle, failed, target)
    for checked in found:
        if checked.status == "passed":
            yield Verified(checked.target, "passed", checked.line, prompts=[asdict(row) for row in checked.prompts])
        else:
            yield Verified(checked.target, "not run", f"evidence not replayed: {checked.why}")


def _generated(path: Path, entry: Target, recorded: RecordedImage, report: Report) -> Result:
    # A target for several GPUs divides the cores itself.
    threads = chosen_threads(entry.gpus)

    def on_step(done: int, total: int) -> None:
        report(done, total, f"step {done}/{total}")

    with contextlib.closing(fluxrt.load(path, target=entry.name, threads=threads)) as pipeline:
        return pipeline.generate(request_of(recorded), on_step)


def _what_to_generate(bundle: Bundle, target: Target, machine: Machine) -> tuple[RecordedImage, float] | str:
    """An image to generate again with `target`, and the dB it must agree to: its own, or of a target that rounds as it does.

    Where there is none, why.
    """
    reason = obstacle(bundle, target, machine)
    if reason:
        return f"generates nothing here: {reason}"
    rounding = {t.name for t in bundle.manifest.targets if t.activations == target.activations}
    for names, least in (({target.name}, LEAST_PSNR_DB), (rounding, LEAST_PSNR_DB_OF_ANOTHER)):
        for image in bundle.manifest.images:
            if image.target in names:
                return image, least
    return "no image was recorded"


def request_of(recorded: RecordedImage) -> Request:
    """The request an image was recorded for, every step computed."""
    return Request(
        recorded.prompt,
        seed=recorded.seed,
        steps=recorded.steps,
        guidance=recorded.guidance,
        size=recorded.size,
        step_cache=False,
    )
