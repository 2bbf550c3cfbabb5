"""`fidelity.attribution`: images with each cause of error alone, held against bundles that have that cause alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import NANO, RECIPE, ROOT, compile_into
from fluxc.base.errors import RecipeError
from fluxc.checkpoint.reference import Generation, generate, load_pipeline
from fluxc.checkpoint.source import open_checkpoint
from fluxc.fidelity.causes_stage import image_name
from fluxc.fidelity.metrics import psnr
from fluxc.recipe.load import load_recipe
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement
from fluxc.running.skipping import skipping
from fluxrt.bundle import open_bundle
from fluxrt.manifest import CacheRule
from fluxrt.stepcache import Decisions
from quick import QUICK

STEPS = 10
CHANGES = (
    *QUICK,
    f"sampling.steps={STEPS}",
    "calibration={steps: 3, prompts: ../tests/data/two-prompts.txt, margin: 1}",
    "precision.text_encoder={default: nvfp4}",
    "step_cache={prompts: ../tests/data/eight-prompts.txt, skip: 3, frontier: [], min_r2: -9, traced: reference}",
    "fidelity.attribution=true",
    "targets=[{kind: onnxruntime, compute: exact}, {kind: tensorrt_rtx}]",
)
CAUSES = ("weights", "inputs", "text encoder", "step cache", "vae", "all")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_into(tmp_path_factory.mktemp("causes") / "bundle", *CHANGES)


def pixels(bundle: Path, name: str) -> np.ndarray:
    with Image.open(bundle / "report" / "images" / name) as image:
        return np.asarray(image.convert("RGB"), np.float64) / 255


def report_of(bundle: Path) -> dict:
    return json.loads((bundle / "report" / "report.json").read_text())


def test_every_cause_has_images_and_figures(bundle: Path) -> None:
    report = report_of(bundle)
    causes = report["causes"]
    assert set(causes["psnr_db"]) == set(CAUSES)
    assert (causes["steps"], causes["size"], causes["vae_dtype"]) == (STEPS, [64, 64], "bfloat16")
    assert causes["prompts"] == report["prompts"]
    assert causes["seeds"] == [1000, 1001]
    page = (bundle / "report" / "index.html").read_text()
    assert "Where the error comes from" in page
    for number in range(2):
        reference = pixels(bundle, image_name("reference", number))
        # The comparison's own reference, made by another stage.
        assert np.array_equal(reference, pixels(bundle, f"reference-{number}.png"))
        found = {cause: causes["psnr_db"][cause][number] for cause in CAUSES}
        for cause, decibels in found.items():
            shown = psnr(pixels(bundle, image_name(cause, number)), reference)
            # Rounding to 8 bits limits what a picture says.
            assert shown == pytest.approx(decibels, abs=1) if decibels < 45 else shown > 43
            assert f"<br>{decibels} dB" in page
        assert found["all"] < min(found["step cache"], found["vae"]) + 1
        assert causes["skipped"][number] == list(open_bundle(bundle).manifest.step_cache.schedule)


def test_weights_and_text_encoder_alone_are_what_a_bundle_with_them_makes(bundle: Path) -> None:
    """By ONNX Runtime in fp32: weights alone where the reference's embeddings are given; inputs are not rounded."""
    report = report_of(bundle)
    for number, prompt in enumerate(report["targets"]["onnxruntime-exact"]["prompts"]):
        alone = prompt["image_psnr_db_reference_text"]
        assert report["causes"]["psnr_db"]["weights"][number] == pytest.approx(alone, abs=0.5)


def test_skipped_steps_are_what_the_runtime_skips(bundle: Path) -> None:
    """The figures of the step cache are a quantized target's; the loss of a step is nearly that of the reference."""
    report = report_of(bundle)
    for number, image in enumerate(report["step_cache"]["chosen"]["by_prompt"]):
        assert report["causes"]["psnr_db"]["step cache"][number] == pytest.approx(image["psnr_db"], abs=4)


