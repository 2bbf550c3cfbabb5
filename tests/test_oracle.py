"""The images follow their prompts: bf16 by diffusers, and both activation modes of the compiled bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxrt
from fluxc.checkpoint.reference import Generation, generate, load_pipeline
from fluxc.checkpoint.source import open_checkpoint
from fluxc.recipe.load import LoadedRecipe
from oracle import follows, read
from pictures import render, split_specs

UNSEEN = split_specs()[1][:64]


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
    generation = Generation(
        (64, 64), sampling.steps, sampling.guidance, 0, recipe_of_module.recipe.text.length, (9, 18, 27)
    )
    right = 0
    for number, spec in enumerate(UNSEEN):
        image = generate(pipeline, checkpoint, spec.caption(number % 3), generation.of_prompt(number))
        right += follows(image, spec)
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
