"""The source of a build: an opened and checked checkpoint, what family it is, and the plan for its Linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.errors import CheckpointError, RecipeError
from fluxc.base.safetensors import TensorRef
from fluxc.checkpoint.identify import check_sizes, family_of, has_cfg_batch, text_encoder_of, transformer_of, vae_of
from fluxc.checkpoint.named import parts_of
from fluxc.checkpoint.quantized import SourceLayer, as_stored, quantized_layers
from fluxc.checkpoint.source import Checkpoint, check_tensors, open_checkpoint, with_transformer
from fluxc.families.base import Family
from fluxc.formats.registry import FORMATS
from fluxc.models.base import Linear
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.text_encoder import TextEncoder
from fluxc.quantize.plan import LayerPlan, needs_calibration, precision_plan, to_quantize
from fluxc.quantize.steps import check_steps
from fluxc.recipe.faults import Collected
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import ComponentPrecision, Recipe

LARGE = 1_000_000_000
"""Parameters of a transformer from which the defaults of measuring are those of a large model (docs/recipe.md)."""
UNUSED = {
    "vae": ("encoder.", "quant_conv.", "bn.num_batches_tracked"),
}


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, what family it is, and the plan for its Linears."""

    checkpoint: Checkpoint
    family: Family
    cfg_batch: bool
    text_layers_kept: int
    plans: dict[str, list[LayerPlan]]
    quantized: dict[str, dict[str, SourceLayer]]
    """By component, the layers that the checkpoint holds quantized already."""

    @property
    def transformer(self) -> Flux2Transformer:
        """The checkpoint's transformer."""
        return transformer_of(self.checkpoint)

    @property
    def is_large(self) -> bool:
        """Whether measuring takes fewer prompts and steps and a smaller size where the recipe leaves them out."""
        return is_large(self.transformer)

    def linears(self, component: str) -> list[Linear]:
        """Every Linear that the checkpoint has of `component`."""
        if component == "text_encoder":
            encoder = text_encoder_of(self.checkpoint)
            return encoder.linears(encoder.num_hidden_layers)
        return self.transformer.linears if component == "transformer" else []

    def stored_plan(self, component: str) -> list[LayerPlan]:
        """The plan of every Linear that a bundle stores: of the text encoder, also those of the layer that is never run."""
        plan = self.plans.get(component, [])
        if component != "text_encoder":
            return plan
        stored = text_encoder_of(self.checkpoint).linears(self.text_layers_kept)
        return plan + precision_plan(
            component, stored[len(plan) :], ComponentPrecision(), in_source=self.quantized[component]
        )

    @property
    def quantizes(self) -> bool:
        """Whether there is a layer that a build quantizes itself, for which its inputs must have been measured."""
        return any(needs_calibration(plan) for plan in self.plans.values())

    @property
    def unused(self) -> dict[str, tuple[str, ...]]:
        """Name prefixes of tensors that no graph needs, by component."""
        prefix = self.family.text_encoder.prefix
        return {**UNUSED, "text_encoder": (f"{prefix}norm.", f"{prefix}layers.{self.text_layers_kept - 1}.")}


def is_large(transformer: Flux2Transformer) -> bool:
    """Whether this is a large model, by the parameters of its Linears."""
    return sum(linear.out_features * linear.in_features for linear in transformer.linears) >= LARGE


def read_source(loaded: LoadedRecipe, exported: Path | None = None) -> Source:
    """Open and check the checkpoint, and resolve the precision of every Linear. Reads headers and configs only.

    The folder `exported`, a transformer as modelopt exported it, is taken in place of the checkpoint's own.
    """
    recipe = loaded.recipe
    model = recipe.model
    collected = Collected(loaded.places)
    with collected.collecting():
        checkpoint = open_checkpoint(
            model.source, model.revision, loaded.folder, model.variant, parts_of(model), loaded.commits
        )
    collected.raise_all()
    if exported is not None:
        checkpoint = with_transformer(checkpoint, exported)
    with checkpoint.telling():
        return _checked(loaded, checkpoint)


def _checked(loaded: LoadedRecipe, checkpoint: Checkpoint) -> Source:
    """The source that `checkpoint` is for the recipe, after refusing what does not fit."""
    recipe, collected = loaded.recipe, Collected(loaded.places)
    family = family_of(checkpoint)
    transformer, encoder = checkpoint.components["transformer"], checkpoint.components["text_encoder"]
    transformer_model, encoder_model = transformer_of(checkpoint), text_encoder_of(checkpoint)
    text_layers = encoder_model.num_hidden_layers
    quantized = {
        "transformer": quantized_layers(transformer, transformer_model.linears),
        "text_encoder": quantized_layers(encoder, encoder_model.linears(text_layers)),
    }
    check_tensors(transformer, as_stored(transformer_model.tensors, quantized["transformer"]))
    kept = family.text_layers_stored(text_layers)
    every_layer = as_stored(encoder_model.tensors(text_layers), quantized["text_encoder"])
    check_tensors(encoder, every_layer, ignored=encoder_model.unread)
    _check_window(encoder_model, recipe.text.length, encoder.folder)
    check_tensors(checkpoint.components["vae"], vae_of(checkpoint).tensors, ignored=("bn.num_batches_tracked",))
    with collected.collecting():
        check_sizes(vae_of(checkpoint), recipe.listed_sizes)
    for field, size in (("calibration.size", recipe.calibration.size), ("fidelity.size", recipe.fidelity.size)):
        with collected.collecting():
            check_sizes(vae_of(checkpoint), (size,) if size and size not in recipe.listed_sizes else (), field)
    layers: dict[str, list[Linear]] = {
        "transformer": transformer_model.linears,
        "text_encoder": encoder_model.linears(family.text_layers[-1]),
    }
    plans = {}
    for name, linears in layers.items():
        with collected.collecting():
            plans[name] = _plan(recipe, checkpoint, name, linears, quantized[name])
            if name == "transformer":
                _check_auto(recipe, plans[name])
                check_steps(recipe.precision, plans[name])
    collected.raise_all()
    return Source(checkpoint, family, has_cfg_batch(checkpoint, family), kept, plans, quantized)