@pytest.mark.parametrize("pieces", ["component", "layer"])
def test_skipping_leaves_out_what_the_blocks_would_have_added(pieces: str) -> None:
    """Against blocks that hand on what they get, with the last residual put in by hand; by a schedule and by a rule."""
    checkpoint = open_checkpoint(str(NANO), None, ROOT)
    generation = Generation((64, 64), 6, 1.5, 3, 32, (9, 18, 27))
    model = ReferenceModel(checkpoint, Placement("cpu", torch.float32, pieces))
    with model.component("text_encoder", generation.text_layers) as encoder:
        text, empty = model.encode(encoder, ["a red circle", ""], generation)
    rule = CacheRule((1.0, 0.0), 0.4, 1, 1, 2)
    found = {}
    with model.component("transformer") as transformer:
        for name, decide in (
            ("schedule", lambda: Decisions(6, None, (2, 3, 5))),
            ("rule", lambda: Decisions(6, rule)),
        ):
            with skipping(transformer.module, 2, decide) as skipped:
                latents = model.denoise(transformer, [text, text], empty, [generation, generation.of_prompt(1)])
            found[name] = ([model.decode(one) for one in latents], dict(skipped))
    assert found["schedule"][1] == {0: [2, 3, 5], 1: [2, 3, 5]}
    assert found["rule"][1][0]
    for images, skipped in found.values():
        for number, image in enumerate(images):
            assert psnr(image, by_hand(checkpoint, generation.of_prompt(number), skipped[number])) > 100


def by_hand(checkpoint, generation: Generation, steps: list[int]) -> np.ndarray:
    """diffusers' own pipeline, whose blocks are passed over at `steps`."""
    pipeline = load_pipeline(checkpoint, torch.float32)
    transformer = pipeline.transformer
    kept: dict = {"calls": 0}

    def passing(block, forward, pair: bool):
        def call(*args, **kwargs):
            if kept["calls"] // 2 not in steps:
                return forward(*args, **kwargs)
            return (kwargs["encoder_hidden_states"], kwargs["hidden_states"]) if pair else kwargs["hidden_states"]

        return call

    for blocks, pair in ((transformer.transformer_blocks, True), (transformer.single_transformer_blocks, False)):
        for block in blocks:
            block.forward = passing(block, block.forward, pair)

    def enter(_, __, kwargs) -> None:
        kept["hidden"] = kwargs["hidden_states"]

    def leave(_, args):
        step, branch = divmod(kept["calls"], 2)
        kept["calls"] += 1
        if step not in steps:
            kept[branch] = args[0] - kept["hidden"]
        return (kept["hidden"] + kept[branch], *args[1:])

    transformer.transformer_blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    transformer.norm_out.register_forward_pre_hook(leave)
    return generate(pipeline, checkpoint, "a red circle", generation)


def test_causes_that_a_recipe_has_not_are_left_out(tmp_path: Path) -> None:
    changes = (*QUICK, "fidelity.attribution=true", "fidelity.max_prompts=1", "targets=[{kind: onnxruntime}]")
    bundle = compile_into(tmp_path / "bundle", *changes)
    causes = report_of(bundle)["causes"]
    assert set(causes["psnr_db"]) == {"weights", "inputs", "all"}
    assert (len(causes["prompts"]), causes["skipped"], causes["vae_dtype"]) == (1, [], None)


def test_no_image_is_generated_where_the_level_is_not_images(tmp_path: Path) -> None:
    changes = (*QUICK, "fidelity.attribution=true", "fidelity.level=stages", "targets=[{kind: onnxruntime}]")
    bundle = compile_into(tmp_path / "bundle", *changes)
    report = report_of(bundle)
    assert report["causes"] is None
    assert set(report["attribution"]["errors"]) == {"weights", "inputs", "text encoder", "all"}
    assert "No images: they go with level images" in (bundle / "report" / "index.html").read_text()


def test_what_modelopt_quantizes_is_not_attributed() -> None:
    with pytest.raises(RecipeError, match=r"fidelity\.attribution: rounds weights as fluxc's own quantizer does"):
        load_recipe(RECIPE, (*QUICK, "fidelity.attribution=true", "calibration.engine=modelopt"))
