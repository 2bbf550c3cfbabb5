"""All that a report says, as it lies in report.json; `json_schema` is published as docs/report.schema.json.

A number that is null was not measured, or has no bound: an SNR of a layer without any error, an SSIM of an image that is
smaller than its window. No file holds NaN or infinity.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from fluxc.base.errors import BuildError
from fluxc.base.numbers import check_finite
from fluxrt.manifest import CacheRule, Layer, NotCompared, OnTarget, RankFidelity, Sampling
from fluxrt.stepprecision import StepPrecision

FORMAT = "fluxc-report"
FORMAT_VERSION = 2
READABLE = (1, 2)
"""Format versions that are read: 1 is 2 of level images, without what was not compared."""
REPORT_JSON = "report/report.json"
PAGE = "report/index.html"
SCHEMA_ID = "fluxc-report-2"


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the parts of a report have in common."""


class Gate(Struct, frozen=True):
    """One figure and the worst value it may have; `missed` says how many of `checked` values are worse.

    `name` is the recipe's field, or `rounding` for what no recipe may allow; `about` is whose figure `value` is, the worst
    one. `at_least` says on which side of `limit` a value passes, and `margin` is positive where it does.
    """

    name: str
    about: str
    meaning: str
    value: float | None
    limit: float
    unit: str
    at_least: bool
    margin: float | None
    passed: bool
    checked: int = 1
    missed: int = 0


class Verdict(Struct, frozen=True):
    """Whether every gate holds, and each of them; `failure` is the sentence that a build which failed ended with."""

    passed: bool
    gates: tuple[Gate, ...]
    failure: str = ""


Reached = Literal["yes", "no", "partly", "does not apply"]


class Tiers(Struct, frozen=True):
    """How far one target was taken.

    `built`: its graphs or engines were made. `audited`: what an engine runs, or OpenVINO a graph, was read out of it and
    compared with the plan. `ran`: its stages, or images, were computed while the bundle was built. `matched`: every stage was
    as near to the reference as rounding explains. `on_target`: it ran on hardware of the kind it is for. `missing` says in a
    sentence what was not done.
    """

    target: str
    kind: str
    device: str
    built: Reached
    audited: Reached
    ran: Reached
    matched: Reached
    on_target: Reached
    missing: str


class Size(Struct, frozen=True):
    """Bytes of a component's weights, scales included: all in bf16, every Linear in FP8, and as this bundle holds them."""

    component: str
    bf16: int
    fp8: int
    planned: int


class Predicted(Struct, frozen=True):
    """A prediction, not a measurement, for `gpus` GPUs: milliseconds of a step (the average over an image's)
    in this plan's formats, all FP8, and all bf16.

    Memory is in bytes of the first rank: weights, working memory of engines, and buffers between them.
    """

    gpu: str
    gpus: int
    step_ms: float
    step_ms_fp8: float
    step_ms_bf16: float
    weights_bytes: float
    working_bytes: float
    buffers_bytes: float
    gpu_bytes: float


class Prediction(Struct, frozen=True):
    """Predictions, and the error the same model has on published figures: the median and the largest, as shares of 1."""

    points: tuple[Predicted, ...]
    median_error: float
    largest_error: float


class PromptFigures(Struct, frozen=True):
    """One held-out prompt on one target; errors are relative (Euclidean norms), a value a step. Figures of the image are null
    where none was generated."""

    prompt: str
    seed: int
    text_error: float
    prologue_error: float
    step_error: tuple[float, ...]
    step_cosine: tuple[float, ...]
    decode_error: float
    image_psnr_db: float | None
    image_ssim: float | None
    image_psnr_db_reference_text: float | None = None


class AtOnceFigures(Struct, frozen=True):
    """Velocities of several images made at once: the largest relative error against the reference, and the largest relative
    difference from the same images made alone."""

    step_error: float
    difference: float


class AgainstExact(Struct, frozen=True):
    """A target that computes in fewer bits against the one, `target`, that computes in fp32: relative errors of velocities on
    the same latents, root mean square over steps and prompts and the worst, and PSNR of images (null without images)."""

    target: str
    velocity_error: float
    velocity_error_worst: float
    image_psnr_db: float | None
    image_psnr_db_worst: float | None


