"""The reference: diffusers' own pipeline over the checkpoint, on the noise and schedule the runtime uses."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fluxc.checkpoint.identify import family_of, pixels_per_token, transformer_of
from fluxc.checkpoint.source import Checkpoint
from fluxrt.pipeline import starting_noise


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: (height, width) in pixels, steps, guidance scale, seed, and how prompts are encoded."""

    size: tuple[int, int]
    steps: int
    guidance: float
    seed: int
    text_length: int
    text_layers: tuple[int, ...]

    def of_prompt(self, number: int) -> Drawing:
        """The same for prompt `number` of a list: each has its own noise."""
        return replace(self, seed=self.seed + number)


def load_pipeline(checkpoint: Checkpoint, dtype: torch.dtype, **components: Any) -> Any:
    """diffusers' pipeline for `checkpoint`, unmodified, with its weights in `dtype`; progress bars off.

    `components` are taken in place of those of the checkpoint. A component that it holds quantized is loaded dequantized.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import diffusers
    import transformers

    from fluxc.checkpoint.dequantized import load_dequantized

    for name in ("transformer", "text_encoder"):
        if name not in components and checkpoint.components[name].quantization is not None:
            components[name] = load_dequantized(checkpoint.components[name], dtype)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline_class = getattr(diffusers, family_of(checkpoint).reference_class)
        pipeline = pipeline_class.from_pretrained(
            checkpoint.root, torch_dtype=dtype, local_files_only=True, **components
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guided(velocities: list[Any], guidance: float) -> Any:
    """The conditional velocity, or, with an unconditional second one, the two combined by classifier-free guidance.

    Arrays of numpy or torch, all of one shape.
    """
    conditional, *empty = velocities
    return empty[0] + guidance * (conditional - empty[0]) if empty else conditional


def grid_of(checkpoint: Checkpoint, size: tuple[int, int]) -> tuple[int, int]:
    """Token rows and columns of a picture of `size` (height, width)."""
    pixels = pixels_per_token(checkpoint)
    return size[0] // pixels, size[1] // pixels


def noise_for(checkpoint: Checkpoint, size: tuple[int, int], seed: int) -> np.ndarray:
    """The runtime's starting noise fp32 [1, tokens, channels] for one picture."""
    rows, columns = grid_of(checkpoint, size)
    return starting_noise(seed, rows * columns, transformer_of(checkpoint).in_channels)[None]


def spread(latents: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens [1, S, C] as diffusers takes `latents`: [1, C, rows, columns]."""
    tokens = torch.from_numpy(np.ascontiguousarray(latents))
    return tokens.reshape(1, *grid, latents.shape[-1]).permute(0, 3, 1, 2).contiguous()


def draw(
    pipeline: Any, checkpoint: Checkpoint, prompt: str, drawing: Drawing, dtype: torch.dtype | None = None
) -> np.ndarray:
    """One picture drawn by diffusers from the runtime's noise: fp32 [height, width, 3] in 0..1.

    `dtype` is that of the latents, by default the model's.
    """
    size = drawing.size
    latents = spread(noise_for(checkpoint, size, drawing.seed), grid_of(checkpoint, size))
    result = pipeline(
        prompt=prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        latents=latents.to(dtype or pipeline.transformer.dtype),
        max_sequence_length=drawing.text_length,
        text_encoder_out_layers=drawing.text_layers,
        output_type="np",
    )
    return result.images[0]
