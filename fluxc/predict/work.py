"""What one rank does in one denoising step: GEMMs, memory traffic, exchanges, counted from the config and the plan.

1. Every Linear is a GEMM over the tokens of its stream; those outside the streams run once a guidance branch.
2. Attention is 4 T^2 D FLOP a block and branch, divided among the ranks by heads.
3. Everything else moves data: what each pass of a block reads and writes, as TensorRT-RTX's plans pass over it.
4. Factors of low rank are two GEMMs in bf16 more, and a pass that adds what they give. Smoothed inputs are multiplied in a
   pass that is there without it; what they are multiplied by is read, once for a fusion group.
5. A rank gives four activations of its tokens a block to all-to-alls; 1/ranks of them stay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from fluxc.formats.bf16 import BF16
from fluxc.formats.constants import BLOCK
from fluxc.formats.registry import FORMATS, multiplied_in
from fluxc.formats.smoothing import smoothing_bytes
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.decoder import Decoder
from fluxc.targets.sharding import Shards

ACTIVATION = 2
"""Bytes of an activation: bf16."""

KERNELS = {"double": 31, "single": 12}
"""Kernels of a bf16 block of one rank in TensorRT-RTX 1.7.1's plans."""
KERNELS_QUANTIZING = 3
KERNELS_SHARDED = 4
KERNELS_LOW_RANK = 3
"""Of one layer's factors: two GEMMs, and what adds their product to the layer's."""

VAE_WORKING, VAE_WORKING_RANGE, VAE_WORKING_UNEVEN = 6.2, 7.12, 11.6
"""Working memory of a decoder's plan for one size; of one for a range of sizes; and of either where the channels of a
normalization's group are no power of two, which TensorRT-RTX 1.7.1 normalizes in fp32 with copies. In activations of the
image's pixels by the width of the decoder's last block. Attention takes no more, for that is what its tiles are for, but in a
range of more than four megapixels, whose tiles are as few as divide every size."""
LARGE_DECODER = 3 << 30
"""Bytes of working memory from which on tiles of the image are worth a word: whole images of two megapixels."""


@dataclass(frozen=True)
class Gemm:
    """`count` equal GEMMs a step: FLOP and bytes read and written, of one."""

    format: str
    flop: float
    nbytes: float
    count: int = 1


@dataclass(frozen=True)
class Work:
    """What one of `ranks` does in a step. `moved_bytes`: read and written by everything but GEMMs and attention;
    `sent_bytes`: what leaves the rank; `working_bytes`: the most that one plan needs beside its inputs and outputs.
    """

    ranks: int
    gemms: tuple[Gemm, ...]
    attention_flop: float
    moved_bytes: float
    sent_bytes: float
    exchanges: int
    kernels: int
    working_bytes: float

    @property
    def flop(self) -> float:
        """Floating point operations a step, a multiplication and an addition being two."""
        return self.attention_flop + sum(gemm.flop * gemm.count for gemm in self.gemms)