class TargetFigures(Struct, frozen=True):
    """One target against the reference: the worst over prompts and steps, of images also the mean; null without images.

    `image_psnr_db_reference_text` is of images made of the reference's embeddings: what the transformer alone costs. It is
    null where the text encoder is not quantized. `at_once` is by number of images, for those the recipe compiles besides 1.
    `against_exact` is there for a target that computes in fewer bits than another of the build.
    """

    text_error: float
    prologue_error: float
    step_error: float
    step_cosine: float
    decode_error: float
    image_psnr_db: float | None
    image_psnr_db_worst: float | None
    image_ssim: float | None
    prompts: tuple[PromptFigures, ...]
    image_psnr_db_reference_text: float | None = None
    at_once: dict[str, AtOnceFigures] = {}
    against_exact: AgainstExact | None = None


class Rounding(Struct, frozen=True):
    """How a layer's weight was rounded: `gptq`, solved against calibration's inputs, or `nearest`; beside factors of rank
    `low_rank`, 0 without; and `why` not as the recipe asks.

    `snr_db` and `nearest_snr_db` are signal-to-noise ratios of the layer's output on inputs that were held out from what it was
    solved on: as it is stored, and rounded to nearest; null where calibration had too few calls to hold any out. `damping` is
    the share of the mean diagonal that was added to the second moments. `smoothed`: its inputs are multiplied by a
    `pre_quant_scale`. Where the recipe asks for `smoothing`, `smoothed_snr_db` and `unsmoothed_snr_db` are the same ratio with
    those inputs rounded to NVFP4 too, with it and without; the better of both, of a fusion group as a whole, was taken.
    """

    rounding: str
    damping: float | None = None
    snr_db: float | None = None
    nearest_snr_db: float | None = None
    why: str = ""
    low_rank: int = 0
    smoothed: bool = False
    smoothed_snr_db: float | None = None
    unsmoothed_snr_db: float | None = None


class LayerFigures(Layer, frozen=True, kw_only=True):
    """A Linear as the manifest has it, and its errors.

    `snr_db` is the signal-to-noise ratio of the weight, `output_snr_db` that of the layer's output over calibration inputs.
    `scales` is how the scales were found; null for a layer that was not quantized by this build. `rounding` is there where the
    recipe asks to solve weights, or for factors of low rank.
    """

    quantized_in_checkpoint: bool = False
    scales: str | None = None
    snr_db: float | None = None
    output_snr_db: float | None = None
    rounding: Rounding | None = None


class CachedImage(Struct, frozen=True):
    """One prompt's image with steps skipped, against the image of the same target with every step computed."""

    skipped: tuple[int, ...]
    psnr_db: float
    ssim: float | None
    lpips: float | None = None
    image_text: float | None = None


class CachePoint(Struct, frozen=True):
    """One way to skip steps, over all prompts: PSNR in dB against every step computed (mean, 5th percentile, worst).

    `computed` is the mean number of steps computed, `largest_difference` in levels of 255, `worst_prompt` its number.
    """

    computed: float
    psnr_db: float
    psnr_db_p5: float
    psnr_db_worst: float
    largest_difference: int
    worst_prompt: int
    ssim: float | None
    ssim_worst: float | None
    by_prompt: tuple[CachedImage, ...]
    policy: dict[str, Any]
    lpips: float | None = None
    image_text: float | None = None


class StepCacheFigures(Struct, frozen=True):
    """The step cache that serves and what it costs; without `chosen`, no target ran where the bundle was built.

    `frontier` holds, by number of skipped steps and method, what each costs. `changes` are points of the trace: the change of a
    step's modulated input, and the change of its residual (mean over guidance branches), both relative. `onset` are the numbers
    of skipped steps of which the report has an image of the worst prompt. `reference` is what it costs to skip as the trace of
    the checkpoint's own model says, where the recipe asks to compare.
    """

    mode: str
    steps: int
    size: tuple[int, int]
    schedule: tuple[int, ...]
    rule: CacheRule
    visual_gen: CacheRule
    fit: dict[str, Any]
    target: str | None = None
    chosen: CachePoint | None = None
    frontier: dict[str, dict[str, CachePoint]] = {}
    changes: tuple[tuple[float, float], ...] = ()
    onset: tuple[int, ...] = ()
    reference: CachePoint | None = None


class Tiling(Struct, frozen=True):
    """The reference's images decoded in tiles of `tile` pixels [height, width], which overlap by at least `overlap`, against
    those decoded whole: PSNR as mean and worst, and the largest relative error (Euclidean norms)."""

    tile: tuple[int, int]
    overlap: tuple[int, int]
    psnr_db: float
    psnr_db_worst: float
    error: float


