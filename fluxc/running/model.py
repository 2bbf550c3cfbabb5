"""A checkpoint's model under a placement: prompts to embeddings, the step loop, the image, all by diffusers' own code.

The three come one after the other, each for all prompts, so that only one component is in memory. In each, every call is
diffusers' pipeline for one prompt. Read layer by layer, the calls run in lockstep: a step reads the model once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fluxc.base.progress import OfSteps
from fluxc.checkpoint.dequantized import empty_model, empty_text_encoder
from fluxc.checkpoint.identify import text_encoder_of
from fluxc.checkpoint.reference import Generation, grid_of, load_pipeline, noise_for, spread
from fluxc.checkpoint.source import Checkpoint
from fluxc.running.lockstep import CALL, Lockstep, Row, result_of, wait_for_part
from fluxc.running.placement import Placement
from fluxc.running.weights import PartWeights
from fluxrt.memory import return_memory

T = TypeVar("T")

LayerHook = Callable[[str, nn.Module], None]
"""Called with the name of a part and the module that has it, when the part has its weights."""
TRIMMED_FROM, TRIMMED_EVERY = 1 << 29, 4
"""Where a component of at least so many bytes stays in memory, glibc gives back what was freed after so many parts. Kept, it
grows to several times the activations; given back after every part, it is asked for again so often that a pass takes a fifth
longer. A small component's passes are so short that giving back would be most of the work."""


