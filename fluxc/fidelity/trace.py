"""Records what diffusers does for some images: tokens, embeddings, first-step prologue, every step, the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fluxc.base.progress import OfSteps
from fluxc.checkpoint.needs import SIDE_BY_SIDE
from fluxc.checkpoint.reference import Generation, guided
from fluxc.running.lockstep import CALL
from fluxc.running.model import PlacedModel, ReferenceModel


@dataclass
class Trace:
    """One image by diffusers, as arrays; `branches` are the conditional and, with guidance, the empty prompt."""

    prompt: str
    input_ids: list[np.ndarray] = field(default_factory=list)
    text: list[np.ndarray] = field(default_factory=list)
    prologue: dict[str, np.ndarray] = field(default_factory=dict)
    latents: list[np.ndarray] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    velocities: list[np.ndarray] = field(default_factory=list)
    final: np.ndarray = field(default_factory=lambda: np.empty(0))
    image: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class _Text:
    """A prompt's tokens int64 [1, length] and embeddings [1, length, features]."""

    input_ids: np.ndarray
    embeddings: torch.Tensor


def record(
    model: ReferenceModel, prompts: list[str], branches: int, generation: Generation, report: OfSteps
) -> Iterator[Trace]:
    """Generate `prompts` with diffusers while hooks record the stages of each, in order."""
    texts = _encode(model, [*prompts, *([""] if branches == 2 else [])], generation, report)
    empty = texts[-1:] if branches == 2 else []
    with model.component("transformer") as transformer:
        for group in model.placement.groups(len(prompts), SIDE_BY_SIDE):
            traces = [Trace(prompts[number]) for number in group]
            with _hooked(transformer, traces, branches, generation.guidance):
                finals = model.denoise(
                    transformer,
                    [texts[number].embeddings for number in group],
                    empty[0].embeddings if empty else None,
                    [generation.of_prompt(number) for number in group],
                    report=report,
                )
            for number, trace, final in zip(group, traces, finals, strict=True):
                for text in (texts[number], *empty):
                    trace.input_ids.append(text.input_ids)
                    trace.text.append(_array(text.embeddings))
                trace.final, trace.image = _array(final), model.decode(final)
                yield trace


def _encode(model: ReferenceModel, prompts: list[str], generation: Generation, report: OfSteps) -> list[_Text]:
    tokens: dict[int, np.ndarray] = {}

    def on_text(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        tokens[CALL.get()] = kwargs["input_ids"].cpu().numpy().copy()

    with model.component("text_encoder", generation.text_layers) as encoder:
        encoder.module.register_forward_pre_hook(on_text, with_kwargs=True)
        embeddings = model.encode(encoder, prompts, generation, report)
    return [_Text(tokens[number], found) for number, found in enumerate(embeddings)]


@contextmanager
def _hooked(transformer: PlacedModel, traces: list[Trace], branches: int, guidance: float) -> Iterator[None]:
    """Hooks that write what the transformer does into the trace whose number the running call has."""
    module, first = transformer.module, transformer.module.get_submodule("transformer_blocks.0")
    passes: list[list[np.ndarray]] = [[] for _ in traces]

    def on_pass(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        trace, done = traces[CALL.get()], passes[CALL.get()]
        done.append(_array(output[0]))
        if len(done) == 1:
            trace.latents.append(_array(kwargs["hidden_states"]))
            trace.sigmas.append(float(kwargs["timestep"][0]))
        if len(done) == branches:
            trace.velocities.append(guided(done, guidance))
            done.clear()

    def on_block(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        trace = traces[CALL.get()]
        if trace.prologue:
            return
        names = {
            "hidden": kwargs["hidden_states"],
            "text_hidden": kwargs["encoder_hidden_states"],
            "modulation_img": kwargs["temb_mod_img"],
            "modulation_txt": kwargs["temb_mod_txt"],
            "rope_cos": kwargs["image_rotary_emb"][0],
            "rope_sin": kwargs["image_rotary_emb"][1],
        }
        trace.prologue.update({name: _array(value) for name, value in names.items()})

    handles = [
        module.register_forward_hook(on_pass, with_kwargs=True),
        first.register_forward_pre_hook(on_block, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A copy in fp32."""
    found: np.ndarray = tensor.detach().float().cpu().numpy().copy()
    return found


def tokens_of_final(trace: Trace, vae: Any) -> np.ndarray:
    """The final latents [1, S, C] of the step loop, from what the VAE's decoder was given (un-normalised, un-patchified)."""
    spread = torch.from_numpy(trace.final)
    batch, channels, rows, columns = spread.shape
    patches = spread.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4)
    patches = patches.reshape(batch, channels * 4, rows // 2, columns // 2)
    mean = vae.bn.running_mean.float().cpu().view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.float().cpu().view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return ((patches - mean) / std).flatten(2).permute(0, 2, 1).contiguous().numpy()
