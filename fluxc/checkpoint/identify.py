"""Which family a checkpoint is of, and what follows for sizes."""

from __future__ import annotations

from fluxc.base.errors import CheckpointError, RecipeError
from fluxc.checkpoint.source import Checkpoint
from fluxc.families.registry import FAMILIES, Family
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.text_encoder import TextEncoder


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of `checkpoint`, after checking that its components are of the classes the family is made of."""
    family = FAMILIES.get(checkpoint.pipeline_class)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.root}: pipeline class {checkpoint.pipeline_class!r} is not supported; "
            f"this fluxc compiles {', '.join(FAMILIES)}"
        )
    for name, expected in family.classes().items():
        actual = checkpoint.components[name].class_name
        if actual != expected:
            raise CheckpointError(f"{checkpoint.root}: {name} is a {actual}, expected {expected}")
    for name, component in checkpoint.components.items():
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        if component.library != library:
            raise CheckpointError(
                f"{checkpoint.root}: model_index.json takes {name} from {component.library!r}, expected {library!r}; "
                "use the file as published"
            )
    scheduler = checkpoint.components["scheduler"]
    for key, value in family.scheduler.items():
        if scheduler.config.get(key, value) != value:
            raise CheckpointError(
                f"{scheduler.folder}: {key} is {scheduler.config[key]!r}; "
                f"fluxc compiles FLUX.2's own schedule, where it is {value!r}"
            )
    return family


def transformer_of(checkpoint: Checkpoint) -> Flux2Transformer:
    """The checkpoint's transformer."""
    component = checkpoint.components["transformer"]
    return family_of(checkpoint).transformer.read(component.config, component.folder)


def text_encoder_of(checkpoint: Checkpoint) -> TextEncoder:
    """The checkpoint's text encoder."""
    component = checkpoint.components["text_encoder"]
    return family_of(checkpoint).text_encoder.read(component.config, component.folder)


def vae_of(checkpoint: Checkpoint) -> Flux2VAE:
    """The checkpoint's VAE."""
    component = checkpoint.components["vae"]
    return family_of(checkpoint).vae.read(component.config, component.folder)


def pixels_per_token(checkpoint: Checkpoint) -> int:
    """Pixels a side of one image token: the VAE's downscaling times its patch."""
    return vae_of(checkpoint).pixels_per_token


def check_sizes(vae: Flux2VAE, sizes: tuple[tuple[int, int], ...], field: str = "sizes") -> None:
    """Refuse sizes, of that field of a recipe, that are not whole numbers of tokens of a model with this VAE."""
    pixels = vae.pixels_per_token
    for height, width in sizes:
        if height < pixels or width < pixels or height % pixels or width % pixels:
            raise RecipeError(
                f"{field}: {height}x{width} is not possible: this model's tokens are {pixels}x{pixels} pixels, "
                f"so height and width must be multiples of {pixels}"
            )


def has_cfg_batch(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether guidance means two rows a step (conditional and empty prompt) instead of an embedded scale."""
    return family.cfg_batch(transformer_of(checkpoint).guidance_embeds, checkpoint.index)
