"""Perceptual measures: image-text agreement with a small CLIP of random weights; what is said when weights are missing.

LPIPS needs torchvision, which the tests do not install: with lpips 0.1.4 over a stand-in for torchvision's AlexNet it gave what
lpips itself gives, once, by hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from conftest import NANO, RECIPE, compile_into
from fluxc.base.errors import BuildError, RecipeError
from fluxc.fidelity.perceptual import Judges
from quick import QUICK

SIDE = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(NANO / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "eos_token_id": 1},
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_image_text_agreement_is_clips_own_cosine(clip: Path) -> None:
    """Against transformers' image processor and CLIP's logits, of which the scale is taken off."""
    from transformers import CLIPImageProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    prompts = ["a red circle", "a blue ring"]
    rows = Judges(None, clip).figures(pixels / np.float32(255), pixels / np.float32(255), prompts)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    for row, image, prompt in zip(rows, pixels, prompts, strict=True):
        given = processor(Image.fromarray(image), return_tensors="pt")
        words = tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            output = model(**given, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        assert row["image_text"] == pytest.approx(
            100 * float(output.logits_per_image / model.logit_scale.exp()), abs=1e-3
        )
        assert set(row) == {"image_text"}


def test_images_of_any_shape_are_looked_at(clip: Path) -> None:
    """The smaller side is scaled to CLIP's, the middle is looked at: as torchvision's transforms for CLIP do."""
    wide = np.random.default_rng(1).random((1, 50, 90, 3)).astype(np.float32)
    planes = torch.from_numpy(wide).permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(planes, (SIDE, 58), mode="bicubic", antialias=True).clamp(0, 1)
    middle = scaled[..., (58 - SIDE) // 2 :][..., :SIDE].permute(0, 2, 3, 1).numpy()
    judges = Judges(None, clip)
    found, expected = (judges.figures(x, x, ["a red circle"])[0]["image_text"] for x in (wide, middle))
    assert found == pytest.approx(expected, abs=1e-3)
    left = judges.figures(*[scaled[..., :SIDE].permute(0, 2, 3, 1).numpy()] * 2, ["a red circle"])[0]["image_text"]
    assert abs(left - expected) > 1e-2


def test_without_weights_nothing_is_judged() -> None:
    images = np.zeros((2, 8, 8, 3), np.float32)
    assert Judges(None, None).figures(images, images, ["a", "b"]) == [{}, {}]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"fidelity\.image_text: .* does not hold a CLIP model and its tokenizer"):
        Judges(None, tmp_path)
    with pytest.raises(BuildError, match=r"fidelity\.lpips: .*run `.*pip install 'lpips>="):
        Judges(tmp_path / "alexnet.pth", None)
    cache = ("sampling.steps=10", "step_cache={prompts: prompts/flux2-nano-calibration.txt}")
    with pytest.raises(
        RecipeError, match=r"fidelity\.lpips: there is no file .*/absent\.pth; weights are not downloaded"
    ):
        compile_into(tmp_path / "out", *QUICK, *cache, "fidelity.lpips=absent.pth", recipe=RECIPE)
