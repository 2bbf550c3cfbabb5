"""A toy pipeline, for a kind of target that runs no graphs: every image is of one colour, its seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from fluxrt.result import Result

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Target
    from fluxrt.request import Request
    from fluxrt.result import OnImage, OnStep


class PlainPipeline:
    """What a `Kind` makes in place of a backend."""

    def __init__(self, bundle: Bundle, target: Target, threads: int | None, gpus: int | None) -> None:
        self.bundle, self.target, self.gpus = bundle, target, gpus
        self.notes = ["no graph was run"]
        self.is_closed = False

    def generate(self, request: Request, on_step: OnStep | None = None, on_image: OnImage | None = None) -> Result:
        _, _, (height, width) = request.with_defaults(self.bundle.manifest.sampling)
        images = [Image.new("RGB", (width, height), (seed, seed, seed)) for seed in request.seeds]
        for number, image in enumerate(images if on_image else []):
            on_image(number, image, ())
        return Result(images, {}, [()] * len(images), target=self.target.name)

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> PlainPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
