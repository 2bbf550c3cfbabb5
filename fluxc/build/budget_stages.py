"""What each stage of a build needs: the most memory of the process, the disk it takes, and its work, from counts alone.

The counts of a model that runs are `fluxc.checkpoint.needs`. Constants were measured on flux2-nano and on klein 4B's widths
with few blocks (docs/budget.md says how); they are chosen so that a prediction is rather too high than too low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

from fluxc.base.cpu import multiplies_bf16
from fluxc.build.budget_rates import Rates
from fluxc.build.job import Job
from fluxc.build.requests import attributed_prompts, calibration_request, trace_request
from fluxc.build.stages import vae_dtype
from fluxc.calibrate import step_errors_stage
from fluxc.calibrate.records import ROWS
from fluxc.calibrate.sensitivity_stage import SEARCHES
from fluxc.calibrate.solve_needs import solving
from fluxc.calibrate.stage import asked_of, calls_bytes, records_bytes
from fluxc.calibrate.states import PROMPTS, STEPS
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.checkpoint.identify import vae_of
from fluxc.checkpoint.needs import (
    PROCESS,
    Asked,
    Models,
    decoding,
    decoding_flop,
    image_tokens,
    memory_by_component,
    memory_by_layer,
    memory_of_calls,
    models_of,
    text_flop,
    tokens_of,
    weights_read,
)
from fluxc.fidelity.causes_stage import with_causes
from fluxc.formats.bf16 import BF16
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.predict.work import work_of
from fluxc.quantize.plan import fusion_groups, to_quantize
from fluxc.quantize.source import solvable
from fluxc.quantize.source_memory import memory_by_component as weights_by_component
from fluxc.quantize.steps import bodies_of
from fluxc.recipe.targets import OnnxRuntimeTarget, Target, TensorRTTarget, VisualGenTarget
from fluxc.stepcache.trace_stage import traced
from fluxc.targets.decoder import decoded_at_once
from fluxc.targets.sharding import Shards

MIB, GIB = 1 << 20, 1 << 30
START = 600 * MIB
"""A process that has not imported diffusers yet."""
WRITER = 200 * MIB
"""The chunks that are quantized, and mapped pages of the source."""
SESSION = 100 * MIB
"""What ONNX Runtime's sessions take without weights."""
LIBRARY = 300 * MIB
"""What TensorRT takes while it builds a plan without weights."""

TRACE_SECONDS = {"transformer": 14.0, "text_encoder": 6.0, "vae": 12.0}
"""Tracing on the meta device and what is imported for it; the same at every size of a model."""
COMPILE_SECONDS = 5.0
"""Loading or compiling the kernels that quantize."""
PLAN_SECONDS = 8.0
"""Cutting graphs, and building and auditing the plans of all blocks without weights."""
LOAD_SECONDS = 5.0
"""Importing diffusers and making its pipeline."""
MODEL_SHARE, RUNTIME_SHARE = 0.6, 0.5
"""Of the speed of a large product, what a whole model reaches in torch, and in ONNX Runtime, which computes in fp32."""
INT8_SPEED = 3.0
"""How many times as fast ONNX Runtime is in int8."""
UNFOLDING = 4
"""ONNX Runtime moves so many bytes for each that it unfolds of a weight."""
CALL_SECONDS = 2e-4
"""Python's part of a Linear's call, with an observer's."""
QUANTIZE_SECONDS = {"max": 1.0e-9, "four-over-six": 4.0e-9, "mse": 8.0e-9}
"""Of one weight on one core, by how block scales are chosen, errors of weight and output included."""

SOLVE_SECONDS = 6.0e-8
"""Of solving one weight on one core, besides matrix products."""
NARROW_TIMES = 3.0
"""The same of products with the few columns of factors of low rank."""
FACTOR_TIMES = 4.0
"""A factor's FLOP in fp64 take so many times as long as those of a large product in fp32."""

