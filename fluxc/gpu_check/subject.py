"""What a check is about: a bundle, one of its targets, where it runs, how much is measured; and a target, loaded."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.gpu_check.place import Place
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.manifest import RecordedImage, Target

if TYPE_CHECKING:
    from fluxrt.cuda import Driver
    from fluxrt.pipeline import Pipeline

IMAGES = 3


@dataclass(frozen=True)
class Amount:
    """How much is measured.

    Steps that are timed, images that go before them, repetitions of text encoding and decoding, runs of a block, and the models
    whose blocks are timed, with their image and text tokens.
    """

    steps: int = 200
    warm: int = 3
    phases: int = 20
    runs: int = 100
    models: tuple[str, ...] = ("klein-4b", "klein-9b", "dev")
    tokens: int = 4096
    text_tokens: int = 512


REHEARSED = Amount(steps=3, warm=1, phases=1, runs=2, models=("tiny",), tokens=64, text_tokens=32)


@dataclass(frozen=True)
class Subject:
    """`kernels` is where compiled kernels are kept between checks, `pictures` where images go, `cache` where traced graphs are;
    `settings` are the check's own."""

    place: Place
    bundle: str
    target: str
    amount: Amount
    kernels: str
    pictures: str
    cache: str
    settings: dict[str, Any] = field(default_factory=dict)

    def open(self) -> tuple[Bundle, Target]:
        """The bundle, and the target the check is about."""
        bundle = open_bundle(self.bundle)
        return bundle, bundle.target(self.target)

    @contextlib.contextmanager
    def load(self, captures: bool = True) -> Iterator[Loaded]:
        """The target's pipeline on the first GPU, closed afterwards."""
        from fluxrt.pipeline import Pipeline

        # Where fluxrt keeps kernels; the user's own cache would hide a cold start, and be filled by a check.
        os.environ["XDG_CACHE_HOME"] = self.kernels
        bundle, target = self.open()
        driver = self.place.driver()
        free = driver.memory()[0]
        began = time.perf_counter()
        backend = self.place.backend(bundle, target, driver, captures)
        pipeline = Pipeline(bundle, target=target.name, backend=backend)
        with pipeline:
            yield Loaded(pipeline, driver, free, time.perf_counter() - began)


@dataclass(frozen=True)
class Loaded:
    """A pipeline; its GPU, the bytes that were free there before, and the seconds that making the pipeline took."""

    pipeline: Pipeline
    driver: Driver
    free: int
    seconds: float

    def wait(self) -> None:
        """Until the GPU has done everything."""
        self.driver.synchronize()


def twin_of(bundle: Bundle, target: Target) -> Target | None:
    """The bundle's target for one CPU process that rounds as `target` does, else any such, else None."""
    on_cpu = [t for t in bundle.manifest.targets if t.device == "cpu" and t.gpus == 1]
    on_cpu.sort(key=lambda one: bool(one.computed_in))
    return next((t for t in on_cpu if t.activations == target.activations), on_cpu[0] if on_cpu else None)


def recorded_images(bundle: Bundle, target: Target) -> list[RecordedImage]:
    """Three recorded requests, the last one the first again, whose image must then be the same to the bit."""
    twin = twin_of(bundle, target)
    recorded = [image for image in bundle.manifest.images if twin is not None and image.target == twin.name]
    if not recorded:
        return []
    return [recorded[0], recorded[min(1, len(recorded) - 1)], recorded[0]][:IMAGES]


def file_hashes(bundle: Bundle) -> dict[str, str]:
    """SHA-256 by name, as the manifest has it, of every graph, plan and weights file that a target of `bundle` runs."""
    from fluxrt.manifest import Graph, TensorRTTarget

    names: set[str] = set()
    for target in bundle.manifest.targets:
        for part in target.parts:
            names |= {part.file, part.weights} if isinstance(part, Graph) else {part.file or part.source}
        if isinstance(target, TensorRTTarget):
            names |= {program.weights for program in target.engine.programs.values()}
    files = bundle.manifest.files
    found = {name: files[name].sha256 for name in names if name in files}
    for index in [name for name in found if name.endswith(".index.json")]:
        folder = Path(index).parent.as_posix()
        found |= {n: f.sha256 for n, f in files.items() if n.startswith(f"{folder}/") and n.endswith(".safetensors")}
    return dict(sorted(found.items()))
