"""Records what diffusers does for one image: tokens, embeddings, first-step prologue, every step, the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fluxc.checkpoint.reference import Generation, generate, guided
from fluxc.checkpoint.source import Checkpoint


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


def record(
    pipeline: Any,
    checkpoint: Checkpoint,
    prompt: str,
    branches: int,
    generation: Generation,
    on_step: Callable[[int], None] | None = None,
) -> Trace:
    """Generate `prompt` with diffusers while hooks record its stages; `on_step` is called with how many steps are done."""
    trace = Trace(prompt)
    model, passes = pipeline.transformer, []

    def on_text(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        trace.input_ids.append(kwargs["input_ids"].numpy().copy())

    def on_pass(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        passes.append(output[0].float().numpy().copy())
        if len(passes) <= branches:
            trace.text.append(kwargs["encoder_hidden_states"].float().numpy().copy())
        if len(passes) % branches == 1 or branches == 1:
            trace.latents.append(kwargs["hidden_states"].float().numpy().copy())
            trace.sigmas.append(float(kwargs["timestep"][0]))

    def on_block(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
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
        trace.prologue.update({name: value.float().numpy().copy() for name, value in names.items()})

    def on_decode(_module: Any, args: Any) -> None:
        trace.final = args[0].float().numpy().copy()

    handles = [
        pipeline.text_encoder.register_forward_pre_hook(on_text, with_kwargs=True),
        model.register_forward_hook(on_pass, with_kwargs=True),
        model.transformer_blocks[0].register_forward_pre_hook(on_block, with_kwargs=True),
        (pipeline.vae.post_quant_conv or pipeline.vae.decoder).register_forward_pre_hook(on_decode),
    ]
    try:
        with torch.no_grad():
            trace.image = generate(pipeline, checkpoint, prompt, generation, on_step=on_step)
    finally:
        for handle in handles:
            handle.remove()
    for step in range(len(trace.latents)):
        trace.velocities.append(guided(passes[step * branches : (step + 1) * branches], generation.guidance))
    return trace


def tokens_of_final(trace: Trace, vae: Any) -> np.ndarray:
    """The final latents [1, S, C] of the step loop, from what the VAE's decoder was given (un-normalised, un-patchified)."""
    spread = torch.from_numpy(trace.final)
    batch, channels, rows, columns = spread.shape
    patches = spread.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4)
    patches = patches.reshape(batch, channels * 4, rows // 2, columns // 2)
    mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.float().view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return ((patches - mean) / std).flatten(2).permute(0, 2, 1).contiguous().numpy()
