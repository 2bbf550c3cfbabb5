"""Images on the GPU: against those a CPU recorded when the bundle was built, and captured steps against eager ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxc.base.numbers import significant
from fluxc.fidelity.metrics import psnr
from fluxc.fidelity.verify import LEAST_PSNR_DB_OF_ANOTHER, request_of
from fluxc.gpu_check.child import Found
from fluxc.gpu_check.subject import Subject, recorded_images

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle

NOT_RECORDED = (
    "the bundle has no image of a CPU target to compare with; add {kind: onnxruntime} to the recipe's targets"
)


def check_images(subject: Subject) -> Found:
    """Three images against the CPU's (25 dB, as `fluxc verify` asks) and against diffusers' (the recipe's gate, if any).

    The third request is the first again: its image must be the same to the bit, although its steps are launched as graphs and
    those of the first were not.
    """
    from PIL import Image

    bundle, target = subject.open()
    recorded = recorded_images(bundle, target)
    if not recorded:
        return Found(skipped=NOT_RECORDED)
    gate = subject.settings.get("image_psnr_db")
    faults: list[str] = []
    rows: list[dict[str, Any]] = []
    seen: list[bytes] = []
    with subject.load() as loaded:
        for number, image in enumerate(recorded):
            result = loaded.pipeline.generate(request_of(image))
            pixels = np.asarray(result.images[0])
            seen.append(pixels.tobytes())
            file = Path(subject.pictures) / f"{target.name}-{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
            row: dict[str, Any] = {
                "prompt": image.prompt,
                "against": image.target,
                "psnr_db": significant(psnr(pixels / 255.0, read_image(bundle, image.file))),
                "sha256": hashlib.sha256(seen[-1]).hexdigest(),
                "file": f"{file.parent.name}/{file.name}",
                "seconds": {what: significant(took) for what, took in result.seconds.items()},
            }
            if row["psnr_db"] < LEAST_PSNR_DB_OF_ANOTHER:
                faults.append(
                    f"{image.prompt!r} is at {row['psnr_db']:.1f} dB of the image {image.target} recorded (at least "
                    f"{LEAST_PSNR_DB_OF_ANOTHER:g} dB)"
                )
            reference = image.file.replace(f"/{image.target}-", "/reference-")
            if reference in bundle.manifest.files:
                row["diffusers_psnr_db"] = significant(psnr(pixels / 255.0, read_image(bundle, reference)))
            rows.append(row)
        notes = list(loaded.pipeline.notes)
    if seen[0] != seen[2]:
        faults.append(
            "the first request, asked again, gave another image: eager and launched steps differ, or memory does"
        )
    against_diffusers = [row["diffusers_psnr_db"] for row in rows if "diffusers_psnr_db" in row]
    if gate is not None and against_diffusers and np.mean(against_diffusers) < gate:
        faults.append(
            f"images are at {np.mean(against_diffusers):.1f} dB of diffusers' on average (the recipe's gate: {gate})"
        )
    return Found({"images": rows, "loaded_s": significant(loaded.seconds), "notes": notes}, faults)


def check_graphs(subject: Subject) -> Found:
    """The same three images with every call launched by itself and with steps captured: latents and pixels, bit for bit."""
    bundle, target = subject.open()
    recorded = recorded_images(bundle, target)
    if not recorded:
        return Found(skipped=NOT_RECORDED)
    made: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {}
    notes: list[str] = []
    for captures in (False, True):
        with subject.load(captures) as loaded:
            made[captures] = []
            for image in recorded:
                result = loaded.pipeline.generate(request_of(image))
                made[captures].append((loaded.pipeline.latents(), np.asarray(result.images[0])))
            notes += loaded.pipeline.notes if captures else []
    faults = [f"a fallback: {note}" for note in notes]
    rows = []
    for image, (eager, eager_pixels), (captured, pixels) in zip(recorded, made[False], made[True], strict=True):
        different = int((eager.view(np.uint32) != captured.view(np.uint32)).sum())
        row = {
            "prompt": image.prompt,
            "latents": int(eager.size),
            "latents_that_differ": different,
            "pixel_values_that_differ": int((eager_pixels != pixels).sum()),
            "largest_difference": significant(float(np.abs(eager - captured).max())),
        }
        rows.append(row)
        if different or row["pixel_values_that_differ"]:
            faults.append(
                f"{image.prompt!r}: {different} of {eager.size} latents and {row['pixel_values_that_differ']} values of pixels "
                "differ between eager calls and captured steps"
            )
    return Found({"images": rows, "notes": notes}, faults)


def read_image(bundle: Bundle, name: str) -> np.ndarray:
    """The image in a file of the bundle, float64 [height, width, 3] in 0..1."""
    from PIL import Image

    with Image.open(bundle.path(name)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64) / 255