class Attribution(Struct, frozen=True):
    """What causes the error of the guided velocity (relative, root mean square over `prompts` calibration prompts at `steps`):
    `errors` of rounded "weights", rounded "inputs" and the quantized "text encoder", each alone, and of "all"."""

    prompts: int
    steps: tuple[int, ...]
    errors: dict[str, float]


class StepPrecisionFigures(Struct, frozen=True):
    """Which steps leave inputs of which layers as they are, as the manifest has it, and, where that was measured, by body the
    relative error of the guided velocity at every step (root mean square over `prompts` calibration prompts)."""

    schedule: StepPrecision
    prompts: int = 0
    errors: dict[str, tuple[float, ...]] = {}


class CauseImages(Struct, frozen=True):
    """Images of held-out prompts with each cause of error alone, generated in torch, against the reference's: `psnr_db` by
    cause and prompt. Causes are "weights", "inputs", "text encoder", "step cache", "vae" (the reference's latents decoded in
    `vae_dtype`) and "all"; one that the recipe has not is left out. `skipped` are the steps that the step cache skipped of each
    prompt."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]
    steps: int
    guidance: float
    vae_dtype: str | None
    skipped: tuple[tuple[int, ...], ...]
    psnr_db: dict[str, tuple[float, ...]]


class Report(Struct, frozen=True):
    """The report of one bundle. `targets` and `ranks` are by target: figures against the reference, and of sharded targets
    against the one that runs in one process. `engines` says what was found in what was built; `file_bytes` is by folder of the
    bundle, without the report, the evidence and what lies in no folder. `level` is what was compared on `prompts`: nothing,
    stages, or also images; `not_compared` says of each target what was not, and why. `tiling` is null where nothing was
    compared or images of `size` are decoded whole. `step_precision` is null where all steps are
    alike. `on_target` is what `fluxc finish` and `fluxc add-evidence` added since.
    """

    name: str
    family: str
    verdict: Verdict
    never_run: tuple[str, ...]
    tiers: tuple[Tiers, ...]
    sizes: tuple[Size, ...]
    file_bytes: dict[str, int]
    prediction: Prediction | None
    reference: str
    prompts: tuple[str, ...]
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    text_length: int
    sampling: Sampling
    targets: dict[str, TargetFigures]
    ranks: dict[str, RankFidelity]
    not_run: tuple[str, ...]
    engines: dict[str, dict[str, Any]]
    layers: tuple[LayerFigures, ...]
    sensitivity: dict[str, Any] | None
    step_cache: StepCacheFigures | None
    recipe: dict[str, Any]
    source: str
    checkpoint: dict[str, dict[str, str]]
    tools: dict[str, str]
    on_target: tuple[OnTarget, ...] = ()
    level: Literal["none", "stages", "images"] = "images"
    not_compared: tuple[NotCompared, ...] = ()
    tiling: Tiling | None = None
    attribution: Attribution | None = None
    step_precision: StepPrecisionFigures | None = None
    causes: CauseImages | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


class _Head(msgspec.Struct):
    """The fields every format version has."""

    format: str = ""
    format_version: int = 0


def encode_report(report: Report) -> bytes:
    """`report` as readable JSON; BuildError where it holds a number that JSON has not."""
    check_finite(msgspec.to_builtins(report), "report")
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def read_report(path: Path) -> Report:
    """The report in the file `path`; BuildError if it is missing, damaged, or of another format."""
    advice = "build the bundle again from its recipe"
    try:
        raw = path.read_bytes()
        head = msgspec.json.decode(raw, type=_Head)
    except OSError as error:
        raise BuildError(f"{path}: cannot be read: {error.strerror}; {advice}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BuildError(f"{path}: damaged: {error}; {advice}") from None
    if head.format != FORMAT or head.format_version not in READABLE:
        written = f"report format {head.format_version}" if head.format == FORMAT else "a report of an older fluxc"
        raise BuildError(f"{path}: {written}, this fluxc reads format {FORMAT_VERSION}; {advice}")
    try:
        return msgspec.json.decode(raw, type=Report)
    except msgspec.MsgspecError as error:
        raise BuildError(f"{path}: damaged: {error}; {advice}") from None


def json_schema() -> str:
    """The JSON schema (2020-12) of report.json, as it is published."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return json.dumps(head | msgspec.json.schema(Report), indent=1) + "\n"
