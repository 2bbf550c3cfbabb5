"""The recipe as data: what to compile, for whom, and how good it must be. Each field says itself what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from fluxc.recipe.fields import (
    LAGS,
    LEAST_SHARD_GIB,
    LONGEST_TEXT,
    MOST_MARGIN,
    MOST_OVERLAP,
    USUAL_SIDE,
    AtOnce,
    Count,
    Decibels,
    Format,
    Guidance,
    Positive,
    PresetName,
    Rank,
    Seed,
    Share,
    Size,
    Steps,
    about,
)
from fluxc.recipe.targets import Target

LEAST_STEPS = 10
"""Of an image, for a step cache to skip any."""

Scales = Literal["max", "mse", "four-over-six"]
RoundingMethod = Literal["nearest", "gptq"]
Smoothing = Literal["none", "auto"]


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint, and components of it that are elsewhere."""

    source: Annotated[
        str,
        about(
            "a diffusers folder, or a hub id (owner/name), of which a build downloads what it reads; see [sources](sources.md)",
            "../models/flux2-nano",
            "black-forest-labs/FLUX.2-klein-4B",
        ),
    ]
    revision: Annotated[str | None, about("of the hub id: a branch, tag or commit", "main", left_out="the newest")] = (
        None
    )
    variant: Annotated[
        str | None,
        about(
            "takes the weights with this word in their names, NAME.fp16.safetensors for `fp16`; a component without such "
            "files is taken as it is",
            "fp16",
            left_out="files without one",
        ),
    ] = None
    transformer: Annotated[
        str | None,
        about(
            "its weights from elsewhere: one .safetensors file (diffusers' layout or Black Forest Labs'), here or on the hub "
            "(owner/name/FILE), or a component's folder with its own config.json",
            "flux-2-klein-4b.safetensors",
            left_out="of `source`",
        ),
    ] = None
    text_encoder: Annotated[
        str | None,
        about(
            "the same for the text encoder; a file in transformers' layout",
            "../text_encoder",
            left_out="of `source`",
        ),
    ] = None
    vae: Annotated[
        str | None,
        about("the same for the VAE", "flux2-vae.safetensors", left_out="of `source`"),
    ] = None
    tokenizer: Annotated[
        str | None,
        about("a tokenizer's folder", "../tokenizer", left_out="of `source`"),
    ] = None


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How prompts are read."""

    length: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=LONGEST_TEXT)],
        about(
            "tokens that every prompt is padded to, chat template included; a longer prompt is refused. Graphs are compiled "
            "for this length",
            512,
        ),
    ] = 512


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request gets that does not say otherwise, and what fidelity is measured with."""

    steps: Annotated[Steps, about("denoising steps; 4 for the distilled klein models", 4)] = 50
    guidance: Annotated[
        Guidance,
        about(
            "strength of the guidance. For dev it is an input of the transformer. For klein base it is classifier-free: 1.0 "
            "turns it off, and a step then takes one pass of the transformer instead of two",
            1.0,
        ),
    ] = 4.0


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pass that measures the inputs of every layer."""

    prompts: Annotated[
        str | None,
        about(
            "the prompts to measure with: a text file, one prompt a line. Needed unless `engine` is none",
            "prompts/natural-calibration.txt",
        ),
    ] = None
    max_prompts: Annotated[
        Count | None,
        about(
            "takes at most so many of the prompts, spread evenly over the file",
            4,
            left_out="all of them; 4 for a [large model](#large-models)",
        ),
    ] = None
    steps: Annotated[
        Steps | None,
        about(
            "denoising steps of each image",
            24,
            left_out="`sampling.steps`; at most 4 for a [large model](#large-models)",
        ),
    ] = None
    guidance: Annotated[Guidance | None, about("as in `sampling`", 1.5, left_out="`sampling.guidance`")] = None
    size: Annotated[
        Size | None,
        about(
            "[height, width] to measure at: any multiple of the model's token, need not be one of `sizes`",
            [256, 256],
            left_out="the first of `sizes`; at most 256x256 pixels for a [large model](#large-models)",
        ),
    ] = None
    seed: Annotated[
        Seed, about("prompt i (from 0) starts from the noise of seed + i; all must be less than 2^64", 0)
    ] = 0
    engine: Annotated[
        Literal["fluxc", "modelopt", "none"],
        about(
            "`none` runs no model: ranges come from a published table of the family, or from a constant "
            "([calibration](calibration.md#without-a-model)); `modelopt` lets NVIDIA Model Optimizer quantize the transformer "
            "under the same plan; needs CUDA and nvidia-modelopt (not run on a GPU yet)",
            "modelopt",
        ),
    ] = "fluxc"
    algorithm: Annotated[
        Literal["max", "awq_lite", "svdquant"], about("of `engine: modelopt`; fluxc's own is `max`", "awq_lite")
    ] = "max"
    amax: Annotated[
        Literal["max", "percentile", "mse"],
        about(
            "what an `input_scale` stands for: the largest input seen, a percentile of the inputs, or the range of least "
            "squared error; see [calibration](#calibration)",
            "mse",
        ),
    ] = "max"
    percentile: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=100)],
        about("for `amax: percentile`: that many percent of a layer's inputs do not exceed the range", 99.9),
    ] = 99.99
    margin: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=MOST_MARGIN)] | None,
        about(
            "an `input_scale` stands for so many times the range that was found, for inputs that calibration never saw; less "
            "than 1 clips inputs that it saw ([calibration](calibration.md#the-margin))",
            8,
            left_out="8 for NVFP4 layers with `amax: max`, and for the published ranges of `engine: none`; otherwise 1",
        ),
    ] = None
    file: Annotated[
        str | None,
        about(
            "a file made by `fluxc calibrate`, used in place of running the model; refused if it was made on another "
            "checkpoint, or with other prompts, steps, guidance, size, seed or text length",
            "klein.calibration",
            left_out="the build measures",
        ),
    ] = None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers that match get this format."""

    match: Annotated[str, about("a pattern of layer names; see [precision](#precision)", "*.ff_context.linear_out")]
    format: Annotated[Format, about("the format of the layers that match", "fp8")]


