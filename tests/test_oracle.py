"""The images follow their prompts: bf16 by diffusers, and both activation modes of the compiled bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxrt
from fluxc.checkpoint.reference import grid_of, load_pipeline, noise_for, spread
from fluxc.checkpoint.source import open_checkpoint
from fluxc.recipe.load import LoadedRecipe
from oracle import follows, read
from pictures import render, split_specs

UNSEEN = split_specs()[1][:64]
BATCH = 16


def test_oracle_reads_rendered_images_right() -> None:
    images = render(UNSEEN, torch.Generator().manual_seed(1)).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert sum(follows(image, spec) for image, spec in zip(images, UNSEEN, strict=True)) == len(UNSEEN)


def test_oracle_sees_no_shape_on_an_empty_ground() -> None:
    assert read(np.full((64, 64, 3), 200, dtype=np.uint8)) is None


@pytest.fixture(scope="module")
def reference_agreement(recipe_of_module: LoadedRecipe) -> float:
    sampling = recipe_of_module.recipe.sampling
    checkpoint = open_checkpoint(recipe_of_module.recipe.model.source, None, recipe_of_module.folder)
    pipeline = load_pipeline(checkpoint, torch.bfloat16)
    size, right = (64, 64), 0
    for first in range(0, len(UNSEEN), BATCH):
        batch = range(first, first + BATCH)
        noise = np.concatenate([noise_for(checkpoint, size, number) for number in batch])
        images = pipeline(
            prompt=[UNSEEN[number].caption(number % 3) for number in batch],
            height=size[0],
            width=size[1],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            latents=spread(noise, grid_of(checkpoint, size)).to(torch.bfloat16),
            max_sequence_length=recipe_of_module.recipe.text.length,
            text_encoder_out_layers=(9, 18, 27),
            output_type="np",
        ).images
        right += sum(follows(image, UNSEEN[number]) for image, number in zip(images, batch, strict=True))
    return right / len(UNSEEN)


@pytest.fixture(scope="module")
def recipe_of_module() -> LoadedRecipe:
    from conftest import RECIPE
    from fluxc.recipe.load import load_recipe

    return load_recipe(RECIPE)


def test_bf16_reference_follows_unseen_prompts(reference_agreement: float) -> None:
    assert reference_agreement >= 0.95


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-nvfp4"])
def test_nvfp4_loses_at_most_three_points(nano_bundle: Path, reference_agreement: float, target: str) -> None:
    pipeline = fluxrt.load(nano_bundle, target=target)
    images = pipeline.generate(fluxrt.Request([spec.caption(i % 3) for i, spec in enumerate(UNSEEN)], seed=0)).images
    right = sum(follows(np.asarray(image), spec) for image, spec in zip(images, UNSEEN, strict=True))
    assert right / len(UNSEEN) >= reference_agreement - 0.03