def _check_window(encoder: TextEncoder, length: int, folder: Path) -> None:
    """Refuse a text encoder in which a token does not attend to all tokens before it."""
    if encoder.window is not None and encoder.window < length:
        raise CheckpointError(
            f"{folder / 'config.json'}: sliding_window is {encoder.window} tokens, and text.length is {length}; fluxc compiles "
            "text encoders whose tokens attend to all tokens before them, as FLUX.2's do; use the text encoder as published"
        )


def _check_auto(recipe: Recipe, plan: list[LayerPlan]) -> None:
    """Refuse `exclude: auto` where nothing would be quantized."""
    if recipe.precision.transformer.exclude == "auto" and not to_quantize(plan):
        raise RecipeError(
            "precision.transformer.exclude: auto has nothing to choose from: no layer of the transformer would be quantized; "
            "set `default: nvfp4`, or leave exclude and budget out"
        )


def _plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    component: str,
    layers: list[Linear],
    in_source: Mapping[str, SourceLayer],
    auto: dict[str, str] | None = None,
) -> list[LayerPlan]:
    tensors = checkpoint.components[component].tensors
    source_bytes = {layer.name: tensors[f"{layer.name}.weight"].nbytes for layer in layers}
    return precision_plan(component, layers, getattr(recipe.precision, component), source_bytes, auto, in_source)


def narrowed(component: str, tensors: Mapping[str, TensorRef]) -> list[str]:
    """Names of the weights of `tensors` that a bundle stores in bf16 although the checkpoint holds them in fp32.

    FLUX.2 was trained in bf16; a copy in fp32 takes twice the memory. The VAE, which is small, stays as it is.
    """
    if component == "vae":
        return []
    return [name for name, ref in tensors.items() if ref.dtype == "F32" and name.endswith(".weight")]


def kept_tensors(source: Source, component: str) -> dict[str, TensorRef]:
    """The tensors a bundle stores of `component`: all, but of the text encoder only the layers that are needed."""
    part = source.checkpoint.components[component]
    quantized = source.quantized.get(component, {})
    if component != "text_encoder":
        return part.tensors
    return {
        name: part.tensors[name]
        for name in as_stored(text_encoder_of(source.checkpoint).tensors(source.text_layers_kept), quantized)
    }


def solvable(loaded: LoadedRecipe, source: Source, component: str) -> list[LayerPlan]:
    """The layers that are solved where the recipe asks for that, with `rounding: gptq` or `low_rank`: those of the plan whose
    format can be, and those that would be without the recipe's rules of other formats.

    So rules that go before, which `fluxc tune` writes, can change without anything being solved again.
    """
    planned, asked = source.plans[component], getattr(loaded.recipe.precision, component)
    solving = tuple(rule for rule in asked.rules if rule.format in FORMATS and FORMATS[rule.format].solves)
    precision = msgspec.structs.replace(asked, rules=solving, rounding="nearest")
    layers, in_source = [entry.layer for entry in planned], source.quantized[component]
    try:
        most = precision_plan(component, layers, precision, None, None, in_source)
    except RecipeError:
        # A rule keeps a layer that NVFP4 cannot hold.
        most = planned
    found = []
    for entries in zip(planned, most, strict=True):
        solved = [entry for entry in to_quantize(list(entries)) if FORMATS[entry.format].solves]
        if asked.rounding == "nearest":
            solved = [entry for entry in solved if entry.low_rank]
        if solved:
            smoothing = asked.smoothing != "none"
            found.append(replace(solved[0], format=FORMATS[solved[0].format].solves, smoothing=smoothing))
    return found


def with_auto(loaded: LoadedRecipe, source: Source, ranking: list[dict[str, Any]]) -> Source:
    """`source` with the transformer's plan as `exclude: auto` decided it; `ranking` as sensitivity.measure gives it."""
    chosen = {
        layer: f"rank {rank}, error alone {group['error_alone']}"
        for rank, group in enumerate(ranking, start=1)
        for layer in group["layers"]
        if group["kept"]
    }
    layers = [entry.layer for entry in source.plans["transformer"]]
    in_source = source.quantized["transformer"]
    plan = _plan(loaded.recipe, source.checkpoint, "transformer", layers, in_source, chosen)
    return replace(source, plans={**source.plans, "transformer": plan})
