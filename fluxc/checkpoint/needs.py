"""What running a model takes, counted from its configs: bytes of memory, FLOP. No weight is read and no torch imported.

Text encoder and transformer run one after the other, each for all prompts, as diffusers' own modules; the VAE stays in memory,
and decodes while the transformer is there.

1. A component at a time: its weights in the type that is computed in, and the activations of one row.
2. Layer by layer: two parts of it, the one that runs and the one that is being read; the activations of one row; and what
   every row keeps between two parts.

A part is a block, or a child outside of the blocks. A table of embeddings stays in its file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fluxc.checkpoint.identify import family_of, text_encoder_of, transformer_of, vae_of
from fluxc.checkpoint.source import Checkpoint
from fluxc.models.base import Shape
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.text_encoder import TextEncoder

PART = re.compile(r"((?:\w+\.)*?\w+\.\d+|(?:(?:language_model\.)?model\.)?\w+)\.")
TABLE = "embed_tokens.weight"
PROCESS = 1000 << 20
"""Bytes of a process with torch, diffusers, onnx and numba imported, and what earlier stages of a build left with the
allocator."""
SIDE_BY_SIDE, TRACED_SIDE_BY_SIDE = 8, 2
"""So many prompts go through the transformer together, where it is read layer by layer; of a step trace, which keeps more."""
ALLOCATOR = 1.2
"""What the allocator takes for a byte of activations; weights are asked for in pieces so large that it gives them exactly."""


@dataclass(frozen=True)
class Models:
    """The networks of a checkpoint; of the text encoder `text_layers` layers are run, and the outputs of `text_taken` kept."""

    transformer: Flux2Transformer
    text_encoder: TextEncoder
    vae: Flux2VAE
    text_layers: int
    text_taken: int


@dataclass(frozen=True)
class Asked:
    """`prompts` images of `size` (height, width) pixels in `steps` steps, each with `rows` guidance rows.

    `itemsize`: bytes of the type that is computed in. `observed`: bytes that observers keep. Where layers are read, so many
    prompts go `together` through the transformer.
    """

    prompts: int
    rows: int
    steps: int
    size: tuple[int, int]
    text_tokens: int
    itemsize: int = 2
    observed: int = 0
    together: int = SIDE_BY_SIDE

    def with_size(self, size: tuple[int, int]) -> Asked:
        """The same at another size."""
        return replace(self, size=size)


def models_of(checkpoint: Checkpoint) -> Models:
    """The networks of `checkpoint`: of its text encoder one layer more than the last that is taken."""
    taken, encoder = family_of(checkpoint).text_layers, text_encoder_of(checkpoint)
    layers = min(encoder.num_hidden_layers, taken[-1] + 1)
    return Models(transformer_of(checkpoint), encoder, vae_of(checkpoint), layers, len(taken))


def parts_of(tensors: Mapping[str, Shape]) -> Counter[str]:
    """Values of each part by its name, from the names and shapes of a component's tensors; no table of embeddings."""
    found: Counter[str] = Counter()
    for name, shape in tensors.items():
        if not name.endswith(TABLE):
            matched = PART.match(name)
            found[matched[1] if matched else name] += math.prod(shape)
    return found


def memory_by_component(models: Models, asked: Asked) -> int:
    """Bytes of the process at its peak, with one component in memory at a time."""
    peaks = []
    for component in (_TextEncoder(models, asked), _Transformer(models, asked)):
        weights = asked.itemsize * sum(component.parts.values()) + component.largest_read
        peaks.append(weights + ALLOCATOR * (component.kept + component.activations))
    return PROCESS + int(max(peaks)) + _besides(models, asked)


def memory_by_layer(models: Models, asked: Asked) -> int:
    """Bytes of the process at its peak, with two parts of a component in memory at a time."""
    peaks = []
    for component in (_TextEncoder(models, asked), _Transformer(models, asked)):
        weights = asked.itemsize * sum(size for _, size in component.parts.most_common(2)) + component.largest_read
        peaks.append(weights + ALLOCATOR * (component.calls * component.kept + component.activations))
    return PROCESS + int(max(peaks)) + _besides(models, asked)


def memory_of_calls(models: Models, asked: Asked, component: str, calls: int) -> int:
    """Bytes of the process at its peak while so many calls of the transformer or the text encoder go through it together, two
    parts of it in memory at a time; each call keeps its residual streams alone."""
    found = (_TextEncoder if component == "text_encoder" else _Transformer)(models, asked)
    layers = models.text_layers + 2 if component == "text_encoder" else 1
    weights = asked.itemsize * sum(size for _, size in found.parts.most_common(2)) + found.largest_read
    kept = calls * 2 * found.kept / layers
    return PROCESS + int(weights + ALLOCATOR * (kept + found.activations)) + _besides(models, asked)


def tokens_of(models: Models, asked: Asked, component: str) -> int:
    """Tokens of one call of the transformer or the text encoder."""
    return asked.text_tokens + (image_tokens(models, asked.size) if component == "transformer" else 0)


