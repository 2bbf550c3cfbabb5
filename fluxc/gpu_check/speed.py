"""How long text, a step and the decoder take, and what a start costs while nothing is compiled and when everything is."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fluxc.base.errors import BuildError
from fluxc.base.numbers import significant
from fluxc.fidelity.verify import request_of
from fluxc.gpu_check.child import Found, run_limited
from fluxc.gpu_check.subject import Loaded, Subject, recorded_images
from fluxrt.pipeline import starting_noise
from fluxrt.schedule import SCHEDULES

NOT_RECORDED = "the bundle has no recorded request; build it with a CPU target beside"
START_LIMIT = 110.0


def check_steps(subject: Subject) -> Found:
    """Milliseconds of text encoding, a step and decoding, each until the GPU is done: median, 99th percentile, how many.

    Three images go before: kernels are compiled and steps captured. The host's part of a step is in its time.
    """
    bundle, target = subject.open()
    recorded = recorded_images(bundle, target)
    if not recorded:
        return Found(skipped=NOT_RECORDED)
    request, amount, sampling = recorded[0], subject.amount, bundle.manifest.sampling
    with subject.load() as loaded:
        pipeline = loaded.pipeline
        for _ in range(subject.amount.warm):
            result = pipeline.generate(request_of(request))
        grid = pipeline.grid(request.size)
        tokens = grid[0] * grid[1]
        words = pipeline.tokenize(pipeline.branches(request.prompt, request.guidance))
        latents = starting_noise(request.seed, tokens, sampling.latent_channels)[None]
        pairs = itertools.pairwise(SCHEDULES[sampling.schedule](tokens, request.steps))
        steps_of_image = [(*pair, body) for pair, body in zip(pairs, pipeline.bodies(request.steps), strict=True)]
        endless = itertools.cycle(steps_of_image)
        text = _times(loaded, amount.phases, lambda: pipeline.begin(latents, grid, request.guidance, words))
        steps = _times(loaded, amount.steps, lambda: pipeline.step(*next(endless)))
        final = pipeline.latents()
        decode = _times(loaded, amount.phases, lambda: pipeline.decode(final, grid))
        notes = list(pipeline.notes)
    figures = {
        "size": list(request.size),
        "tokens": tokens,
        "branches": len(words[0]),
        "text": text,
        "step": steps,
        "decode": decode,
        "image_s": {what: significant(took) for what, took in result.seconds.items()},
        "steps_of_image": request.steps,
        "notes": notes,
    }
    return Found(figures)


def check_start(subject: Subject) -> Found:
    """Seconds from a new process to a first image, without compiled kernels and with those the first one left."""
    bundle, target = subject.open()
    if not recorded_images(bundle, target):
        return Found(skipped=NOT_RECORDED)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fluxc-kernels-") as kernels:
        for name in ("cold", "warm"):
            ended = run_limited(first_image, (replace(subject, kernels=kernels),), START_LIMIT, own_group=False)
            if ended.how != "returned":
                raise BuildError(f"the {name} start {ended.how}: {ended.why}; {ended.log[-500:]}")
            figures[name] = ended.value | {"process_s": significant(ended.seconds)}
    return Found(figures)


def first_image(subject: Subject) -> dict[str, Any]:
    """Seconds until the pipeline was made, and of its first and second image."""
    bundle, target = subject.open()
    request = request_of(recorded_images(bundle, target)[0])
    with subject.load() as loaded:
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            loaded.pipeline.generate(request)
            seconds.append(significant(time.perf_counter() - began))
        notes = list(loaded.pipeline.notes)
    return {
        "load_s": significant(loaded.seconds),
        "first_image_s": seconds[0],
        "second_image_s": seconds[1],
        "notes": notes,
    }


def summary_ms(seconds: list[float]) -> dict[str, Any]:
    """p50 and p99 in milliseconds, and of how many."""
    return {
        "p50_ms": significant(1e3 * float(np.percentile(seconds, 50))),
        "p99_ms": significant(1e3 * float(np.percentile(seconds, 99))),
        "count": len(seconds),
    }


def _times(loaded: Loaded, count: int, work: Callable[[], Any]) -> dict[str, Any]:
    work()
    loaded.wait()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        loaded.wait()
        seconds.append(time.perf_counter() - began)
    return summary_ms(seconds)