def decoder_working(decoder: Decoder) -> int:
    """Bytes of working memory of the plan that decodes the largest size of `decoder`."""
    (rows, columns), vae = decoder.largest, decoder.vae
    width, pixels = vae.decoder_widths[0], rows * columns * vae.pixels_per_token**2
    activations = VAE_WORKING_RANGE if decoder.between else VAE_WORKING
    if (width // vae.norm_num_groups).bit_count() > 1:
        activations = VAE_WORKING_UNEVEN
    nbytes = activations * ACTIVATION * width * pixels
    if decoder.between:
        # A plan for a range keeps scores before and after softmax where it keeps two of the largest activations.
        nbytes += 2 * ACTIVATION * max(0, decoder.scores - decoder.activation)
    return int(nbytes)


def tile_hint() -> str:
    """What makes the decoder take less, as a clause."""
    return "a recipe with `vae: {tile: [1024, 1024]}` decodes large images in tiles and takes less"


def work_of(transformer: Flux2Transformer, plan: list[LayerPlan], shards: Shards, branches: int) -> Work:
    """The work of one rank that holds `shards`, with the precision `plan` of `transformer`."""
    ranks, text, image = shards.ranks, branches * shards.text_tokens, branches * shards.image_tokens
    width, hidden, blocks = transformer.width, transformer.mlp_width, transformer.blocks
    doubles, singles = transformer.num_layers, transformer.num_single_layers
    tokens = text + image
    gemms: Counter[Gemm] = Counter()
    moved = 0.0
    kernels = KERNELS["double"] * doubles + KERNELS["single"] * singles
    layers = _fused(plan)
    for layer in layers:
        rows = _rows(layer.name, text, image, branches)
        gemms[_gemm(layer, rows)] += 1
        moved += _quantizing(layer) * rows + _swizzling(layer) + _dequantizing(layer)
        moved += layer.smoothed * smoothing_bytes(layer.in_features)
        kernels += KERNELS_QUANTIZING * (layer.format != BF16)
    for entry in plan:
        if entry.rank:
            rows = _rows(entry.layer.name, text, image, branches)
            gemms.update(_low_rank(entry, rows))
            moved += 3 * ACTIVATION * rows * entry.layer.out_features
            kernels += KERNELS_LOW_RANK
    double, single, exchanging = (ACTIVATION * sum(map(sum, passes)) for passes in _passes(width, hidden))
    moved += tokens * (double * doubles + single * singles)
    if ranks > 1:
        moved += tokens * blocks * exchanging
        kernels += KERNELS_SHARDED * blocks
    whole = (shards.text_tokens + shards.image_tokens) * ranks
    dequantized: Counter[str] = Counter()
    for layer in layers:
        dequantized[_block(layer.name)] += 2 * layer.parameters * (_dequantizing(layer) > 0)
    copies = max(_swizzling(layer) / 2 for layer in layers) + max(dequantized.values())
    return Work(
        ranks=ranks,
        gemms=tuple(replace(gemm, count=count) for gemm, count in gemms.items()),
        attention_flop=4.0 * whole**2 * width * branches * blocks / ranks,
        moved_bytes=moved,
        sent_bytes=shards.exchanged_bytes * (ranks - 1) / ranks,
        exchanges=2 * blocks if ranks > 1 else 0,
        kernels=kernels,
        # Where a single-stream block is fullest: a GEMM's output, the next one's input in fp32, copies of block scales; and at
        # most all weights of a block that are dequantized, since TensorRT-RTX does that early (49 to 87 % of them, measured).
        working_bytes=tokens * (ACTIVATION * (3 * width + 2 * hidden) + 4 * (width + hidden)) + copies,
    )


@dataclass(frozen=True)
class _Layer:
    """Linears that an engine merges into one GEMM: [out, in] of all together."""

    name: str
    out_features: int
    in_features: int
    format: str
    smoothed: bool = False

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


def _fused(plan: list[LayerPlan]) -> list[_Layer]:
    """The plan's Linears, those of one fusion group as one layer."""
    layers: dict[str, _Layer] = {}
    for entry in plan:
        key = entry.layer.group or entry.layer.name
        outputs = entry.layer.out_features + (layers[key].out_features if key in layers else 0)
        layers[key] = _Layer(entry.layer.name, outputs, entry.layer.in_features, entry.format, entry.is_smoothed)
    return list(layers.values())


def _block(name: str) -> str:
    """The block of a layer: the first two parts of its name."""
    return ".".join(name.split(".")[:2])


def _rows(name: str, text: int, image: int, branches: int) -> int:
    """How many tokens of a rank the Linear `name` is applied to."""
    if name.startswith("single_transformer_blocks."):
        return text + image
    if name.startswith("transformer_blocks."):
        return text if any(part in name for part in (".add_", ".to_add_out", ".ff_context.")) else image
    return {"x_embedder": image, "proj_out": image, "context_embedder": text}.get(name, branches)


def _gemm(layer: _Layer, rows: int) -> Gemm:
    format = multiplied_in(layer.format)
    weight = 2 * layer.parameters if format == BF16 else FORMATS[format].nbytes(layer.out_features, layer.in_features)
    read = weight + rows * layer.in_features * _input_bits(layer) / 8
    return Gemm(format, 2.0 * rows * layer.parameters, read + ACTIVATION * rows * layer.out_features)


def _low_rank(entry: LayerPlan, rows: int) -> list[Gemm]:
    """The GEMMs with both factors of a layer; inputs are read as they are before they are rounded."""
    rank = entry.rank
    return [
        Gemm(BF16, 2.0 * rows * rank * width, ACTIVATION * (rank * width + rows * (rank + width)))
        for width in (entry.layer.in_features, entry.layer.out_features)
    ]


def _input_bits(layer: _Layer) -> float:
    """Bits of a value that a GEMM reads: inputs are quantized as weights are, unless those are dequantized first."""
    format = multiplied_in(layer.format)
    return 16 if format == BF16 else FORMATS[format].bits_with_scales(layer.in_features)


def _quantizing(layer: _Layer) -> float:
    """Bytes a token: the pass before leaves a quantized layer's input in fp32, which one more pass quantizes."""
    if multiplied_in(layer.format) == BF16:
        return 0.0
    return layer.in_features * ((4 - ACTIVATION) + 4 + _input_bits(layer) / 8)


def _swizzling(layer: _Layer) -> float:
    """Bytes a step: block scales of bound weights are brought into the order of the tensor cores in two copies."""
    return 4 * layer.parameters / BLOCK if layer.format == "nvfp4" else 0.0


def _dequantizing(layer: _Layer) -> float:
    """Bytes a step: a weight that is multiplied in bf16 and stored in fewer bits is read, and written in bf16."""
    if layer.format == BF16 or multiplied_in(layer.format) != BF16:
        return 0.0
    return FORMATS[layer.format].nbytes(layer.out_features, layer.in_features) + 2.0 * layer.parameters


def _passes(width: int, hidden: int) -> tuple[list[tuple[int, int]], ...]:
    """The passes over every token of a double-stream block, a single-stream block, and around the exchanges of either, each
    as (values read, values written)."""
    queries = [
        (2 * width, 2 * width),  # norms of queries and keys
        (4 * width, 2 * width),  # their rotation, which reads each with its pair
    ]
    double = [
        (width, width),  # norm and modulation
        (3 * width, 3 * width),  # the GEMM's output into queries, keys and values
        *queries,
        (width, width),  # attention's output into streams
        (2 * width, 2 * width),  # gate and residual, then norm and modulation
        (2 * hidden, hidden),  # SwiGLU
        (2 * width, width),  # gate and residual
    ]
    single = [
        (width, width),
        (3 * width + 2 * hidden, 3 * width + hidden),  # the same, with SwiGLU in it
        *queries,
        (width + hidden, width + hidden),  # attention beside SwiGLU
        (2 * width, width),
    ]
    exchanging = [
        (width, width),  # queries, keys and values into parts for the ranks
        (3 * width, 3 * width),  # what came from the ranks into the order of attention
        (width, width),  # the output into parts
    ]
    return double, single, exchanging