UNFOLDED_BYTES = {BF16: 4.0, "fp8": 4.0, "nvfp4": 8.0, "nvfp4-w4a16": 8.0, "mxfp4": 8.0}
"""Memory of a Linear's weight in ONNX Runtime on the CPU while it is multiplied, by its format. Between two products it lies in
a map of the file."""

GRAPHS_DISK, PLANS_DISK = 8 * MIB, 24 * MIB
"""Of one component's or target's graphs; of a target's plans without weights."""
HISTOGRAM_DISK = 16 << 10
"""Of a layer's histogram, of which the bins between the smallest and the largest input are stored."""
SMALL_DISK = MIB
"""Of configs, manifest, report and notes."""

NOT_COMPARED = ("fidelity.level: none", 0)
NO_ATTRIBUTION = ("fidelity.attribution: false", 0)


@dataclass(frozen=True)
class Work:
    """`fixed` seconds, which depend on no rate; FLOP in fp32 and in bfloat16 (as large products reach them); bytes that are
    read, hashed and copied."""

    fixed: float = 0.0
    float32: float = 0.0
    bfloat16: float = 0.0
    read: float = 0.0
    hashed: float = 0.0
    copied: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(one * times for one in astuple(self)))

    def seconds(self, rates: Rates) -> float:
        """At these rates; reading goes on beside computing."""
        computing = self.fixed + (self.float32 / rates.float32 if self.float32 else 0.0)
        if self.bfloat16:
            computing += self.bfloat16 / rates.bfloat16
        reading = self.read / rates.reading if self.read else 0.0
        rest = (self.hashed / rates.hashing if self.hashed else 0.0) + (
            self.copied / rates.copying if self.copied else 0
        )
        return max(computing, reading) + rest


@dataclass(frozen=True)
class Need:
    """Bytes: `memory` the most of the process, `disk` what the stage leaves, `scratch` what it takes besides while it runs.

    `how` is the way the model runs.

    `cures`: changes of the recipe that take less memory, in words, with what the stage would then need.
    """

    memory: int
    disk: int = SMALL_DISK
    scratch: int = 0
    work: Work = field(default_factory=Work)
    how: str = ""
    cures: tuple[tuple[str, int], ...] = ()


