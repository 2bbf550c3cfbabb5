"""Threads that share a pipeline: every image is the one that a thread alone gets, and memory does not grow."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import fluxrt
from campaign.cases import Outcome, Tally

WORDS = ("red circle", "blue ring", "green cross", "yellow triangle", "white square", "purple star", "black bar", "dot")
GROWTH = 32 << 20
"""Bytes that a process may grow by between the first third of the images and the last."""


def campaign(bundle: Path, threads: int, images: int) -> list[Tally]:
    """`threads` threads with `images` each, on a pipeline of one process and of two."""
    return [_serve(bundle, gpus, threads, images) for gpus in (1, 2)]


def _serve(bundle: Path, gpus: int, threads: int, images: int) -> Tally:
    tally = Tally(f"{threads} threads x {images} images, {gpus} process{'es' if gpus > 1 else ''}")
    with fluxrt.load(bundle, gpus=gpus, threads=1) as pipeline:

        def made(number: int) -> str:
            # Two prompts at guidance 1 and two steps among the others: other rows, other loops.
            guidance, steps = (1.0, 2) if number % 4 == 3 else (1.5, 1)
            prompt = f"a {WORDS[number % len(WORDS)]} on a grey background"
            request = fluxrt.Request(prompt, seed=number % 5, guidance=guidance, steps=steps)
            return hashlib.sha256(pipeline.generate(request).images[0].tobytes()).hexdigest()

        kinds = min(len(WORDS) * 5, threads * images // 2)
        alone = [made(number) for number in range(kinds)]
        counted, sizes = threading.Lock(), []

        def serve(thread: int) -> None:
            for number in range(images):
                at = (thread * 7 + number) % kinds
                try:
                    same = made(at) == alone[at]
                    outcome = Outcome("image") if same else Outcome("exception", "another image than alone")
                except BaseException as error:
                    outcome = Outcome("exception", f"{type(error).__name__}: {str(error)[:200]}")
                with counted:
                    tally.add(f"{tally.kind}, thread {thread}, image {number}", outcome)
                    sizes.append(_resident())

        workers = [threading.Thread(target=serve, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    third = len(sizes) // 3
    grown = max(sizes[-third:]) - max(sizes[:third]) if third else 0
    print(
        f"{tally.kind}: {max(sizes) >> 20} MiB at most, grown by {grown >> 10} KiB over the last two thirds", flush=True
    )
    if grown > GROWTH:
        tally.add(tally.kind, Outcome("memory", f"grown by {grown} bytes"))
    return tally


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
