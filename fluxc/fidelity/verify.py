"""`fluxc verify`: every file's hash, then an image generated again against the recorded one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import fluxrt
from fluxc.base.errors import BuildError
from fluxc.fidelity.metrics import psnr
from fluxrt.bundle import Bundle, open_bundle, verify_files
from fluxrt.choose import Machine, obstacle, this_machine
from fluxrt.manifest import RecordedImage, Target
from fluxrt.request import Request

LEAST_PSNR_DB = 40.0
LEAST_PSNR_DB_OF_ANOTHER = 25.0
"""Of an image that a CPU target with the same rounding generated: an engine rounds at other places."""


def verify_bundle(path: Path, target: str | None = None) -> Iterator[str]:
    """Yield a line for each check that passed; raises BundleError or BuildError at the first that does not.

    Images are compared as 8-bit PNGs. Another CPU may round differently, so they must agree to 40 dB, not to the bit.
    """
    bundle = open_bundle(path)
    verify_files(bundle)
    yield f"files: {len(bundle.manifest.files)} match their SHA-256"
    if target is not None:
        bundle.target(target)
    machine = Machine(None) if all(t.device == "cpu" for t in bundle.manifest.targets) else this_machine()
    for entry in bundle.manifest.targets:
        if target not in (None, entry.name):
            continue
        reason = obstacle(bundle, entry, machine)
        if reason:
            yield f"target {entry.name}: generates nothing here: {reason}"
            continue
        recorded, least = _recorded(bundle, entry)
        if recorded is None:
            yield f"target {entry.name}: no image was recorded"
            continue
        with contextlib.closing(fluxrt.load(path, target=entry.name)) as pipeline:
            result = pipeline.generate(request_of(recorded))
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
        yield f"target {entry.name}: the recorded image is generated again ({exact})"


def _recorded(bundle: Bundle, target: Target) -> tuple[RecordedImage | None, float]:
    """An image to generate again with `target`, and the dB it must agree to: its own, or of a target that rounds as it does."""
    rounding = {t.name for t in bundle.manifest.targets if t.activations == target.activations}
    for names, least in (({target.name}, LEAST_PSNR_DB), (rounding, LEAST_PSNR_DB_OF_ANOTHER)):
        for image in bundle.manifest.images:
            if image.target in names:
                return image, least
    return None, 0.0


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
