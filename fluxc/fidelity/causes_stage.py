"""The stage of `fidelity.attribution` that generates images: one with each cause of error alone, beside the reference.

All in torch, by diffusers' code, from the same noise. A cause that the recipe has not is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.base.cache import Made
from fluxc.base.numbers import as_json, significant
from fluxc.base.progress import Report
from fluxc.calibrate.simulated import Rounded, rounding_bytes
from fluxc.checkpoint.files import CheckpointFiles
from fluxc.checkpoint.needs import Asked, Models, image_tokens, vae_weights
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxrt.manifest import CacheRule
from fluxrt.stepcache import Decisions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fluxc.checkpoint.reference import Generation
    from fluxc.running.model import PlacedModel, ReferenceModel

FILE = "causes.json"
REFERENCE, WEIGHTS, INPUTS, TEXT, CACHE, VAE, ALL = (
    "reference",
    "weights",
    "inputs",
    "text encoder",
    "step cache",
    "vae",
    "all",
)


@dataclass(frozen=True)
class Skips:
    """Which steps a step cache skips: a fixed schedule, or as the rule decides."""

    schedule: tuple[int, ...]
    rule: CacheRule | None


@dataclass(frozen=True)
class CausesInputs:
    """The model, the prompts and how they are generated: prompt i from the noise of `seeds[i]`, by a model in `dtype`.

    `rounded`: by component how its quantized layers compute. `skips`: how steps are skipped, None where none are. `vae_dtype`:
    the type that the VAE is computed in by a target; None where none computes it.
    """

    files: CheckpointFiles
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]
    steps: int
    guidance: float
    text_length: int
    text_layers: tuple[int, ...]
    dtype: str
    rows: int
    rounded: dict[str, Rounded]
    skips: Skips | None = None
    vae_dtype: str | None = None


def run(inputs: CausesInputs, folder: Path, report: Report) -> None:
    """Write FILE, with the PSNR of every cause's images against the reference's, and report/images/cause-*.png."""
    from fluxc.fidelity.metrics import psnr
    from fluxrt.pipeline import to_image

    images = folder / "report" / "images"
    images.mkdir(parents=True)
    reference: list[np.ndarray] = []
    found: dict[str, Any] = {}
    skipped: list[list[int]] = []
    total = len(causes(inputs))
    for cause, made, left_out in _generated(inputs):
        for number, image in enumerate(made):
            to_image(image).save(images / image_name(cause, number))
        if cause == REFERENCE:
            reference = made
        else:
            pairs = zip(made, reference, strict=True)
            found[cause] = [significant(psnr(image, expected)) for image, expected in pairs]
        skipped = left_out if cause == CACHE else skipped
        report(len(found), total, f"{len(found)}/{total} causes")
    figures = {
        "prompts": inputs.prompts,
        "seeds": inputs.seeds,
        "size": inputs.size,
        "steps": inputs.steps,
        "guidance": inputs.guidance,
        "vae_dtype": inputs.vae_dtype if VAE in found else None,
        "skipped": skipped,
        "psnr_db": found,
    }
    (folder / FILE).write_text(as_json(figures, "causes", indent=1) + "\n")


def load(folder: Path) -> Made:
    """The folder."""
    return Made(folder)


def image_name(cause: str, number: int) -> str:
    """The file of a cause's image of the prompt of that number."""
    return f"cause-{cause.replace(' ', '-')}-{number}.png"


def causes(inputs: CausesInputs) -> list[str]:
    """The causes of error that there are, as far as the model's type is not looked at; `all` last."""
    transformer = inputs.rounded.get("transformer")
    there = {
        WEIGHTS: transformer is not None and bool(to_quantize(transformer.plan)),
        INPUTS: transformer is not None and bool(transformer.rounding_inputs),
        TEXT: "text_encoder" in inputs.rounded,
        CACHE: inputs.skips is not None,
        VAE: inputs.vae_dtype not in (None, inputs.dtype),
    }
    found = [cause for cause, is_there in there.items() if is_there]
    return [*found, ALL] if found else []


def with_causes(models: Models, asked: Asked, rounded: list[LayerPlan], skips: bool, has_vae: bool) -> Asked:
    """`asked` with what rounding these layers, skipping steps and a second VAE take besides."""
    residual = 4 * image_tokens(models, asked.size) * models.transformer.width
    observed = rounding_bytes(rounded) + (asked.prompts * (asked.rows + 2) * residual if skips else 0)
    return replace(asked, observed=observed + (4 * vae_weights(models) if has_vae else 0))