class LowRank(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers in NVFP4 that match get factors of this rank."""

    match: Annotated[str, about("a pattern of layer names; see [precision](#precision)", "*.to_qkv_mlp_proj")]
    rank: Annotated[
        Rank, about("a multiple of 16, at most the layer's inputs and outputs; SVDQuant publishes 16, 32 and 128", 32)
    ]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `exclude: auto` may spend; one of the two."""

    share: Annotated[
        Share | None,
        about("at most so much of the component's parameters stays bf16, besides what rules and preset keep", 0.03),
    ] = None
    error: Annotated[
        Share | None,
        about(
            "the relative error of the velocity that is allowed (root of the mean of |v - reference|^2 / |reference|^2); as "
            "few parameters as reach it stay bf16",
            0.05,
        ),
    ] = None


class ComponentPrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Formats of one component's Linears; which field decides about a layer: see [precision](#precision)."""

    default: Annotated[Format, about("the format of layers that nothing else decides about", "nvfp4")] = "bf16"
    exclude: Annotated[
        tuple[str, ...] | Literal["auto"],
        about(
            "patterns of layers that stay bf16; `auto` measures which should, under `budget`",
            ["x_embedder", "norm_out*"],
        ),
    ] = ()
    budget: Annotated[Budget | None, about("how much `exclude: auto` may keep", {"share": 0.03})] = None
    preset: Annotated[PresetName | None, about("a published list of layers that stay bf16", "modelopt-flux2")] = None
    rules: Annotated[
        tuple[Rule, ...],
        about("formats by pattern; the first that matches counts", [{"match": "*.to_q", "format": "fp8"}]),
    ] = ()
    scales: Annotated[
        Scales,
        about("how block scales of NVFP4 and MXFP4 are chosen; see [block scales](#block-scales)", "four-over-six"),
    ] = "max"
    rounding: Annotated[
        RoundingMethod,
        about(
            "how weights in NVFP4 are rounded: each value by itself, or solved so that the layer's output on calibration's "
            "inputs stays what it was; see [rounding](#rounding)",
            "gptq",
        ),
    ] = "nearest"
    low_rank: Annotated[
        tuple[LowRank, ...],
        about(
            "factors in bf16 beside weights in NVFP4 (SVDQuant), fitted on calibration's inputs: a product of low rank that "
            "takes the largest part of the weight, and is multiplied with inputs that are not rounded. By pattern; the first "
            "that matches counts; see [low rank](#low-rank)",
            [{"match": "*", "rank": 32}],
        ),
    ] = ()
    smoothing: Annotated[
        Smoothing,
        about(
            "`auto`: where that loses less, layers in NVFP4 that are solved (`low_rank`, `rounding: gptq`) have their inputs "
            "multiplied, channel by channel, by what their weight is divided by (SVDQuant, AWQ); see [smoothing](#smoothing)",
            "auto",
        ),
    ] = "none"

    @property
    def is_solved(self) -> bool:
        """Whether weights, or factors beside them, are solved against calibration's inputs."""
        return self.rounding != "nearest" or bool(self.low_rank)


class StepRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Steps at which inputs of NVFP4 layers are not rounded; give one of `first`, `last`, `at` and `worst`."""

    first: Annotated[Count | None, about("so many steps at the start", 1)] = None
    last: Annotated[Count | None, about("so many steps at the end", 5)] = None
    at: Annotated[
        Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)] | None,
        about("these steps, counted from 1; `fluxc tune` writes them", [9, 12]),
    ] = None
    worst: Annotated[
        Count | None,
        about(
            "so many steps, those at which rounding inputs costs the velocity most, measured on calibration's prompts",
            5,
        ),
    ] = None
    activations: Annotated[
        Literal["bf16"], about("what inputs of the layers are at these steps; a GPU then multiplies in bf16", "bf16")
    ] = "bf16"
    layers: Annotated[
        Annotated[tuple[str, ...], msgspec.Meta(min_length=1)],
        about("patterns of the layers that this is for; those among them in NVFP4 change", ["*.to_qkv_mlp_proj"]),
    ] = ("*",)

    @property
    def is_measured(self) -> bool:
        """Whether which steps these are is measured."""
        return self.first is None and self.last is None and self.at is None

    def numbers(self, steps: int) -> Sequence[int]:
        """Which of `steps` steps, counted from 0, where that is not measured."""
        if self.at is not None:
            return [number - 1 for number in self.at]
        return range(min(self.first, steps)) if self.first else range(max(0, steps - (self.last or 0)), steps)


class Precision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Formats by component; the VAE is never quantized."""

    transformer: Annotated[
        ComponentPrecision, about("of the transformer's layers", {"default": "nvfp4", "preset": "modelopt-flux2"})
    ] = ComponentPrecision(default="nvfp4")
    text_encoder: Annotated[ComponentPrecision, about("of the text encoder's layers", {"default": "fp8"})] = (
        ComponentPrecision()
    )
    steps: Annotated[
        tuple[StepRule, ...] | Literal["auto"],
        about(
            "steps at which the transformer's inputs are rounded less, for targets that round them; the first rule that has a "
            "step counts. `auto` takes the fewest steps that take away half of the squared error that rounded inputs add. See "
            "[precision over steps](#precision-over-steps)",
            [{"last": 5}],
        ),
    ] = ()


QUANTIZED = ("transformer", "text_encoder")
"""The components whose layers can be quantized."""


class StepCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Skips denoising steps, as TeaCache does; leave it out where every step is to be computed."""

    skip: Annotated[
        Positive | Literal["auto"] | None,
        about(
            "steps to skip, on average over images; `auto` is the knee of the curve of accumulated error",
            19,
            left_out="`auto`, without `max_error`",
        ),
    ] = None
    max_error: Annotated[
        Positive | None,
        about(
            "in place of `skip`: as many steps as keep the accumulated error of the final latents (root mean square, to first "
            "order) under this",
            0.05,
        ),
    ] = None
    mode: Annotated[
        Literal["static", "dynamic"],
        about(
            "`static` skips the best fixed steps; `dynamic` decides by the polynomial while an image is generated",
            "dynamic",
        ),
    ] = "static"
    degree: Annotated[Annotated[int, msgspec.Meta(ge=1, le=5)], about("of the polynomial", 3)] = 3
    fit: Annotated[
        Literal["constrained", "plain"], about("`constrained`: the polynomial never falls; `plain`: it may", "plain")
    ] = "constrained"
    first: Annotated[Count, about("steps at the start that are always computed", 2)] = 1
    last: Annotated[Annotated[int, msgspec.Meta(ge=0)], about("steps at the end that are always computed", 1)] = 1
    max_consecutive_skips: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=LAGS)],
        about("most steps skipped in a row; a trace looks back no further than the largest value", 4),
    ] = 4
    min_r2: Annotated[
        Annotated[float, msgspec.Meta(le=1)],
        about(
            "least share of the variance on held-out prompts that the polynomial must explain, or the build fails", 0.3
        ),
    ] = 0.3
    on_mismatch: Annotated[
        Literal["refuse", "warn", "allow"],
        about("what happens to requests of another size or number of steps than was traced", "refuse"),
    ] = "warn"
    prompts: Annotated[
        str | None,
        about(
            "the prompts to trace: a text file, one prompt a line; at least 8, every fourth is held out",
            "prompts/flux2-nano-steps.txt",
            left_out="`calibration.prompts`",
        ),
    ] = None
    traced: Annotated[
        Literal["quantized", "reference"],
        about(
            "the model whose steps are recorded: `quantized`, with weights rounded as in the bundle, and inputs where a target "
            "rounds them; `reference`, the checkpoint's own",
            "reference",
        ),
    ] = "quantized"
    compare: Annotated[
        bool,
        about(
            "also trace the checkpoint's own model, and report what a step cache fitted on it would skip and cost: twice the "
            "time of the trace, and images of every held-out prompt",
            True,
        ),
    ] = False
    trace: Annotated[
        str | None,
        about(
            "a file made by `fluxc trace`, used in place of running the model",
            "klein.trace",
            left_out="the build traces",
        ),
    ] = None
    frontier: Annotated[
        tuple[Count, ...] | Literal["auto"],
        about(
            "numbers of skipped steps that the report compares; `auto` is a tenth to six tenths of the steps, `[]` the chosen "
            "number alone",
            [10, 20, 30],
        ),
    ] = "auto"


class Vae(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the VAE decodes images larger than a tile; leave it out where every image is to be decoded whole."""

    tile: Annotated[
        Size,
        about(
            "[height, width] in pixels: a size that is larger in either is decoded in tiles of this size, so that memory "
            "follows the tile. Multiples of the model's token, at least 8 tokens, and less than the largest of `sizes`",
            [1024, 1024],
        ),
    ]
    overlap: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=MOST_OVERLAP)],
        about("the part of a tile that its neighbours share with it at least, and are blended over", 0.25),
    ] = 0.25


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are filed."""

    shard_gib: Annotated[
        Annotated[float, msgspec.Meta(ge=LEAST_SHARD_GIB)] | None,
        about(
            "a component larger than this (GiB) is written as several files with an index", 4, left_out="one file each"
        ),
    ] = None


class Fidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How every target is compared with diffusers."""

    prompts: Annotated[
        str | None,
        about(
            "held-out prompts, none of them calibrated on: a text file, one prompt a line. Needed unless `level` is none",
            "prompts/natural-held-out.txt",
        ),
    ] = None
    level: Annotated[
        Literal["none", "stages", "images"] | None,
        about(
            "`stages` compares text encoder, prologue, velocity and decoder on recorded inputs, one component in memory at a "
            "time; `images` also finished images; `none` compares nothing",
            "stages",
            left_out="`images`; `stages` for a [large model](#large-models)",
        ),
    ] = None
    max_prompts: Annotated[
        Count | None,
        about(
            "takes at most so many of the prompts, spread evenly over the file",
            1,
            left_out="all of them; 1 for a [large model](#large-models)",
        ),
    ] = None
    steps: Annotated[
        Steps | None,
        about(
            "denoising steps of each reference image",
            4,
            left_out="`sampling.steps`; at most 4 for `stages`",
        ),
    ] = None
    size: Annotated[
        Size | None,
        about(
            "[height, width] to compare at; one of `sizes`",
            [256, 256],
            left_out="the first of `sizes`; the smallest for `stages`",
        ),
    ] = None
    seed: Annotated[
        Seed, about("prompt i (from 0) starts from the noise of seed + i; all must be less than 2^64", 1000)
    ] = 1000
    reference: Annotated[
        Literal["float32", "bfloat16"],
        about(
            "what diffusers computes the reference, and the step trace, in; `bfloat16` takes half the memory",
            "bfloat16",
        ),
    ] = "float32"
    lpips: Annotated[
        str | None,
        about(
            "torchvision's AlexNet file: adds LPIPS to the step cache's page; needs the package lpips. Nothing is downloaded",
            "alexnet-owt-7be5be79.pth",
        ),
    ] = None
    attribution: Annotated[
        bool,
        about(
            "measure what rounded weights, rounded inputs and the text encoder each cost alone, for the [report](report.md): "
            "some passes of the model. With level `images` also an image of each cause alone, step cache and type of the VAE "
            "too, of at most two held-out prompts: six step loops of each",
            True,
        ),
    ] = False
    image_text: Annotated[
        str | None,
        about(
            "a CLIP model's folder: adds image-text agreement to the step cache's page; nothing is downloaded",
            "clip-vit-b32",
        ),
    ] = None


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The worst result a build may have. A gate that is left out is not checked."""

    layer_snr_db: Annotated[
        float | None,
        about(
            "least signal-to-noise ratio (dB) of a quantized weight against bf16, every layer by itself; of a weight that was "
            "solved (`rounding: gptq`), of the layer's output",
            15,
        ),
    ] = None
    step_cosine: Annotated[
        Annotated[float, msgspec.Meta(ge=-1, le=1)] | None,
        about("least cosine of a step's velocity with diffusers', both fed diffusers' latents; 1 is identical", 0.98),
    ] = None
    image_psnr_db: Annotated[
        Decibels | None,
        about(
            "least mean PSNR (dB) of finished images against diffusers', over the held-out prompts; 120 is identical",
            30,
        ),
    ] = None
    compute_error: Annotated[
        Annotated[float, msgspec.Meta(gt=0)] | None,
        about(
            "largest relative error of velocities, root mean square over steps and prompts, of a target that computes in fewer "
            "bits than `compute: exact`, against the same target that computes so; both must be in the recipe",
            0.02,
        ),
    ] = None
    step_cache_psnr_db: Annotated[
        Decibels | None,
        about("least mean PSNR (dB) of images with the step cache against the same target computing every step", 25),
    ] = None


class SizeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every size from one to another: any height and any width between them, in steps of the model's token."""

    min: Annotated[Size, about("the least height and width", [256, 256])]
    max: Annotated[Size, about("the greatest height and width", [2048, 2048])]
    default: Annotated[
        Size | None,
        about(
            "what a request gets that asks for no size, and the size fidelity is measured at",
            [1024, 1024],
            left_out="1024 a side, or as near to it as the range is",
        ),
    ] = None


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe of fluxc: what to compile, for whom, and how good it must be."""

    name: Annotated[
        str,
        about(
            "the bundle's name, and its folder below `artifacts/`: at most 200 letters, digits, '.', '_' and '-', the first a "
            "letter or digit",
            "flux2-klein-4b",
        ),
    ]
    model: Annotated[Model, about("the checkpoint", {"source": "../models/flux2-nano"})]
    sizes: Annotated[
        Annotated[tuple[Size, ...], msgspec.Meta(min_length=1)] | SizeRange,
        about(
            "[height, width] in pixels that can be generated: multiples of the model's token (16 for klein and dev, 8 for "
            "flux2-nano), and no more than the VAE can decode (see [memory of the VAE](tensorrt.md#memory-of-the-vae)), whole "
            "or in tiles (`vae`). The first is the default, and the one fidelity is measured at. Or a [range](#sizes)",
            [[1024, 1024]],
        ),
    ]
    calibration: Annotated[
        Calibration, about("the pass that measures layers' inputs", {"prompts": "prompts/natural-calibration.txt"})
    ]
    fidelity: Annotated[Fidelity, about("the comparison with diffusers", {"prompts": "prompts/natural-held-out.txt"})]
    targets: Annotated[
        Annotated[tuple[Target, ...], msgspec.Meta(min_length=1)],
        about("what to compile for; `kind` says which options an entry has", [{"kind": "onnxruntime"}]),
    ]
    batches: Annotated[
        Annotated[tuple[AtOnce, ...], msgspec.Meta(min_length=1)],
        about(
            "how many images one run of the graphs makes, in ascending order: engines get an optimization profile for each, "
            "which also serves fewer images, down to the next smaller number; a request asks for it with `--batch`. Not for "
            "`visual_gen`",
            [1, 4],
        ),
    ] = (1,)
    text: Annotated[Text, about("how prompts are read", {"length": 512})] = Text()
    sampling: Annotated[Sampling, about("defaults of a request", {"steps": 4, "guidance": 1.0})] = Sampling()
    precision: Annotated[Precision, about("formats of the layers", {"transformer": {"default": "nvfp4"}})] = Precision()
    vae: Annotated[
        Vae | None,
        about("decodes large images in tiles", {"tile": [1024, 1024]}, left_out="every image is decoded whole"),
    ] = None
    weights: Annotated[Weights, about("how weights are filed", {"shard_gib": 4})] = Weights()
    step_cache: Annotated[
        StepCache | None, about("skips denoising steps", {"skip": "auto"}, left_out="every step is computed")
    ] = None
    gates: Annotated[Gates, about("the worst result a build may have", {"layer_snr_db": 15})] = Gates()

    @property
    def listed_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes that are named, the default first: those of a list, or of a range the default and its two ends."""
        if not isinstance(self.sizes, SizeRange):
            return self.sizes
        least, greatest = self.sizes.min, self.sizes.max
        near = [max(low, min(USUAL_SIDE, high)) for low, high in zip(least, greatest, strict=True)]
        return tuple(dict.fromkeys((self.sizes.default or (near[0], near[1]), least, greatest)))

    @property
    def size_range(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The least and the greatest size of a range; None where sizes are listed."""
        return (self.sizes.min, self.sizes.max) if isinstance(self.sizes, SizeRange) else None

    def serves(self, size: tuple[int, int]) -> bool:
        """Whether `size` is listed, or within the range."""
        if not isinstance(self.sizes, SizeRange):
            return size in self.sizes
        return all(low <= side <= high for low, side, high in zip(self.sizes.min, size, self.sizes.max, strict=True))


def most_skipped(steps: int, first: int, last: int, max_consecutive_skips: int) -> int:
    """How many of `steps` can be skipped at most: a run of `max_consecutive_skips`, a computed step, and so on."""
    free = max(steps - first - last, 0)
    runs, rest = divmod(free, max_consecutive_skips + 1)
    return runs * max_consecutive_skips + rest