class Needs:
    """What the stages of `job` need where the process may take `limit` bytes of memory; `cores` compute."""

    def __init__(self, job: Job, limit: int, cores: int) -> None:
        self.job, self.limit, self.cores = job, limit, cores
        self.recipe, self.source = job.loaded.recipe, job.original

    def of(self, name: str, part: str) -> Need:
        """Of the step `name`, which is of `part`."""
        first, _, rest = name.partition("-")
        found: Callable[[str], Need] | None = {
            "export": self._export,
            "calibrate": self._calibrate,
            "modelopt": self._modelopt,
            "weights": self._weights,
            "target": self._target,
            "reference": self._reference,
            "compare": self._compare,
            "frontier": self._frontier,
            "sensitivity": self._sensitivity,
            "rounding": self._rounding,
            "tune": self._tuning,
            "attribution": self._attribution,
        }.get(first)
        if name == "step-errors":
            return self._step_errors()
        if name.startswith("step-trace"):
            return self._step_trace("reference" if name.endswith("reference") else None)
        if found is not None:
            return found(rest)
        return self._compare("") if part == "fidelity" else Need(PROCESS, work=Work(1.0))

    @cached_property
    def hashing(self) -> Need:
        """Of hashing the checkpoint's files."""
        size = sum(file.stat().st_size for part in WEIGHTS_FILE for file in self._component(part).weight_files)
        return Need(START, work=Work(read=size, hashed=size))

    def bundle(self, copies: bool) -> Need:
        """Of putting the bundle together; `copies`: its weights are copied, since the cache keeps its own."""
        stored = self.weights_bytes["all"] if copies else 0
        return Need(PROCESS, SMALL_DISK + stored, work=Work(1.0, hashed=stored, copied=stored))

    @cached_property
    def weights_bytes(self) -> dict[str, int]:
        """Bytes of each component's weights in the bundle, and of `all`."""
        return {name: memory.planned for name, memory in weights_by_component(self.source).items()}

    @cached_property
    def models(self) -> Models:
        """The checkpoint's networks."""
        return models_of(self.source.checkpoint)

    @cached_property
    def _vae(self) -> Flux2VAE:
        return vae_of(self.source.checkpoint)

    def _component(self, name: str) -> Any:
        return self.source.checkpoint.components[name]

    def _export(self, rest: str) -> Need:
        return Need(PROCESS, GRAPHS_DISK, work=Work(TRACE_SECONDS[rest.partition("-")[0]]))

    def _running(self, asked: Asked, dtype: str, passes: float | None = None) -> Need:
        """Of running the model, its transformer `passes` times, by default as `asked`."""
        whole, layers = memory_by_component(self.models, asked), memory_by_layer(self.models, asked)
        by_layer = whole > self.limit
        texts = asked.prompts + (asked.rows > 1)
        passes = asked.prompts * asked.rows * asked.steps if passes is None else passes
        flop = passes * self._pass_flop(asked) + texts * text_flop(self.models, asked.text_tokens)
        flop = (flop + asked.prompts * decoding_flop(self._vae, asked.size)) / MODEL_SHARE
        calls = passes * len(self.models.transformer.linears) + texts * 7 * self.models.text_layers
        read = weights_read(self.models, asked, by_layer)
        work = Work(LOAD_SECONDS + CALL_SECONDS * calls, **{dtype: flop}, read=read, copied=read)
        return Need(
            layers if by_layer else whole, work=work, how="layer by layer" if by_layer else "a component at a time"
        )

    def _pass_flop(self, asked: Asked) -> float:
        """FLOP of the transformer for one row."""
        tokens, model = image_tokens(self.models, asked.size), self.models.transformer
        shards = Shards(1, asked.size, model.num_attention_heads, asked.text_tokens, tokens, 0, 0)
        return work_of(model, self.source.plans["transformer"], shards, 1).flop

    def _asked(self, request: dict[str, Any], rows: int, dtype: str) -> tuple[Asked, str]:
        """The request as counts, and the type that it is computed in here."""
        dtype = "bfloat16" if dtype == "bfloat16" and multiplies_bf16() else "float32"
        item = 2 if dtype == "bfloat16" else 4
        return replace(asked_of(request | {"text_length": self.recipe.text.length}, rows), itemsize=item), dtype

    def _calibrate(self, _: str) -> Need:
        request = calibration_request(self.job.loaded, self.job.is_large)
        asked, dtype = self._asked(request, self.job.rows(request["guidance"]), "bfloat16")
        layers = [*self.models.transformer.linears, *self.models.text_encoder.linears(self.models.text_layers)]
        columns = sum(layer.in_features for layer in layers)
        calls = calls_bytes(self.models, asked)
        asked = replace(asked, observed=2 * (records_bytes(self.models) + calls))
        ranges = columns * 4 + len(layers) * HISTOGRAM_DISK
        cures = [("calibration.engine: none", 0)] if self.recipe.calibration.engine == "fluxc" else []
        need = self._running(asked, dtype)
        return replace(
            need,
            disk=ranges + columns * 2 * ROWS + calls,
            scratch=asked.prompts * ranges + columns * 2 * ROWS + calls,
            cures=(*self._smaller("calibration", asked, dtype), *cures),
        )

    def _smaller(self, field: str, asked: Asked, dtype: str) -> tuple[tuple[str, int], ...]:
        """What fewer prompts and a smaller size would take."""
        side = self._small_side
        changes = []
        if asked.prompts > 1:
            changes.append((f"{field}.max_prompts: 1", replace(asked, prompts=1)))
        if math.prod(asked.size) > side * side:
            added = self._added((side, side)) if field == "fidelity" else ""
            changes.append((f"{field}.size: [{side}, {side}]{added}", asked.with_size((side, side))))
        if len(changes) == 2:
            both = replace(asked, prompts=1).with_size((side, side))
            changes.append((f"{field}.max_prompts: 1 with {changes[-1][0]}", both))
        return tuple((text, self._running(less, dtype).memory) for text, less in changes)

    def _modelopt(self, _: str) -> Need:
        need = self._calibrate("")
        return replace(need, memory=PROCESS + 2 * GIB, disk=self.weights_bytes["transformer"], how="on the GPU")

    def _step_trace(self, model: str | None) -> Need:
        request = trace_request(self.job.loaded, model)
        asked, dtype = self._asked(request, self.job.rows(request["guidance"]), request["dtype"])
        rounded = self.source.plans if request["precision"] is not None else {}
        asked = traced(self.models, asked, [entry for plan in rounded.values() for entry in plan])
        need = self._running(asked, dtype)
        # Of a model that is read layer by layer, whenever it is read.
        times = asked.steps * -(-asked.prompts // asked.together) if need.how == "layer by layer" else 1
        seconds = sum(self._rounding_seconds(name, times) for name in rounded)
        work = need.work + Work(seconds)
        return replace(need, disk=SMALL_DISK + asked.prompts * asked.steps**2 * 64, work=work)

    def _rounding_seconds(self, component: str, times: int) -> float:
        """Of rounding a component's weights in memory, the transformer's so many `times`, the text encoder's once."""
        weights = sum(entry.parameters for entry in to_quantize(self.source.plans[component]))
        seconds = weights * QUANTIZE_SECONDS[getattr(self.recipe.precision, component).scales] / self.cores
        return (seconds * (times if component == "transformer" else 1) + COMPILE_SECONDS) if weights else 0.0

    def _sensitivity(self, rest: str) -> Need:
        """Costs: a pass of every state for each fusion group; the choice: for each of some budgets."""
        request = calibration_request(self.job.loaded, self.job.is_large)
        asked, dtype = self._asked(request, self.job.rows(request["guidance"]), self.recipe.fidelity.reference)
        groups = fusion_groups(to_quantize(self.source.plans["transformer"]))
        states = min(PROMPTS, asked.prompts) * min(STEPS, asked.steps) * asked.rows
        recorded = min(PROMPTS, asked.prompts) * asked.steps * asked.rows
        times = len(groups) if rest == "costs" else SEARCHES + 2
        return self._running(replace(asked, prompts=min(PROMPTS, asked.prompts)), dtype, recorded + times * states)

    def _step_errors(self) -> Need:
        """Of images with every step, and a pass of every state for each body."""
        steps, rows = self.recipe.sampling.steps, self.job.rows(self.recipe.sampling.guidance)
        request = calibration_request(self.job.loaded, self.job.is_large) | {"steps": steps}
        asked, dtype = self._asked(request, rows, self.recipe.fidelity.reference)
        prompts, bodies = min(PROMPTS, asked.prompts), 1 + len(bodies_of(self.recipe.precision))
        passes = prompts * rows * (steps + bodies * min(step_errors_stage.STEPS, steps))
        return self._running(replace(asked, prompts=prompts), dtype, passes)

    def _attribution(self, rest: str) -> Need:
        """Of a pass for each cause, and encoding twice; of their images, the step loop for each cause but the VAE."""
        if rest == "images":
            return self._causes()
        need = self._sensitivity("")
        return replace(need, work=need.work + need.work)

    def _causes(self) -> Need:
        recipe = self.recipe
        request = {
            "prompts": [prompt for prompt, _ in attributed_prompts(self.job.loaded, self.job.is_large)],
            "steps": recipe.fidelity.steps or recipe.sampling.steps,
            "size": recipe.fidelity.size or recipe.listed_sizes[0],
        }
        asked, dtype = self._asked(request, self.job.rows(recipe.sampling.guidance), recipe.fidelity.reference)
        layers = [entry for plan in self.source.plans.values() for entry in plan]
        skips, vae = recipe.step_cache is not None, vae_dtype(self.job)
        asked = replace(with_causes(self.models, asked, layers, skips, vae is not None), itemsize=asked.itemsize)
        # The reference, weights, inputs, text encoder, step cache, and all of them.
        loops = 5 + skips
        need = self._running(asked, dtype, loops * asked.prompts * asked.rows * asked.steps)
        times = 2 * (asked.steps if need.how == "layer by layer" else 1)
        rounding = Work(sum(self._rounding_seconds(name, times) for name in self.source.plans))
        decoding = Work(**{dtype: (loops + 1) * asked.prompts * decoding_flop(self._vae, asked.size) / MODEL_SHARE})
        read = Work(read=(loops - 1) * need.work.read) if need.how == "layer by layer" else Work()
        disk = SMALL_DISK + (loops + 1) * asked.prompts * 3 * math.prod(asked.size)
        return replace(need, disk=disk, work=need.work + rounding + decoding + read, cures=(NO_ATTRIBUTION,))

    def _tuning(self, of: str) -> Need:
        """Of measuring every group in so many formats, and, after a dash, of choices that skip steps at so many times as many
        states."""
        times, _, skips = of.partition("-")
        need = self._sensitivity("costs")
        work = need.work * int(times) + self._sensitivity("").work * (1 + 10 / SEARCHES) * int(skips or 1)
        if not skips:
            return replace(need, work=work)
        request = calibration_request(self.job.loaded, self.job.is_large) | {"steps": self.recipe.sampling.steps}
        asked, dtype = self._asked(
            request, self.job.rows(self.recipe.sampling.guidance), self.recipe.fidelity.reference
        )
        trace = self._running(traced(self.models, replace(asked, prompts=min(PROMPTS, asked.prompts)), []), dtype)
        return replace(max(need, trace, key=lambda one: one.memory), work=work + trace.work)

    def _rounding(self, component: str) -> Need:
        """Of solving a component's weights and fitting factors beside them: its calls run once, the moments of a part's inputs,
        and one factor at a time."""
        request = calibration_request(self.job.loaded, self.job.is_large)
        asked, dtype = self._asked(request, self.job.rows(request["guidance"]), "bfloat16")
        is_transformer = component == "transformer"
        made = asked.prompts * asked.steps * asked.rows if is_transformer else asked.prompts + (asked.rows > 1)
        calls = min(ROWS, made)
        asked = replace(asked, prompts=min(asked.prompts, ROWS))
        precision = getattr(self.recipe.precision, component)
        work = solving(solvable(self.job.loaded, self.source, component), precision.rounding)
        seconds = SOLVE_SECONDS if precision.rounding == "gptq" else 2 * QUANTIZE_SECONDS[precision.scales]
        rows = calls * tokens_of(self.models, asked, component)
        flop = self._pass_flop(asked) if is_transformer else text_flop(self.models, asked.text_tokens)
        fixed = COMPILE_SECONDS + LOAD_SECONDS + work.weights * seconds / self.cores
        running = Work(fixed, **{dtype: calls * flop / MODEL_SHARE}, read=2 * work.weights)
        products = work.moments * rows + work.factors * FACTOR_TIMES + work.products + work.low_rank * NARROW_TIMES
        cures = {"low_rank: []": bool(precision.low_rank)}
        cures |= {
            "rounding: nearest": precision.rounding != "nearest",
            "smoothing: none": precision.smoothing != "none",
        }
        return Need(
            memory_of_calls(self.models, asked, component, calls) + work.memory,
            disk=work.disk + SMALL_DISK,
            work=running + Work(float32=products),
            how="one block at a time",
            cures=((" with ".join(f"precision.{component}.{cure}" for cure, asked in cures.items() if asked), 0),),
        )

    def _weights(self, component: str) -> Need:
        plan = self.source.plans.get(component, [])
        before = sum(ref.nbytes for ref in self._component(component).tensors.values())
        values = sum(entry.parameters for entry in to_quantize(plan))
        scales = getattr(getattr(self.recipe.precision, component, None), "scales", "max")
        seconds = values * QUANTIZE_SECONDS[scales] / self.cores + (COMPILE_SECONDS if values else 0.0)
        stored = self.weights_bytes[component]
        copied = before - 2 * values + stored
        memory = PROCESS + WRITER
        if self.recipe.calibration.engine == "fluxc":
            memory += records_bytes(self.models)
        return Need(memory, stored + SMALL_DISK, work=Work(seconds, read=before, hashed=stored, copied=copied))

    def _target(self, name: str) -> Need:
        target = next(target for target in self.recipe.targets if target.name == name)
        if isinstance(target, OnnxRuntimeTarget):
            if target.device != "cpu":
                return Need(PROCESS, GRAPHS_DISK, work=Work(1.0))
            return Need(PROCESS + SESSION, GRAPHS_DISK, work=Work(1.0))
        if isinstance(target, TensorRTTarget):
            if target.weights == "bound":
                return Need(PROCESS + LIBRARY, PLANS_DISK, work=Work(PLAN_SECONDS))
            baked = self.weights_bytes["all"]
            cures = ((f"weights: bound for {target.name}", PROCESS + LIBRARY),)
            memory = PROCESS + int(target.memory_gib * GIB)
            return Need(memory, PLANS_DISK + baked, work=Work(PLAN_SECONDS, copied=8 * baked), cures=cures)
        if isinstance(target, VisualGenTarget):
            from fluxc.targets.visual_gen.folder import is_split

            halves = sum(entry.bytes_after for entry in self.source.plans["transformer"] if is_split(entry.layer.name))
            return Need(PROCESS, SMALL_DISK + halves, work=Work(1.0, read=halves, copied=halves))
        return Need(PROCESS, GRAPHS_DISK, work=Work(1.0))

    @cached_property
    def _unfolded(self) -> int:
        """Bytes of the weight that takes the most while it is multiplied in ONNX Runtime on the CPU."""
        entries = [entry for plan in self.source.plans.values() for entry in plan]
        return int(max(entry.parameters * UNFOLDED_BYTES.get(entry.format, 12.0) for entry in entries))

    @property
    def _fidelity(self) -> tuple[Asked, str]:
        asked, recipe = self.job.fidelity, self.recipe
        request = {"prompts": asked.prompts, "steps": asked.steps, "size": asked.size}
        return self._asked(request, self.job.rows(recipe.sampling.guidance), recipe.fidelity.reference)

    def _reference(self, _: str) -> Need:
        asked, dtype = self._fidelity
        need = self._running(asked, dtype)
        return replace(need, disk=self._recorded(asked), cures=(*self._smaller("fidelity", asked, dtype), NOT_COMPARED))

    def _recorded(self, asked: Asked) -> int:
        """Bytes in fp32 of embeddings, the prologue's outputs, latents and velocities of every step, and the image."""
        model, tokens = self.models.transformer, image_tokens(self.models, asked.size)
        text = asked.text_tokens * model.joint_attention_dim
        prologue = (tokens + asked.text_tokens) * (model.width + 2 * model.attention_head_dim) + 12 * model.width
        steps = 2 * asked.steps * tokens * model.in_channels
        return SMALL_DISK + 4 * asked.prompts * (asked.rows * text + prologue + steps + 3 * math.prod(asked.size))

    def _compare(self, _: str) -> Need:
        asked, _dtype = self._fidelity
        here = [target for target in self.recipe.targets if target.runs_here]
        if not here or not asked.prompts:
            return Need(PROCESS)
        # Velocities at recorded latents, and, for images, a step loop of its own, or, to tell what a quantized text encoder
        # costs, two.
        loops = 1 + any(entry.format != "bf16" for entry in self.source.plans["text_encoder"])
        times = 1.0 + loops if self.job.fidelity.level == "images" else 1.0
        work = sum((self._generating(asked, times, target) for target in here), Work())
        disk = SMALL_DISK + asked.prompts * (len(here) + 1) * 3 * math.prod(asked.size)
        return Need(self._compared(asked), disk, work=work, cures=self._lighter(asked))

    def _compared(self, asked: Asked, text_encoder: int | None = None) -> int:
        """Memory of a target while it is compared: all components where they fit, else one after the other; `text_encoder` in
        place of its bytes."""
        stored = {name: self.weights_bytes[name] for name in WEIGHTS_FILE}
        stored["text_encoder"] = text_encoder or stored["text_encoder"]
        if any(target.runs_here and target.computes_in_int8 for target in self.recipe.targets):
            stored = {name: size + self._more_in_int8(name) for name, size in stored.items()}
        working = PROCESS + SESSION + max(self._unfolded, self._activations(asked))
        every = working + sum(stored.values())
        return every if every <= self.limit else working + max(stored.values())

    def _more_in_int8(self, component: str) -> int:
        """Bytes by which a component grows where fluxrt makes int8 rows of it, and fp32 of the transformer's other layers: what
        they are made of need not stay in memory."""
        plan = self.source.plans.get(component, [])
        plain = 4 if component == "transformer" else 0
        made = [(entry, entry.parameters * (plain if entry.format == BF16 else 1)) for entry in plan]
        return sum(size - entry.bytes_after for entry, size in made if size)

    def _lighter(self, asked: Asked) -> tuple[tuple[str, int], ...]:
        """What comparing would take at a smaller size, and with the text encoder in FP8."""
        side, cures = self._small_side, [NOT_COMPARED]
        if math.prod(asked.size) > side * side:
            cures.insert(
                0,
                (
                    f"fidelity.size: [{side}, {side}]{self._added((side, side))}",
                    self._compared(asked.with_size((side, side))),
                ),
            )
        text = weights_by_component(self.source)["text_encoder"]
        if text.fp8 < text.planned:
            cures.insert(0, ("precision.text_encoder.default: fp8", self._compared(asked, text.fp8)))
        return tuple(cures)

    def _added(self, size: tuple[int, int]) -> str:
        """What must be said of a size to compare at: it must be one of those that are served."""
        return "" if self.recipe.serves(size) else ", added to sizes"

    @property
    def _small_side(self) -> int:
        """Pixels of a square image of 256 tokens."""
        return 16 * self._vae.pixels_per_token

    def _activations(self, asked: Asked) -> int:
        plain = replace(asked, itemsize=4, observed=0)
        model, tokens = self.models.transformer, asked.text_tokens + image_tokens(self.models, asked.size)
        scores = 2 * model.num_attention_heads * tokens**2
        step = asked.rows * (tokens * (14 * model.width + 5 * model.mlp_width) + scores)
        return max(
            4 * step, decoding(self._vae, plain.with_size(decoded_at_once(self.recipe.vae, self._vae, asked.size)[0]))
        )

    def _generating(self, asked: Asked, times: float, target: Target | None = None) -> Work:
        """What a target, or the first that runs here, computes on this CPU for all prompts, its transformer `times` for every
        step."""
        target = target or next((one for one in self.recipe.targets if one.runs_here), None)
        in_int8 = target is not None and target.computes_in_int8
        passes = times * asked.prompts * asked.rows * asked.steps
        tile, count = decoded_at_once(self.recipe.vae, self._vae, asked.size)
        flop = passes * self._pass_flop(asked) + 2 * asked.prompts * count * decoding_flop(self._vae, tile)
        flop += (asked.prompts + 1) * text_flop(self.models, asked.text_tokens)
        calls = passes * len(self.models.transformer.linears)
        unfolded = UNFOLDING * (1 if in_int8 else passes / asked.rows) * self.weights_bytes["transformer"]
        share = RUNTIME_SHARE * (INT8_SPEED if in_int8 else 1)
        return Work(1.0 + CALL_SECONDS * calls / 10, float32=flop / share, copied=unfolded)

    def _frontier(self, rest: str) -> Need:
        asked, _ = self._fidelity
        if not rest:
            return Need(PROCESS, work=Work(1.0))
        size = tuple(trace_request(self.job.loaded)["size"])
        asked = replace(asked, steps=self.recipe.sampling.steps, size=size)
        methods = 1 if rest in ("full", "chosen", "reference") else 2
        disk = SMALL_DISK + methods * asked.prompts * 3 * math.prod(size)
        return Need(self._compared(asked), disk, work=self._generating(asked, methods), cures=self._lighter(asked))
