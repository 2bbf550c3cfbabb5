"""The images follow their prompts: bf16 by diffusers, and both activation modes of the compiled bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxrt
from conftest import RECIPE
from fluxc.checkpoint.identify import family_of
from fluxc.checkpoint.reference import grid_of, load_pipeline, noise_for, spread
from fluxc.checkpoint.source import open_checkpoint
from fluxc.recipe.load import LoadedRecipe, load_recipe
from oracle import follows, read
from pictures import render, split_specs

UNSEEN = split_specs()[1][:64]
BATCH = 16


def test_oracle_reads_rendered_images_right() -> None:
    images = render(UNSEEN, torch.Generator().manual_seed(1)).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert sum(follows(image, spec) for image, spec in zip(images, UNSEEN, strict=True)) == len(UNSEEN)


def test_oracle_sees_no_shape_on_an_empty_ground() -> None:
    assert read(np.full((64, 64, 3), 200, dtype=np.uint8)) is None


@pytest.fixture(scope="module", params=["flux2-nano", "flux2-nano-dev"])
def loaded(request: pytest.FixtureRequest) -> LoadedRecipe:
    return load_recipe(RECIPE.with_name(f"{request.param}.yaml"))


@pytest.fixture(scope="module")
def reference_agreement(loaded: LoadedRecipe) -> float:
    sampling = loaded.recipe.sampling
    checkpoint = open_checkpoint(loaded.recipe.model.source, None, loaded.folder)
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
            max_sequence_length=loaded.recipe.text.length,
            text_encoder_out_layers=family_of(checkpoint).text_layers,
            output_type="np",
        ).images
        right += sum(follows(image, UNSEEN[number]) for image, number in zip(images, batch, strict=True))
    return right / len(UNSEEN)


@pytest.fixture(scope="module")
def bundle(loaded: LoadedRecipe, request: pytest.FixtureRequest) -> Path:
    """The recipe, compiled as it stands."""
    named = {"flux2-nano-nvfp4": "nano_bundle", "flux2-nano-dev-nvfp4": "dev_bundle"}
    found: Path = request.getfixturevalue(named[loaded.recipe.name])
    return found


def test_bf16_reference_follows_unseen_prompts(reference_agreement: float) -> None:
    assert reference_agreement >= 0.95


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-nvfp4"])
def test_nvfp4_loses_at_most_three_points(bundle: Path, reference_agreement: float, target: str) -> None:
    with fluxrt.load(bundle, target=target) as pipeline:
        request = fluxrt.Request([spec.caption(i % 3) for i, spec in enumerate(UNSEEN)], seed=0)
        images = pipeline.generate(request).images
    right = sum(follows(np.asarray(image), spec) for image, spec in zip(images, UNSEEN, strict=True))
    assert right / len(UNSEEN) >= reference_agreement - 0.03