class PlacedModel:
    """A component that can be run. `module` is its torch module, on which hooks may be put; call it inside `run` only.

    Where layers are read, `on_load` is called when a part has its weights, `on_done` when all calls have gone through it and it
    still has them, and `on_progress(share, calls)` with the share of the parts that so many calls have done of a pass.
    """

    def __init__(self, module: nn.Module, weights: PartWeights, placement: Placement) -> None:
        self.module, self._weights, self._placement = module, weights, placement
        self.on_load: LayerHook | None = None
        self.on_done: LayerHook | None = None
        self.on_progress: Callable[[float, int], None] | None = None
        self._calls = 0
        self._lockstep: Lockstep | None = None
        if placement.pieces == "component":
            for part in weights.parts:
                weights.load(part)
            if sum(parameter.nbytes for parameter in module.parameters()) >= TRIMMED_FROM:
                for part in weights.parts[::TRIMMED_EVERY]:
                    module.get_submodule(part).register_forward_hook(lambda *_: return_memory())
            return
        self._lockstep = Lockstep(self._load, self._free, self._done)
        for part in weights.parts:
            module.get_submodule(part).register_forward_pre_hook(_waiting(part))

    @property
    def parts(self) -> list[str]:
        """Names of the parts that are loaded."""
        return self._weights.parts

    @property
    def reads_layers(self) -> bool:
        """Whether each part is read when it is needed; otherwise all of them are in memory."""
        return self._lockstep is not None

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of `calls`, each of which may call the module any number of times; see `call_number`."""
        with torch.no_grad():
            if self._lockstep:
                self._calls = len(calls)
                return self._lockstep.run(calls)
            results = []
            for number, call in enumerate(calls):
                token = CALL.set(number)
                try:
                    results.append(call())
                finally:
                    CALL.reset(token)
            return results

    def beside(self, work: Callable[[], Any]) -> Row | None:
        """Begin `work`, which calls the module, beside the call that runs; None where nothing is gained by that."""
        return self._lockstep.beside(work) if self._lockstep else None

    def _load(self, part: str) -> None:
        self._weights.load(part)
        if self.on_load:
            self.on_load(part, self.module)
        if self.on_progress:
            self.on_progress(self.parts.index(part) / len(self.parts), self._calls)

    def _done(self, part: str) -> None:
        if self.on_done:
            self.on_done(part, self.module)

    def _free(self, part: str) -> None:
        self._weights.free(part)
        # Weights and activations of other sizes come and go in turn; what glibc keeps between them grows from step to step.
        return_memory()


def _waiting(part: str) -> Callable[[nn.Module, Any], None]:
    return lambda _module, _inputs: wait_for_part(part)


def call_number() -> int:
    """The number, among those given to `PlacedModel.run`, of the call that is running: for hooks."""
    return CALL.get()


class ReferenceModel:
    """The model of `checkpoint` as diffusers runs it, under `placement`."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        self.checkpoint, self.placement = checkpoint, placement
        self._device = torch.device(placement.device)

    @cached_property
    def _pipeline(self) -> Any:
        """diffusers' pipeline without its two large components, which come and go."""
        pipeline = load_pipeline(self.checkpoint, self.placement.dtype, transformer=None, text_encoder=None)
        pipeline.vae.to(self._device)
        return pipeline

    @property
    def vae(self) -> Any:
        """The VAE, which is always in memory."""
        return self._pipeline.vae

    @contextmanager
    def component(self, name: str, text_layers: tuple[int, ...] = ()) -> Iterator[PlacedModel]:
        """The transformer or the text encoder, in memory while the body runs; of the text encoder the layers up to the last of
        `text_layers` and one more, and no head: diffusers takes hidden states alone.
        """
        component = self.checkpoint.components[name]
        if name == "text_encoder":
            encoder = text_encoder_of(self.checkpoint)
            kept = min(encoder.num_hidden_layers, text_layers[-1] + 1)
            module = empty_text_encoder(component, type(encoder), kept)
        else:
            module = empty_model(component)
        weights = PartWeights(module, component, self.placement.dtype, self._device)
        try:
            yield PlacedModel(module.requires_grad_(False), weights, self.placement)
        finally:
            weights.close()
            # glibc keeps what was freed in pieces of less than 32 MB, and most weights are that.
            return_memory()

    def encode(
        self,
        encoder: PlacedModel,
        prompts: Sequence[str],
        generation: Generation,
        report: OfSteps | None = None,
    ) -> list[torch.Tensor]:
        """The embeddings [1, length, features] of each prompt, in the placement's dtype."""
        encoder.on_progress = report.layer if report else None
        pipeline = self._with(text_encoder=_Callable(encoder, self.placement, self._device))

        def encoded(prompt: str) -> torch.Tensor:
            embeddings, _ = pipeline.encode_prompt(
                prompt,
                device=self._device,
                max_sequence_length=generation.text_length,
                text_encoder_out_layers=generation.text_layers,
            )
            if report:
                report.text()
            found: torch.Tensor = embeddings
            return found

        return encoder.run([partial(encoded, prompt) for prompt in prompts])

    def denoise(
        self,
        transformer: PlacedModel,
        texts: Sequence[torch.Tensor],
        empty: torch.Tensor | None,
        generations: Sequence[Generation],
        dtype: torch.dtype | None = None,
        report: OfSteps | None = None,
    ) -> list[torch.Tensor]:
        """What the VAE's decoder takes, [1, C, rows, columns], of one image for each of `texts`, by all its steps.

        `empty` are the embeddings of the empty prompt, for a model that is guided by them. `dtype` is that of the latents, by
        default the placement's.
        """
        transformer.on_progress = report.layer if report else None

        def after_step(_pipeline: Any, _step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if report:
                report.step()
            return given

        def denoised(text: torch.Tensor, generation: Generation) -> torch.Tensor:
            called = _Guided(transformer, self.placement, self._device, empty)
            pipeline = self._with(transformer=called)
            size = generation.size
            noise = spread(noise_for(self.checkpoint, size, generation.seed), grid_of(self.checkpoint, size))
            # A pipeline without classifier-free guidance has no such argument.
            negative = {} if empty is None else {"negative_prompt_embeds": empty}
            found: torch.Tensor = pipeline(
                prompt=None,
                prompt_embeds=text,
                height=size[0],
                width=size[1],
                num_inference_steps=generation.steps,
                guidance_scale=generation.guidance,
                latents=noise.to(self._device, dtype or self.placement.dtype),
                max_sequence_length=generation.text_length,
                text_encoder_out_layers=generation.text_layers,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=after_step,
                **negative,
            )[0]
            return found if found.ndim == 4 else self._unpacked(found, grid_of(self.checkpoint, size))

        return transformer.run([partial(denoised, *pair) for pair in zip(texts, generations, strict=True)])

    def decode(self, latents: torch.Tensor, vae: Any = None) -> np.ndarray:
        """The image fp32 [height, width, 3] in 0..1 of one of the results of `denoise`, by `vae` in place of the model's, whose
        type ends with the decoder."""
        used = vae or self.vae
        with torch.no_grad():
            image = used.decode(latents.to(used.dtype), return_dict=False)[0]
        image = image if vae is None else image.to(self.vae.dtype)
        found: np.ndarray = self._pipeline.image_processor.postprocess(image, output_type="np")[0]
        return found

    def _unpacked(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What the VAE's decoder takes of `tokens` [1, S, C]: dev's pipeline, unlike klein's, stops before it makes that."""
        vae = self.vae
        spread = tokens.reshape(1, *grid, -1).permute(0, 3, 1, 2)
        mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        std = torch.sqrt(variance + vae.config.batch_norm_eps)
        found: torch.Tensor = self._pipeline._unpatchify_latents(
            spread * std.to(tokens.device, tokens.dtype) + mean.to(tokens.device, tokens.dtype)
        )
        return found

    def _with(self, **components: Any) -> Any:
        """The pipeline with these components, which need not be modules, and a scheduler of its own."""
        pipeline = copy.copy(self._pipeline)
        pipeline.__dict__ |= components | {"scheduler": copy.deepcopy(self._pipeline.scheduler)}
        return pipeline


class _Callable:
    """A placed module as a pipeline calls it: it has a device and a type although its weights may not be there."""

    def __init__(self, placed: PlacedModel, placement: Placement, device: torch.device) -> None:
        self._placed, self.dtype, self.device = placed, placement.dtype, device

    def __call__(self, **arguments: Any) -> Any:
        return self._placed.module(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._placed.module, name)


class _Guided(_Callable):
    """A transformer that a pipeline calls twice a step, with the prompt's embeddings and then with those of the empty prompt.

    The second pass is begun with the first, so that both go through a layer while it is there; it is used if it is what the
    pipeline then asks for.
    """

    def __init__(
        self, placed: PlacedModel, placement: Placement, device: torch.device, empty: torch.Tensor | None
    ) -> None:
        super().__init__(placed, placement, device)
        self._empty = empty
        self._begun: tuple[dict[str, Any], Row] | None = None

    def __call__(self, **arguments: Any) -> Any:
        if self._begun is not None:
            begun, row = self._begun
            self._begun = None
            result = result_of(row)
            if _are_equal(begun, arguments):
                return result
        elif self._empty is not None:
            other = arguments | {"encoder_hidden_states": self._empty}
            row_beside = self._placed.beside(lambda: self._placed.module(**other))
            self._begun = None if row_beside is None else (other, row_beside)
        return super().__call__(**arguments)


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two calls have the same arguments."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b

    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
