"""A target on several GPUs: two images one after the other, and what is said when a rank is killed in the middle of one."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from fluxc.base.numbers import significant
from fluxc.fidelity.metrics import psnr
from fluxc.fidelity.verify import LEAST_PSNR_DB_OF_ANOTHER, request_of
from fluxc.gpu_check.child import Found
from fluxc.gpu_check.images import NOT_RECORDED, read_image
from fluxc.gpu_check.subject import Subject, recorded_images
from fluxrt.errors import BackendError
from fluxrt.ranked import RankedPipeline, RankError

NOTHING = (
    "nothing here can stand in for ranks on several GPUs; build the bundle with an onnxruntime target with gpus: 2"
)
VICTIM = 1


def check_ranks(subject: Subject) -> Found:
    """Two images against those recorded on a CPU. The second is where ranks that captured differently would hang."""
    bundle, target = subject.open()
    recorded = recorded_images(bundle, target)[:2]
    if not recorded:
        return Found(skipped=NOT_RECORDED)
    began = time.perf_counter()
    pipeline = subject.place.ranked(bundle, target)
    if pipeline is None:
        return Found(skipped=NOTHING)
    rows: list[dict[str, Any]] = []
    with pipeline:
        started = time.perf_counter() - began
        for image in recorded:
            result = pipeline.generate(request_of(image))
            pixels = np.asarray(result.images[0]) / 255.0
            rows.append(
                {
                    "prompt": image.prompt,
                    "against": image.target,
                    "psnr_db": significant(psnr(pixels, read_image(bundle, image.file))),
                    "seconds": {what: significant(took) for what, took in result.seconds.items()},
                }
            )
        notes = list(pipeline.notes)
    faults = [
        f"{row['prompt']!r} is at {row['psnr_db']:.1f} dB of the image {row['against']} recorded (at least "
        f"{LEAST_PSNR_DB_OF_ANOTHER:g} dB)"
        for row in rows
        if row["psnr_db"] < LEAST_PSNR_DB_OF_ANOTHER
    ]
    return Found({"ranks": target.gpus, "started_s": significant(started), "images": rows, "notes": notes}, faults)


def check_kill(subject: Subject) -> Found:
    """Kill rank 1 after the first step: the command must end within seconds, name that rank, and leave no process."""
    bundle, target = subject.open()
    recorded = recorded_images(bundle, target)
    if not recorded:
        return Found(skipped=NOT_RECORDED)
    pipeline = subject.place.ranked(bundle, target)
    if pipeline is None:
        return Found(skipped=NOTHING)
    killed = 0.0
    ranks = pipeline.processes

    def kill(done: int, total: int) -> None:
        nonlocal killed
        if not killed:
            killed = time.perf_counter()
            os.kill(ranks[VICTIM], signal.SIGKILL)

    try:
        said = _error_of(pipeline, recorded[0], kill)
    finally:
        pipeline.close()
    figures = {"said": said, "seconds_to_the_error": significant(time.perf_counter() - killed) if killed else None}
    left = [pid for pid in ranks if _is_alive(pid)]
    faults = [] if f"rank {VICTIM} " in said else [f"the error does not name rank {VICTIM}: {said}"]
    return Found(figures, faults + ([f"processes are left: {left}"] if left else []))


def _error_of(pipeline: RankedPipeline, image: Any, kill: Any) -> str:
    try:
        pipeline.generate(request_of(image), kill)
    except RankError as error:
        return str(error)
    raise BackendError("an image was generated although one of its ranks was killed")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
