"""A model on 1, 2, 4 ... GPUs of one kind: predicted time of a step and of an image, and the memory of each rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fluxc.base.errors import RecipeError
from fluxc.checkpoint.identify import check_sizes, vae_of
from fluxc.formats.registry import multiplied_in
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.published import MODELS, TEXT_ENCODERS
from fluxc.predict.gpus import Gpu
from fluxc.predict.published import calibrated, checked, steps_computed_with_teacache
from fluxc.predict.rates import StepTime, step_time
from fluxc.predict.work import ACTIVATION, Work, decoder_working, work_of
from fluxc.quantize.memory import weights_memory
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.quantize.source import Source
from fluxc.quantize.source_memory import memory_by_component
from fluxc.quantize.steps import bodies_of, body_plans, schedule_of
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import ComponentPrecision
from fluxc.recipe.targets import TensorRTTarget
from fluxc.targets.base import TargetContext
from fluxc.targets.decoder import Decoder
from fluxc.targets.sharding import check_sharding, shards_of

PRESET = "modelopt-flux2"
SIZE, TEXT_TOKENS = (1024, 1024), 512
STEPS = {"dev": 50, "klein-4b": 4, "klein-9b": 4}
"""Of the published models; klein's are those of its distilled ones."""


@dataclass(frozen=True)
class Subject:
    """What is predicted: a transformer and its plan, one size, and what else the GPU of the first rank holds.

    `weights`: bytes of the transformer's; `text_encoder` and `vae`: of theirs, on the first rank alone; `decoder`: of working
    memory of the VAE's, for a tile where it decodes `in_tiles`. `skipped`: steps that a step cache skips on average, None where
    it is not known before a build. `batches`: how many images are made at once, each predicted. `bodies`: by body beside `body`
    its plan, and how many of `steps` run it; None where that is not known before a build.
    """

    name: str
    transformer: Flux2Transformer
    plan: list[LayerPlan]
    size: tuple[int, int]
    tokens: int
    text_tokens: int
    branches: int
    steps: int
    weights: int
    skipped: float | None = 0.0
    text_encoder: int = 0
    vae: int = 0
    decoder: int = 0
    batches: tuple[int, ...] = (1,)
    in_tiles: bool = False
    bodies: Mapping[str, tuple[list[LayerPlan], int | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU: weights, working memory of plans, and buffers between them; contexts of CUDA and NCCL not counted."""

    weights: float
    working: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.working + self.buffers


@dataclass(frozen=True)
class Prediction:
    """One number of GPUs and of `images` at once: the step of a rank, and memory of the first rank and of each other.

    `others` is None where there is none, `first` is with all components there; `stages` are the first rank's where they take
    turns, by component. `bodies` holds by body beside `body` the time of a step, and how many of `steps` run it.
    """

    gpus: int
    work: Work
    time: StepTime
    first: RankMemory
    others: RankMemory | None
    stages: Mapping[str, RankMemory]
    images: int = 1
    steps: int = 1
    bodies: Mapping[str, tuple[StepTime, int]] = field(default_factory=dict)

    @property
    def image_seconds(self) -> float:
        """Of all steps of an image, none skipped."""
        rest = self.steps - sum(count for _, count in self.bodies.values())
        return rest * self.time.seconds + sum(count * time.seconds for time, count in self.bodies.values())

    @property
    def staged(self) -> RankMemory:
        """The first rank's memory where components take turns: that of the hungriest."""
        return max(self.stages.values(), key=lambda memory: memory.total)


@dataclass(frozen=True)
class Scaling:
    """Predictions for every number of GPUs that can share the model, and for the others the reason why not.

    `predictions` are of one image at a time, `at_once` of the larger numbers of images that were asked for.
    """

    subject: Subject
    gpu: Gpu
    predictions: tuple[Prediction, ...]
    impossible: Mapping[int, str]
    at_once: tuple[Prediction, ...] = ()


def published_model(name: str, size: tuple[int, int] = SIZE) -> Subject:
    """A published model at `size` (height, width), from its shapes alone: the transformer in NVFP4 but for modelopt's exclusion
    list, the text encoder in FP8. RecipeError for a size that is no whole number of tokens or too large to be decoded."""
    model, vae = Flux2Transformer.read(MODELS[name]), Flux2VAE()
    plan = precision_plan("transformer", model.linears, ComponentPrecision("nvfp4", preset=PRESET))
    encoder, layers = TEXT_ENCODERS[name]
    text_plan = precision_plan("text_encoder", encoder.linears(layers), ComponentPrecision("fp8"))
    check_sizes(vae, (size,))
    rows, columns = (side // vae.pixels_per_token for side in size)
    decoder = Decoder(vae, ((rows, columns),))
    decoder.check("--size")
    of_decoder = {n: shape for n, shape in vae.tensors.items() if not n.startswith(("encoder.", "quant_conv."))}
    return Subject(
        name=f"FLUX.2 {name}",
        transformer=model,
        plan=plan,
        size=size,
        tokens=rows * columns,
        text_tokens=TEXT_TOKENS,
        branches=1,
        steps=STEPS[name],
        weights=weights_memory(model.tensors, plan).planned,
        text_encoder=weights_memory(encoder.tensors(layers), text_plan).planned,
        vae=weights_memory(of_decoder, []).planned,
        decoder=decoder_working(decoder),
    )


def recipe_model(loaded: LoadedRecipe, source: Source) -> Subject:
    """The model of a recipe, as planned there, at its first size.

    An engine for a range of sizes takes the working memory of the largest whatever it decodes.
    """
    recipe = loaded.recipe
    memory = memory_by_component(source)
    context = TargetContext(recipe, source)
    size, tokens = next(iter(context.tokens.items()))
    cache = recipe.step_cache
    ranged = recipe.size_range is not None or any(
        isinstance(target, TensorRTTarget) and target.shapes == "range" for target in recipe.targets
    )
    one = Decoder(vae_of(source.checkpoint), context.grids[:1]).in_tiles(context.tiles)
    decoder = context.decoder(True) if ranged else one
    return Subject(
        name=recipe.name,
        transformer=source.transformer,
        plan=source.plans["transformer"],
        size=size,
        tokens=tokens,
        text_tokens=recipe.text.length,
        branches=2 if source.cfg_batch else 1,
        steps=recipe.sampling.steps,
        weights=memory["transformer"].planned,
        skipped=0.0 if cache is None else cache.skip if isinstance(cache.skip, float) else None,
        text_encoder=memory["text_encoder"].planned,
        vae=memory["vae"].planned,
        decoder=decoder_working(decoder),
        batches=recipe.batches,
        in_tiles=context.tiles is not None,
        bodies=_bodies(loaded, source) if any(target.rounds_inputs for target in recipe.targets) else {},
    )


def _bodies(loaded: LoadedRecipe, source: Source) -> dict[str, tuple[list[LayerPlan], int | None]]:
    """The bodies of a recipe beside `body`, with the steps that run each; a step that two rules could have counts for the
    first."""
    precision, steps = loaded.recipe.precision, loaded.recipe.sampling.steps
    # Which steps are worst is not known, but that every step gains something is a good guess; of `auto` there is no number.
    gains = {body: [1.0] * steps for body in bodies_of(precision)}
    planned = source.plans["transformer"]
    schedule = schedule_of(precision, planned, steps, gains)
    counts = {} if schedule is None else {name: len(body.steps) for name, body in schedule.bodies.items()}
    plans, is_open = body_plans(precision, planned), precision.steps == "auto"
    return {body: (plan, None if is_open else counts.get(body, 0)) for body, plan in plans.items()}


def predict(subject: Subject, gpu: Gpu, counts: tuple[int, ...]) -> Scaling:
    """Predict `subject` on each number of GPUs in `counts`; RecipeError when none of them can share it.

    A layer in a format that `gpu` does not multiply is computed in bf16, and keeps its bytes in memory.
    """
    predictions, impossible = [], {}
    for count in counts:
        try:
            check_sharding(
                "--gpus", count, subject.transformer, subject.text_tokens, {subject.size: subject.tokens}, count > 1
            )
        except RecipeError as error:
            impossible[count] = str(error)
            continue
        predictions.append(_predict(subject, gpu, count))
    if not predictions:
        raise RecipeError(next(iter(impossible.values())))
    more = [images for images in subject.batches if images > 1]
    at_once = tuple(_predict(subject, gpu, p.gpus, images) for p in predictions for images in more)
    return Scaling(subject, gpu, tuple(predictions), impossible, at_once)


def memory_at_once(subject: Subject) -> dict[int, RankMemory]:
    """What the transformer takes on one GPU that multiplies all planned formats, by how many images are made at once."""
    return {
        images: rank_memory(subject, _work(subject, subject.plan, 1, images), images)
        for images in sorted({1, *subject.batches})
    }


def _work(subject: Subject, plan: list[LayerPlan], count: int, images: int) -> Work:
    rows = images * subject.branches
    model = subject.transformer
    shards = shards_of(count, subject.size, subject.tokens, model, subject.text_tokens, rows, ACTIVATION)
    return work_of(model, plan, shards, rows)


def _predict(subject: Subject, gpu: Gpu, count: int, images: int = 1) -> Prediction:
    def work_in(plan: list[LayerPlan]) -> Work:
        computed = [
            entry if multiplied_in(entry.format) in gpu.gemms else replace(entry, format="bf16") for entry in plan
        ]
        return _work(subject, computed, count, images)

    work = work_in(subject.plan)
    others = {body: (work_in(plan), steps) for body, (plan, steps) in subject.bodies.items()}
    hungriest = max((work, *(other for other, _ in others.values())), key=lambda one: one.working_bytes)
    held = rank_memory(subject, hungriest, images)
    weights = held.weights + subject.text_encoder + subject.vae
    first = RankMemory(weights, max(held.working, subject.decoder), held.buffers)
    # A layer of the text encoder works on fewer tokens than a block of the transformer, in the same way.
    stages = {
        "text encoder": RankMemory(subject.text_encoder, held.working, held.buffers),
        "transformer": held,
        "VAE": RankMemory(subject.vae, subject.decoder, held.buffers),
    }
    rates = calibrated()
    return Prediction(
        count,
        work,
        step_time(work, gpu, rates),
        first,
        held if count > 1 else None,
        stages,
        images,
        subject.steps,
        {body: (step_time(other, gpu, rates), steps or 0) for body, (other, steps) in others.items()},
    )


def rank_memory(subject: Subject, work: Work, images: int = 1) -> RankMemory:
    """What the transformer takes on one rank that does `work`, of so many images at once.

    Between plans lie the image tokens before the first block and all tokens before and after each, text as it was encoded,
    rotations in fp32, and in fp32 what a step cache may keep: a step's residual, and the signal of two steps.
    """
    model, count = subject.transformer, work.ranks
    image, text = subject.tokens / count, subject.text_tokens / count
    tokens = model.width * (ACTIVATION * image + 2 * ACTIVATION * (image + text) + 3 * 4 * image)
    encoded = model.joint_attention_dim * ACTIVATION * text
    rotations = 2 * 4 * model.attention_head_dim * (image + text)
    return RankMemory(subject.weights, work.working_bytes, images * subject.branches * (tokens + encoded) + rotations)


def scaling_as_json(scaling: Scaling) -> dict[str, Any]:
    """The prediction for scripts; times in seconds, memory in bytes."""
    subject = scaling.subject
    return {
        "predicted": True,
        "model": subject.name,
        "gpu": asdict(scaling.gpu),
        "size": list(subject.size),
        "steps": subject.steps,
        "skipped": subject.skipped,
        "efficiency": asdict(calibrated()),
        "gpus": [
            {
                "gpus": p.gpus,
                "step_seconds": p.time.seconds,
                "parts_seconds": asdict(p.time),
                "image_seconds": p.image_seconds,
                "bodies": {
                    body: {"step_seconds": time.seconds, "steps": subject.bodies[body][1]}
                    for body, (time, _) in p.bodies.items()
                },
                "flop": p.work.flop,
                "moved_bytes": p.work.moved_bytes,
                "sent_bytes": p.work.sent_bytes,
                "first_rank_bytes": asdict(p.first),
                "first_rank_staged_bytes": asdict(p.staged),
                "other_ranks_bytes": None if p.others is None else asdict(p.others),
            }
            for p in scaling.predictions
        ],
        "at_once": [
            {
                "gpus": p.gpus,
                "images": p.images,
                "step_seconds": p.time.seconds,
                "first_rank_bytes": asdict(p.first),
                "first_rank_staged_bytes": asdict(p.staged),
                "other_ranks_bytes": None if p.others is None else asdict(p.others),
            }
            for p in scaling.at_once
        ],
        "impossible": {str(count): reason for count, reason in scaling.impossible.items()},
        "points": [
            {
                "what": c.point.what,
                "published": c.point.published,
                "unit": c.point.unit,
                "predicted": c.predicted,
                "error": c.error,
                "error_without_it": c.error_without,
                "source": c.point.source,
            }
            for c in checked()
        ],
        "teacache_steps_implied": steps_computed_with_teacache(),
    }
