"""Generates with a bundle's visual_gen folder through TensorRT-LLM's VisualGen, where tensorrt-llm is installed.

VisualGen starts from noise of its own (torch's generator), so a seed gives another image than with the other targets. What it
has built in, and would compute whatever it is asked for, is refused here.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrt.errors import BackendError, BundleError, RequestError
from fluxrt.prompt import PromptEncoder
from fluxrt.request import Request, check_request
from fluxrt.resolve import grid_of, say_what, unused_guidance
from fluxrt.result import Result
from fluxrt.turns import Turns

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle
    from fluxrt.manifest import VisualGenTarget
    from fluxrt.result import OnImage, OnStep

LOG = logging.getLogger("fluxrt")
PIXELS_PER_TOKEN = 16
"""What VisualGen takes a token of any FLUX.2 for, a side."""


def how_to_serve(bundle: Bundle, target: VisualGenTarget, gpus: int = 1) -> str:
    """The command that serves the folder with TensorRT-LLM."""
    return how_to_serve_folder(bundle.root, target, gpus)


def how_to_serve_folder(root: Path, target: VisualGenTarget, gpus: int) -> str:
    """The same for a bundle at `root`, wherever that is."""
    config = target.configs.get(str(gpus), "Ngpu.yaml")
    return f"trtllm-serve {root / target.folder} --visual_gen_args {root / config}"


def is_installed() -> bool:
    """Whether tensorrt-llm with VisualGen can be imported; importing it takes its time, so it is only looked for."""
    from importlib.util import find_spec

    return find_spec("tensorrt_llm") is not None


class VisualGenPipeline:
    """The folder loaded by VisualGen on `gpus` GPUs; TensorRT-LLM starts the ranks itself."""

    def __init__(self, bundle: Bundle, target: VisualGenTarget, gpus: int = 1) -> None:
        if str(gpus) not in target.configs:
            raise RequestError(
                f"{bundle.root}: the visual_gen folder has settings for {', '.join(target.configs)} GPUs, not {gpus}; choose "
                "one of these with --gpus, or add it to the recipe's gpus and rebuild"
            )
        pixels = bundle.manifest.sampling.pixels_per_token
        if pixels != PIXELS_PER_TOKEN:
            raise BundleError(
                f"{bundle.root}: VisualGen takes every image token for {PIXELS_PER_TOKEN} pixels a side, this bundle's have "
                f"{pixels}, so images would have another size; choose another target"
            )
        try:
            from tensorrt_llm import VisualGen, VisualGenArgs
        except (ImportError, OSError) as error:
            raise BackendError(
                f"target {target.name!r} needs tensorrt-llm, which cannot be imported here ({error}). Where it is installed, "
                f"run this again, or serve the folder: {how_to_serve(bundle, target, gpus)}"
            ) from error
        self.bundle, self.target, self._gpus = bundle, target, gpus
        self.notes: list[str] = []
        self._turns = Turns()
        config = bundle.checked_file(target.configs[str(gpus)])
        self._args = VisualGenArgs.from_yaml(str(config))
        if all(_is_enabled(self._args, name) for name in ("torch_compile_config", "cuda_graph_config")):
            raise BundleError(
                f"{config}: torch_compile_config and cuda_graph_config are both enabled, which TensorRT-LLM lists as a known "
                "failure; build the bundle again"
            )
        prompting = bundle.manifest.prompting
        self._encoder = PromptEncoder(prompting, bundle.checked_file(prompting.tokenizer))
        transformer = json.loads(bundle.checked_file(f"{target.folder}/transformer/config.json").read_bytes())
        self._embeds_guidance = bool(transformer.get("guidance_embeds"))
        LOG.info("VisualGen makes its own starting noise: a seed gives another image than with the other targets")
        self._engine = VisualGen(model=str(bundle.root / target.folder), args=self._args)

    def __call__(self, prompt: str | list[str], **options: Any) -> Result:
        """`generate` with a Request of this prompt or these prompts, and of its other fields by name."""
        return self.generate(Request(prompt, **options))

    def generate(self, request: Request, on_step: OnStep | None = None, on_image: OnImage | None = None) -> Result:
        """One image a prompt, as Pipeline does, for one caller at a time; `on_step` is called after every image.

        Raises RequestError for what VisualGen decides by itself: the starting noise, skipped steps, and guidance where it is a
        second row a step, which VisualGen does not compute.
        """
        with self._turns.turn():
            return self._generate(request, on_step, on_image)

    def _generate(self, request: Request, on_step: OnStep | None, on_image: OnImage | None) -> Result:
        sampling = self.bundle.manifest.sampling
        if check_request(request).latents is not None:
            raise RequestError("VisualGen makes its own starting noise; give a seed")
        if (request.batch or 1) > 1:
            raise RequestError("VisualGen is given one prompt a call; leave batch out, or choose another target")
        if request.threshold is not None or (request.step_cache is False and self._args.cache_config is not None):
            raise RequestError(
                "VisualGen takes its step cache from the YAML in the bundle; leave step_cache and threshold out of the "
                "request, or change step_cache in the recipe and rebuild"
            )
        steps, guidance, size = request.with_defaults(sampling)
        rows, columns = grid_of(sampling, self.target, size)
        if rows * columns % self._gpus:
            raise RequestError(
                f"size {size[0]}x{size[1]} (height x width) has {rows * columns} image tokens, which {self._gpus} GPUs cannot "
                f"share equally, and VisualGen does not pad; choose a size with a multiple of {self._gpus}"
            )
        if sampling.cfg_batch and guidance > 1:
            raise RequestError(
                f"guidance {guidance:g} needs the row of the empty prompt, and VisualGen computes the prompt's alone; ask for "
                "guidance 1 (--guidance 1), or for another target"
            )
        # VisualGen would cut a longer one without a word.
        self._encoder.encode(request.prompts)
        say_what(request, steps, guidance, size)
        unused = unused_guidance(sampling, self._embeds_guidance, request)
        if unused:
            LOG.info("%s", unused)
        images, began = [], time.perf_counter()
        for number, (words, start) in enumerate(zip(request.prompts, request.seeds, strict=True)):
            params = self._engine.default_params
            params.height, params.width = size
            params.num_inference_steps, params.guidance_scale = steps, guidance
            params.max_sequence_length, params.seed = self.target.text_length, start
            # VisualGen takes nothing out of a prompt.
            words = self._encoder.without_removed(words)
            images.append(_image(self._engine.generate(inputs=words, params=params)))
            if on_step:
                on_step(number + 1, len(request.prompts))
            if on_image:
                on_image(number, images[-1], ())
        seconds = {"text": 0.0, "steps": time.perf_counter() - began, "decode": 0.0}
        return Result(images, seconds, [()] * len(images), [unused] if unused else [], self.target.name)

    def __enter__(self) -> VisualGenPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End VisualGen's processes, when the request that is being served has returned."""
        with self._turns.turn():
            self._engine.shutdown()


def _is_enabled(args: Any, section: str) -> bool:
    return bool(getattr(getattr(args, section, None), "enable", False))


def _image(output: Any) -> Any:
    """The image of a generation, by way of the file that VisualGen writes."""
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="fluxrt-") as folder:
        path = Path(folder) / "image.png"
        output.save(str(path))
        with Image.open(path) as image:
            return image.convert("RGB")