def _generated(inputs: CausesInputs) -> Iterator[tuple[str, list[np.ndarray], list[list[int]]]]:
    """The reference's images, then each cause's with the steps that were skipped of each."""
    import torch

    from fluxc.calibrate.simulated import simulated, simulation_of
    from fluxc.checkpoint.needs import models_of
    from fluxc.checkpoint.reference import Generation
    from fluxc.running.model import ReferenceModel
    from fluxc.running.placement import find_placement

    checkpoint = inputs.files.checkpoint
    layers = [entry for how in inputs.rounded.values() for entry in how.layers]
    asked = Asked(len(inputs.prompts), inputs.rows, inputs.steps, inputs.size, inputs.text_length)
    asked = with_causes(models_of(checkpoint), asked, layers, inputs.skips is not None, inputs.vae_dtype is not None)
    placement = find_placement(checkpoint, "auto", getattr(torch, inputs.dtype), asked)
    model = ReferenceModel(checkpoint, placement)
    generation = Generation(inputs.size, inputs.steps, inputs.guidance, 0, inputs.text_length, inputs.text_layers)
    texts = [*inputs.prompts, *([""] if inputs.rows == 2 else [])]
    with model.component("text_encoder", inputs.text_layers) as encoder:
        exact = model.encode(encoder, texts, generation)
        with simulated(checkpoint, "text_encoder", encoder, inputs.rounded):
            quantized = model.encode(encoder, texts, generation) if "text_encoder" in inputs.rounded else exact
    how = inputs.rounded.get("transformer")
    passes = (inputs.steps, inputs.rows)
    simulation = simulation_of(checkpoint, "transformer", how, (), passes) if how else None
    vae = _vae_in(model, inputs.vae_dtype)
    with model.component("transformer") as transformer:
        loop = _Loop(model, transformer, inputs, [replace(generation, seed=seed) for seed in inputs.seeds])
        latents, _ = loop.run(exact)
        yield REFERENCE, [model.decode(one) for one in latents], []
        for cause in causes(inputs):
            every = cause == ALL
            if cause == VAE:
                yield cause, [model.decode(one, vae) for one in latents], []
                continue
            with ExitStack() as stack:
                if how and simulation and cause in (WEIGHTS, INPUTS, ALL):
                    rounding = replace(
                        simulation, round_weights=cause in (WEIGHTS, ALL), round_inputs=cause in (INPUTS, ALL)
                    )
                    stack.enter_context(rounding.of(transformer, how.layers))
                made, skipped = loop.run(quantized if cause in (TEXT, ALL) else exact, skips=cause in (CACHE, ALL))
            yield cause, [model.decode(one, vae if every else None) for one in made], skipped


class _Loop:
    """The step loop over all prompts."""

    def __init__(
        self, model: ReferenceModel, transformer: PlacedModel, inputs: CausesInputs, generations: list[Generation]
    ) -> None:
        self._model, self._transformer, self._inputs, self._generations = model, transformer, inputs, generations

    def run(self, texts: list[torch.Tensor], skips: bool = False) -> tuple[list[torch.Tensor], list[list[int]]]:
        """What the VAE decodes of each prompt, and the steps that were skipped, with embeddings `texts` (the empty prompt's
        last, where there is guidance)."""
        from fluxc.running.skipping import skipping

        inputs = self._inputs
        count = len(inputs.prompts)
        empty = texts[-1] if inputs.rows == 2 else None
        with ExitStack() as stack:
            skipped: dict[int, list[int]] = {}
            if skips and inputs.skips:
                skipped = stack.enter_context(skipping(self._transformer.module, inputs.rows, self._decisions))
            found = self._model.denoise(self._transformer, texts[:count], empty, self._generations)
        return found, [skipped.get(number, []) for number in range(count)]

    def _decisions(self) -> Decisions:
        assert self._inputs.skips is not None
        return Decisions(self._inputs.steps, self._inputs.skips.rule, self._inputs.skips.schedule)


def _vae_in(model: ReferenceModel, dtype: str | None) -> Any:
    """A copy of the VAE that computes in this type; None for the one there is."""
    import torch

    wanted = None if dtype is None else getattr(torch, dtype)
    return None if wanted in (None, model.vae.dtype) else copy.deepcopy(model.vae).to(wanted)
