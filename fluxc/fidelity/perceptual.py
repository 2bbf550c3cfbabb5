"""Perceptual measures with networks of their own, where their weights are on this machine: LPIPS and image-text agreement.

LPIPS (Zhang et al. 2018) is the distance of two images in a network's features; 0 for equal ones. Image-text agreement is 100
times the cosine of an image's and a prompt's CLIP embeddings, which moves with what is generated and hardly with how well.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fluxc.base.errors import BuildError
from fluxrt.install import install_extra


class Judges:
    """The measures whose weights are given: `lpips` is torchvision's AlexNet file, `image_text` a CLIP model's folder.

    Raises BuildError naming what is missing: package, file, or tensor.
    """

    def __init__(self, lpips: Path | None, image_text: Path | None) -> None:
        self._lpips = _load_lpips(lpips) if lpips else None
        self._clip = _load_clip(image_text) if image_text else None

    def figures(self, images: np.ndarray, full: np.ndarray, prompts: list[str]) -> list[dict[str, float]]:
        """By image, what can be said: images fp32 [n, height, width, 3] in 0..1 and those they are compared with."""
        rows: list[dict[str, float]] = [{} for _ in prompts]
        for row, image, reference, prompt in zip(rows, images, full, prompts, strict=True):
            if self._lpips is not None:
                with torch.no_grad():
                    row["lpips"] = float(self._lpips(_planes(image) * 2 - 1, _planes(reference) * 2 - 1))
            if self._clip is not None:
                row["image_text"] = self._clip(image, prompt)
        return rows


def _planes(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)[None]


def _load_lpips(weights: Path) -> Any:
    try:
        import lpips
    except ImportError as error:
        raise BuildError(f"fidelity.lpips: {error}; run `{install_extra('fluxc', 'metrics')}`") from error
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # lpips numbers AlexNet's layers as torchvision does, in slices: slice3.6.weight is features.6.weight.
        features = {name: state[f"features.{name.partition('.')[2]}"] for name, _ in network.net.named_parameters()}
        network.net.load_state_dict(features, strict=True)
    except (OSError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise BuildError(
            f"fidelity.lpips: {weights} is not torchvision's AlexNet ({type(error).__name__}); give its alexnet-owt-*.pth"
        ) from error
    return network


def _load_clip(folder: Path) -> Any:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BuildError(
            f"fidelity.image_text: {folder} does not hold a CLIP model and its tokenizer: {error}"
        ) from error
    side = model.config.vision_config.image_size
    # OpenAI's, which all published CLIP models were trained with.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[None, :, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[None, :, None, None]

    def agreement(image: np.ndarray, prompt: str) -> float:
        planes = _planes(image)
        scale = side / min(planes.shape[2:])
        size = [max(side, round(scale * length)) for length in planes.shape[2:]]
        planes = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        planes = (planes[:, :, top : top + side, left : left + side] - mean) / std
        words = tokenizer([prompt], return_tensors="pt", truncation=True)
        with torch.no_grad():
            output = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=planes)
        return 100 * float(torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds))

    return agreement
