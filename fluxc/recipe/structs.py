"""The recipe as data: what to compile, for whom, and how good it must be; docs/recipe.md explains it field by field."""

from __future__ import annotations

from typing import Literal

import msgspec

from fluxc.recipe.targets import Target

LAGS = 6
"""How many steps back a step trace measures a reused residual: the longest run of skipped steps any policy can have."""
LEAST_STEPS = 10

Format = str
"""A number format by name; which there are is the matter of fluxc.formats."""
Scales = Literal["max", "mse", "four-over-six"]
Size = tuple[int, int]


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint: a diffusers folder (relative to the recipe) or a hub id, with an optional revision.

    `variant` takes the weights whose files have this word in their names, as NAME.fp16.safetensors has fp16.
    """

    source: str
    revision: str | None = None
    variant: str | None = None


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens a prompt is padded to, chat template included."""

    length: int = 512


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the runtime uses when a request does not say."""

    steps: int = 50
    guidance: float = 4.0


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The prompts whose activations are measured: a text file, one prompt a line, relative to the recipe.

    `engine: modelopt` lets modelopt quantize the transformer with its `algorithm`, which needs CUDA. `amax` says which
    magnitude an input_scale stands for. `file` is a calibration made by `fluxc calibrate`, used in place
    of running the model.
    """

    prompts: str
    steps: int | None = None
    guidance: float | None = None
    size: Size | None = None
    seed: int = 0
    engine: Literal["fluxc", "modelopt"] = "fluxc"
    algorithm: Literal["max", "awq_lite", "svdquant"] = "max"
    amax: Literal["max", "percentile", "mse"] = "max"
    percentile: float = 99.99
    file: str | None = None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers that match get this format."""

    match: str
    format: Format


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `exclude: auto` may spend, one of the two.

    `share`: of the Linears' parameters, besides what rules and preset keep. `error`: the relative error of the velocity
    that is allowed (root of the mean |v - reference|^2 / |reference|^2); as few parameters as reach it are kept.
    """

    share: float | None = None
    error: float | None = None


class ComponentPrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Formats of one component's Linears: `exclude` stays bf16, then the first matching rule, then what `preset` keeps in
    bf16, then the default.

    `exclude: auto` measures what should stay, under `budget`. `scales` says how NVFP4 block scales are chosen.
    """

    default: Format = "bf16"
    exclude: tuple[str, ...] | Literal["auto"] = ()
    budget: Budget | None = None
    preset: str | None = None
    rules: tuple[Rule, ...] = ()
    scales: Scales = "max"


class Precision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Formats by component; the VAE is never quantized."""

    transformer: ComponentPrecision = ComponentPrecision(default="nvfp4")
    text_encoder: ComponentPrecision = ComponentPrecision()


class StepCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Skips denoising steps, as TeaCache does; leave it out where every step is to be computed.

    How many: `skip` of the steps on average, `max_error` (root mean square error of the final latents that skipped steps may
    add up to, to first order), or `skip: auto`, the knee of the curve between them. `mode: static` skips the best fixed steps,
    `dynamic` decides by the polynomial while an image is generated. `first` and `last` steps are always computed, at most
    `max_consecutive_skips` skipped in a row. The polynomial has `degree` 1 to 5; `fit: constrained` never falls. A fit that
    explains less than `min_r2` of the variance on held-out prompts is refused. `on_mismatch`: what happens to requests of
    other steps or sizes. `prompts` are traced in place of the calibration's; `trace` is a file made by `fluxc trace`.
    `frontier` lists the numbers of skipped steps that the report compares; empty, the one chosen alone.
    """

    skip: float | Literal["auto"] | None = None
    max_error: float | None = None
    mode: Literal["static", "dynamic"] = "static"
    degree: int = 3
    fit: Literal["constrained", "plain"] = "constrained"
    first: int = 1
    last: int = 1
    max_consecutive_skips: int = 4
    min_r2: float = 0.3
    on_mismatch: Literal["refuse", "warn", "allow"] = "warn"
    prompts: str | None = None
    trace: str | None = None
    frontier: tuple[int, ...] | Literal["auto"] = "auto"


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are filed: a component larger than `shard_gib` is split into several files with an index."""

    shard_gib: float | None = None


class Fidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The held-out prompts every target is compared with diffusers on, and the dtype diffusers computes them in.

    `lpips` (torchvision's AlexNet file) and `image_text` (a CLIP model's folder) add these measures to the step cache's page.
    """

    prompts: str
    seed: int = 1000
    reference: Literal["float32", "bfloat16"] = "float32"
    lpips: str | None = None
    image_text: str | None = None


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The worst result a build may have; a field left out is not checked.

    `layer_snr_db`: every quantized weight against bf16. `step_cosine`: every step's velocity against diffusers, both fed
    diffusers' latents. `image_psnr_db`: the mean over the held-out prompts of the finished images. `step_cache_psnr_db`: the
    same of images with skipped steps, against those without.
    """

    layer_snr_db: float | None = None
    step_cosine: float | None = None
    image_psnr_db: float | None = None
    step_cache_psnr_db: float | None = None


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole recipe; docs/recipe.md explains it field by field."""

    name: str
    model: Model
    sizes: tuple[Size, ...]
    calibration: Calibration
    fidelity: Fidelity
    targets: tuple[Target, ...]
    text: Text = Text()
    sampling: Sampling = Sampling()
    precision: Precision = Precision()
    weights: Weights = Weights()
    step_cache: StepCache | None = None
    gates: Gates = Gates()


def most_skipped(steps: int, first: int, last: int, max_consecutive_skips: int) -> int:
    """How many of `steps` can be skipped at most: a run of `max_consecutive_skips`, a computed step, and so on."""
    free = max(steps - first - last, 0)
    runs, rest = divmod(free, max_consecutive_skips + 1)
    return runs * max_consecutive_skips + rest
