"""A range of sizes: portrait, landscape and square images between two ends, on every target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fluxrt
from conftest import RECIPE, compile_into
from fluxc.base.errors import RecipeError
from fluxc.fidelity.metrics import psnr, relative_error
from fluxc.quantize.source import read_source
from fluxc.recipe.load import load_recipe
from fluxc.rehearsal.place import MadeUpPlace
from fluxrt.bundle import open_bundle
from fluxrt.pipeline import Pipeline
from quick import QUICK
from test_ulysses_gpu import kernel_cache  # noqa: F401

RANGE = "sizes={min: [32, 48], max: [128, 96], default: [64, 64]}"
BETWEEN = ((96, 48), (40, 96), (128, 96), (32, 48))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = "targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 2}, {kind: tensorrt_rtx}]"
    return compile_into(tmp_path_factory.mktemp("range") / "bundle", *QUICK, RANGE, "fidelity.size=[96, 48]", targets)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose sizes are a list."""
    sizes = f"sizes={[list(size) for size in BETWEEN]}"
    folder = tmp_path_factory.mktemp("listed") / "bundle"
    return compile_into(folder, *QUICK, sizes, "targets=[{kind: onnxruntime}]")


@pytest.mark.parametrize("size", BETWEEN)
def test_any_size_of_the_range_is_that_of_a_bundle_that_lists_it(
    bundle: Path, listed: Path, size: tuple[int, int]
) -> None:
    request = fluxrt.Request("a red ring", size=size, seed=4, steps=3)
    with fluxrt.load(bundle, target="onnxruntime") as pipeline:
        image = pipeline.generate(request).images[0]
    assert (image.height, image.width) == size
    with fluxrt.load(listed, target="onnxruntime") as pipeline:
        alone = pipeline.generate(request).images[0]
    assert psnr(np.asarray(image) / 255, np.asarray(alone) / 255) > 55


def test_engines_and_ranks_serve_the_range_too(bundle: Path) -> None:
    opened = open_bundle(bundle)
    said = "| sizes, height x width in pixels | 64x64, 32x48, 128x96, and all between the last two, in steps of 8 |"
    assert said in (bundle / "README.md").read_text()
    target = opened.target("tensorrt_rtx")
    assert target.engine.plans["vae_decoder"].profiles == ({"rows": (4, 8, 16), "columns": (6, 8, 12)},)
    place = MadeUpPlace()
    latents = np.random.default_rng(1).standard_normal((1, 60, 32), dtype=np.float32)
    moved = {}
    for name in ("onnxruntime", "tensorrt_rtx"):
        backend = place.backend(opened, target, place.driver(), True) if name == "tensorrt_rtx" else None
        with Pipeline(opened, target=name, backend=backend) as pipeline:
            grid = pipeline.grid((40, 96))
            text = moved.setdefault("text", pipeline.encode_text("a red ring", 1.5))
            pipeline.begin(latents, grid, 1.5, text)
            pipeline.step(0.6, 0.5)
            moved[name] = pipeline.backend.get("latents")
            moved[f"{name} image"] = pipeline.decode(latents, grid)
    # Inputs of NVFP4 layers are rounded on the GPU alone.
    assert relative_error(moved["tensorrt_rtx"], moved["onnxruntime"]) < 5e-2
    assert relative_error(moved["tensorrt_rtx image"], moved["onnxruntime image"]) < 2e-2
    request = fluxrt.Request("a red ring", size=(40, 96), seed=4, steps=2)
    with fluxrt.load(bundle, target="onnxruntime") as one, fluxrt.load(bundle, gpus=2) as two:
        images = [np.asarray(each.generate(request).images[0]) / 255 for each in (one, two)]
    assert psnr(*images) > 55


@pytest.mark.parametrize("size", [(136, 96), (128, 104), (24, 64), (36, 64), (0, 64)])
def test_what_lies_outside_is_refused_with_the_range(bundle: Path, size: tuple[int, int]) -> None:
    with fluxrt.load(bundle, target="onnxruntime") as pipeline:
        said = "heights of 32 to 128 by widths of 48 to 96 in steps of 8"
        with pytest.raises(fluxrt.RequestError, match=said):
            pipeline("a", size=size)


def test_the_default_is_the_usual_size_brought_into_the_range() -> None:
    def listed(range_: str) -> tuple[tuple[int, int], ...]:
        return load_recipe(RECIPE, [f"sizes={range_}"]).recipe.listed_sizes

    assert listed("{min: [256, 256], max: [2048, 2048]}") == ((1024, 1024), (256, 256), (2048, 2048))
    assert listed("{min: [256, 1280], max: [768, 2048]}") == ((768, 1280), (256, 1280), (768, 2048))
    assert listed("{min: [32, 32], max: [64, 64]}") == ((64, 64), (32, 32))
    recipe = load_recipe(RECIPE, [f"sizes={'{min: [32, 48], max: [128, 96]}'}"]).recipe
    assert [recipe.serves(size) for size in ((32, 96), (128, 48), (136, 48), (64, 40))] == [True, True, False, False]


@pytest.mark.parametrize(
    ("range_", "said"),
    [
        ("{min: [64, 64], max: [32, 128]}", "sizes.min: [64, 64] is more than sizes.max, [32, 128]"),
        ("{min: [64, 64], max: [64, 64]}", "sizes: min and max are the same; write sizes: [[64, 64]]"),
        (
            "{min: [64, 64], max: [96, 96], default: [64, 128]}",
            "sizes.default: [64, 128] is not between [64, 64] and [96, 96]",
        ),
        ("{min: [64, 64]}", "sizes.max"),
        ("{min: [64, 64], most: [96, 96]}", "unknown field 'sizes.most'"),
        ("{min: [60, 64], max: [96, 96]}", "sizes: 60x64 is not possible: this model's tokens are 8x8 pixels"),
        ("{min: [64], max: [96, 96]}", "sizes.min"),
        ("7", "sizes: must be"),
    ],
)
def test_a_range_that_cannot_be_is_named(range_: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        read_source(load_recipe(RECIPE, [f"sizes={range_}"]))
    assert said in str(raised.value)
    assert raised.value.exit_code == 2


def test_fidelity_is_measured_within_the_range() -> None:
    for size, said in (("[96, 128]", "is not between sizes.min and sizes.max"), ("[36, 48]", "36x48 is not possible")):
        with pytest.raises(RecipeError, match=r"fidelity\.size") as raised:
            read_source(load_recipe(RECIPE, [RANGE, f"fidelity.size={size}"]))
        assert said in str(raised.value)