def weights_read(models: Models, asked: Asked, by_layer: bool) -> int:
    """Bytes that are read from the checkpoint's files, stored in 16 bits: once, or, layer by layer, the transformer's once a
    step."""
    text, image = _TextEncoder(models, asked), _Transformer(models, asked)
    again = asked.steps * -(-asked.prompts // asked.together) if by_layer else 1
    return 2 * (sum(text.parts.values()) + again * sum(image.parts.values()) + vae_weights(models))


def decoding(vae: Flux2VAE, asked: Asked) -> int:
    """Bytes of activations that decoding one image takes in torch."""
    latents = math.prod(asked.size) * math.prod(vae.patch_size) // vae.pixels_per_token**2
    scores = latents**2 if vae.mid_block_add_attention else 0
    return int(asked.itemsize * (4 * vae.values_per_latent * latents + min(scores, 512 * latents)))


def text_flop(models: Models, tokens: int) -> float:
    """FLOP of encoding one prompt of so many tokens."""
    encoder = models.text_encoder
    linears = sum(layer.out_features * layer.in_features for layer in encoder.linears(models.text_layers))
    attention = 4.0 * tokens**2 * encoder.num_attention_heads * encoder.head_width * models.text_layers
    return 2.0 * linears * tokens + attention


def decoding_flop(vae: Flux2VAE, size: tuple[int, int]) -> float:
    """FLOP of decoding one image: its convolutions at the positions each of them is applied to, and its attention."""
    latents = math.prod(size) * math.prod(vae.patch_size) // vae.pixels_per_token**2
    last = len(vae.decoder_widths) - 1
    flop = 0.0
    for name, shape in vae.tensors.items():
        if not name.startswith(("decoder.", "post_quant_conv.")) or len(shape) < 2:
            continue
        block = re.match(r"decoder\.up_blocks\.(\d+)\.(\w+)", name)
        finer = 0 if block is None else int(block[1]) + (block[2] == "upsamplers")
        if name.startswith("decoder.conv_out"):
            finer = last
        flop += 2.0 * math.prod(shape) * latents * 4**finer
    if vae.mid_block_add_attention:
        flop += 4.0 * latents**2 * vae.decoder_widths[-1]
    return flop


def image_tokens(models: Models, size: tuple[int, int]) -> int:
    """Image tokens of the transformer at `size` (height, width) in pixels."""
    return math.prod(size) // models.vae.pixels_per_token**2


class _Component:
    """`kept`: bytes that a row keeps from part to part; `activations`: what one row takes besides inside of a part;
    `largest_read`: of a tensor that is read and converted; `calls`: rows that are on their way together."""

    parts: Counter[str]
    kept: int
    activations: int
    largest_read: int
    calls: int


class _TextEncoder(_Component):
    """Every layer's output is kept until the last is there; attention has a mask, so its scores are written out."""

    def __init__(self, models: Models, asked: Asked) -> None:
        encoder, tokens, item = models.text_encoder, asked.text_tokens, asked.itemsize
        tensors = encoder.tensors(models.text_layers)
        self.parts = parts_of(tensors)
        self.largest_read = _converted(tensors, item)
        self.calls = asked.prompts + (asked.rows > 1)
        self.kept = (models.text_layers + 2) * tokens * encoder.hidden_size * item
        heads = encoder.num_attention_heads
        queries = heads * encoder.head_width
        features = 4 * encoder.hidden_size + 6 * queries + 3 * encoder.intermediate_size
        self.activations = tokens * features * item + 2 * heads * tokens**2 * 4


class _Transformer(_Component):
    """Residual streams, modulation and rotary embeddings are kept; a single-stream block has the most activations, or the VAE,
    which decodes the images while the transformer is still there."""

    def __init__(self, models: Models, asked: Asked) -> None:
        model, item = models.transformer, asked.itemsize
        tokens = asked.text_tokens + image_tokens(models, asked.size)
        self.parts = parts_of(model.tensors)
        self.largest_read = _converted(model.tensors, item)
        self.calls = min(asked.prompts, asked.together) * asked.rows
        self.kept = tokens * (3 * model.width * item + 2 * model.attention_head_dim * 4)
        of_block = tokens * (14 * model.width + 5 * model.mlp_width) * item
        self.activations = max(of_block, decoding(models.vae, asked))


def _converted(tensors: Mapping[str, Shape], itemsize: int) -> int:
    """Bytes of the largest tensor as it is stored, beside its converted copy; none where nothing is converted."""
    largest = max(math.prod(shape) for name, shape in tensors.items() if not name.endswith(TABLE))
    return 0 if itemsize == 2 else 2 * largest


def _besides(models: Models, asked: Asked) -> int:
    """Bytes of the VAE's weights, of embeddings and latents of all prompts, and of what is observed."""
    text = asked.text_tokens * models.text_taken * models.text_encoder.hidden_size
    latents = image_tokens(models, asked.size) * models.transformer.in_channels
    values = (asked.prompts + (asked.rows > 1)) * text + 4 * asked.prompts * latents + vae_weights(models)
    return asked.itemsize * values + asked.observed


def vae_weights(models: Models) -> int:
    """Values of the VAE's weights."""
    return sum(math.prod(shape) for shape in models.vae.tensors.values())
