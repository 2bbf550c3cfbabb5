"""The recipe: its types, reading it from YAML, changing fields from the command line, errors that name the field."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
import yaml

from fluxc.engine.library import LIBRARIES
from fluxc.errors import RecipeError, nearest
from fluxc.quantize.formats import Scales
from fluxc.quantize.presets import find_preset

LAGS = 6
"""How many steps back a step trace measures a reused residual: the longest run of skipped steps any policy can have."""
LEAST_STEPS = 10

Format = Literal["nvfp4", "fp8", "bf16"]
Size = tuple[int, int]


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint: a diffusers folder (relative to the recipe) or a hub id, with an optional revision."""

    source: str
    revision: str | None = None


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
    """What `keep: auto` may spend, one of the two.

    `share`: of the Linears' parameters, besides what rules and preset keep. `error`: the relative error of the velocity
    that is allowed (root of the mean |v - reference|^2 / |reference|^2); as few parameters as reach it are kept.
    """

    share: float | None = None
    error: float | None = None


class ComponentPrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Formats of one component's Linears: `keep` stays bf16, then the first matching rule, then what `preset` keeps in
    bf16, then the default.

    `keep: auto` measures what should stay, under `budget`. `scales` says how NVFP4 block scales are chosen.
    """

    default: Format = "bf16"
    keep: tuple[str, ...] | Literal["auto"] = ()
    budget: Budget | None = None
    preset: str | None = None
    rules: tuple[Rule, ...] = ()
    scales: Scales = "max"


class Precision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Formats by component; the VAE is never quantized."""

    transformer: ComponentPrecision = ComponentPrecision(default="nvfp4")
    text_encoder: ComponentPrecision = ComponentPrecision()


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to compile for.

    onnxruntime: `activations: nvfp4` rounds the inputs of quantized layers as an FP4 GPU does; `weights_in_memory: 4-bit`
    halves the memory of NVFP4 weights at run time, and takes longer. `device: cuda` is for an NVIDIA GPU of SM90 or later,
    with 4-bit weights and activations in `dtype`.

    tensorrt_rtx, tensorrt: `compute_capabilities` are the GPUs; `weights: baked` puts them into the plans, in segments that
    can be built in `memory_gib`; `shapes` makes an optimization profile of every size, or one that spans them; `allow` lists
    patterns of layers that may run otherwise than planned.

    `gpus` shards the transformer by sequence (Ulysses) for so many GPUs, onnxruntime for so many processes on the CPU.

    visual_gen is a folder for TensorRT-LLM's VisualGen; `gpus` lists the numbers of GPUs it can be served with.
    """

    kind: Literal["onnxruntime", "tensorrt_rtx", "tensorrt", "visual_gen"]
    activations: Literal["none", "nvfp4"] = "none"
    weights_in_memory: Literal["8-bit", "4-bit"] = "8-bit"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    compute_capabilities: tuple[str, ...] = ()
    weights: Literal["bound", "baked"] = "bound"
    memory_gib: float = 16.0
    shapes: Literal["profiles", "range"] = "profiles"
    allow: tuple[str, ...] = ()
    gpus: int | tuple[int, ...] = 1

    @property
    def name(self) -> str:
        parts: list[str] = [self.kind]
        parts += ["cuda"] if self.device == "cuda" else []
        parts += [self.dtype] if self.dtype != "bfloat16" else []
        parts += [self.activations] if self.activations != "none" and not self.is_tensorrt else []
        parts += [self.weights_in_memory] if self.weights_in_memory != "8-bit" else []
        parts += [self.weights] if self.weights != "bound" else []
        parts += [f"{self.ranks}gpus"] if self.ranks > 1 else []
        return "-".join(parts)

    @property
    def is_tensorrt(self) -> bool:
        """Whether it is compiled to TensorRT plans."""
        return self.kind in ("tensorrt_rtx", "tensorrt")

    @property
    def is_visual_gen(self) -> bool:
        """Whether it is a folder for TensorRT-LLM's VisualGen."""
        return self.kind == "visual_gen"

    @property
    def ranks(self) -> int:
        """How many ranks its graphs are sharded for; 1 where another program divides the work."""
        return self.gpus if isinstance(self.gpus, int) and not self.is_visual_gen else 1

    @property
    def gpu_counts(self) -> tuple[int, ...]:
        """The numbers of GPUs a visual_gen folder can be served with."""
        return (self.gpus,) if isinstance(self.gpus, int) else self.gpus

    @property
    def is_for_gpu(self) -> bool:
        """Whether it runs on a GPU, in 16 bits."""
        return self.is_tensorrt or self.is_visual_gen or self.device == "cuda"

    @property
    def runs_here(self) -> bool:
        """Whether the machine that builds can draw with it in one process, so that it is compared with diffusers."""
        return not self.is_for_gpu and self.ranks == 1

    @property
    def is_for_processes(self) -> bool:
        """Whether the machine that builds can draw with it in several processes."""
        return not self.is_for_gpu and self.ranks > 1

    @property
    def in_one(self) -> Target:
        """The same target, not sharded."""
        return msgspec.structs.replace(self, gpus=1)

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of quantized layers are rounded to the weights' format."""
        return self.activations != "none" or self.is_tensorrt or self.is_visual_gen


class StepCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Skips denoising steps, as TeaCache does; leave it out where every step is to be computed.

    How many: `skip` of the steps on average, `max_error` (root mean square error of the final latents that skipped steps may
    add up to, to first order), or `skip: auto`, the knee of the curve between them. `mode: static` skips the best fixed steps,
    `dynamic` decides by the polynomial while a picture is drawn. `first` and `last` steps are always computed, at most
    `longest_run` skipped in a row. The polynomial has `degree` 1 to 5; `fit: constrained` never falls. A fit that explains
    less than `min_r2` of the variance on held-out prompts is refused. `elsewhere`: what happens to requests of other steps or
    sizes. `prompts` are traced in place of the calibration's; `trace` is a file made by `fluxc trace`. `frontier` lists the
    numbers of skipped steps that the report compares; empty, the one chosen alone.
    """

    skip: float | Literal["auto"] | None = None
    max_error: float | None = None
    mode: Literal["static", "dynamic"] = "static"
    degree: int = 3
    fit: Literal["constrained", "plain"] = "constrained"
    first: int = 1
    last: int = 1
    longest_run: int = 4
    min_r2: float = 0.3
    elsewhere: Literal["refuse", "warn", "allow"] = "warn"
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
    diffusers' latents. `image_psnr_db`: the mean over the held-out prompts of the finished pictures. `step_cache_psnr_db`: the
    same of pictures with skipped steps, against those without.
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


class LoadedRecipe(msgspec.Struct, frozen=True):
    """A recipe with the folder its relative paths start from."""

    recipe: Recipe
    folder: Path

    def prompts(self, field: str, file: str) -> list[str]:
        """The lines of a prompt file, without empty ones and `#` comments; RecipeError names `field`."""
        path = self.folder / file
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{field}: cannot read {path}: {error}") from error
        prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not prompts:
            raise RecipeError(f"{field}: {path} holds no prompts; write one a line")
        return prompts


def load_recipe(path: str | Path, changes: tuple[str, ...] = ()) -> LoadedRecipe:
    """Read `path`, apply `changes` ("a.b=value", the value in YAML), and check every field.

    Raises RecipeError naming the file, the field and, for a misspelt one, the nearest valid field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields; see recipes/flux2-nano.yaml")
    for change in changes:
        _apply_change(data, change)
    _check_fields(data, Recipe, "", str(path))
    try:
        recipe = msgspec.convert(data, Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{path}: {str(error).replace('$.', '')}") from error
    _check_values(recipe, path)
    if recipe.step_cache and recipe.step_cache.skip is None and recipe.step_cache.max_error is None:
        recipe = msgspec.structs.replace(recipe, step_cache=msgspec.structs.replace(recipe.step_cache, skip="auto"))
    recipe = msgspec.structs.replace(recipe, targets=tuple(_with_defaults(target) for target in recipe.targets))
    return LoadedRecipe(recipe, path.resolve().parent)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this loader refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"the field {key!r} appears twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_change(data: dict[str, Any], change: str) -> None:
    where, equals, value = change.partition("=")
    if not equals or not where:
        raise RecipeError(f"--set {change}: write it as field.sub_field=value")
    try:
        parsed = yaml.load(value, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change}: the value is not valid YAML: {error}") from error
    *parents, last = where.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {change}: {parent!r} is not a mapping, so it has no fields to set")
    data[last] = parsed


def _check_fields(data: Any, kind: Any, where: str, file: str) -> None:
    """Refuse unknown fields and words with the nearest valid one, which msgspec's own error does not offer."""
    fields = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        if key not in fields:
            place = f"{where}{key}"
            raise RecipeError(
                f"{file}: unknown field {place!r}{nearest(str(key), fields) or '.'} The fields here are: {', '.join(fields)}."
            )
        words = _words_of(fields[key])
        if words and isinstance(value, str) and value not in words:
            wanted = ", ".join(words) + (", or a list" if len(_parts_of(fields[key])) > 1 else "")
            raise RecipeError(
                f"{file}: {where}{key}: {value!r} is not possible{nearest(value, words) or '.'} It can be {wanted}"
            )
        for inner in _structs_in(fields[key]):
            for item in value if isinstance(value, list) else [value]:
                _check_fields(item, inner, f"{where}{key}.", file)


def _parts_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _words_of(kind: Any) -> list[str]:
    """The words a field can be, if it is a choice of words."""
    return [word for part in _parts_of(kind) if get_origin(part) is Literal for word in get_args(part)]


def _structs_in(kind: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [found for part in getattr(kind, "__args__", ()) for found in _structs_in(part)]


def _check_values(recipe: Recipe, path: Path) -> None:
    def refuse(field: str, why: str) -> None:
        raise RecipeError(f"{path}: {field}: {why}")

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        refuse("name", f"{recipe.name!r} becomes a folder name; use letters, digits, '.', '_' and '-'")
    if not recipe.sizes:
        refuse("sizes", "give at least one [height, width]")
    if len(set(recipe.sizes)) != len(recipe.sizes):
        refuse("sizes", "a size appears twice")
    if recipe.calibration.size and recipe.calibration.size not in recipe.sizes:
        refuse("calibration.size", f"{list(recipe.calibration.size)} is not one of sizes")
    if not 0 < recipe.calibration.percentile <= 100:
        refuse("calibration.percentile", f"must be more than 0 and at most 100, got {recipe.calibration.percentile}")
    if recipe.calibration.engine == "fluxc" and recipe.calibration.algorithm != "max":
        refuse(
            "calibration.algorithm", f"{recipe.calibration.algorithm!r} is modelopt's; set calibration.engine: modelopt"
        )
    if recipe.text.length < 1:
        refuse("text.length", f"must be at least 1, got {recipe.text.length}")
    for field, steps in (("sampling.steps", recipe.sampling.steps), ("calibration.steps", recipe.calibration.steps)):
        if steps is not None and steps < 1:
            refuse(field, f"must be at least 1, got {steps}")
    for component in ("transformer", "text_encoder"):
        preset = getattr(recipe.precision, component).preset
        if preset is not None:
            find_preset(preset, component, f"{path}: precision.{component}.preset")
    text, transformer = recipe.precision.text_encoder, recipe.precision.transformer
    if text.keep == "auto" or text.budget:
        refuse("precision.text_encoder.keep", "auto measures the transformer; list the text encoder's layers to keep")
    if transformer.keep == "auto" and recipe.calibration.engine == "modelopt":
        refuse(
            "precision.transformer.keep",
            "auto measures fluxc's own quantizer; with calibration.engine: modelopt, list the layers",
        )
    budget = transformer.budget
    if (transformer.keep == "auto") != (budget is not None):
        refuse("precision.transformer.budget", "goes with `keep: auto`, which needs it: {share: 0.03} or {error: 0.05}")
    if budget is not None:
        given = [value for value in (budget.share, budget.error) if value is not None]
        if len(given) != 1 or not 0 < given[0] < 1:
            refuse("precision.transformer.budget", "give either share or error, more than 0 and less than 1")
    if recipe.weights.shard_gib is not None and not recipe.weights.shard_gib > 0:
        refuse("weights.shard_gib", f"must be positive, got {recipe.weights.shard_gib}")
    if recipe.step_cache:
        _check_step_cache(recipe, refuse)
    elif recipe.gates.step_cache_psnr_db is not None:
        refuse("gates.step_cache_psnr_db", "there is no step_cache in this recipe")
    if not recipe.targets:
        refuse("targets", "give at least one, for example {kind: onnxruntime}")
    for at, target in enumerate(recipe.targets):
        _check_target(target, f"targets[{at}]", refuse)
    names = [target.name for target in recipe.targets]
    for at, target in enumerate(recipe.targets):
        if target.is_for_processes and target.in_one.name not in names:
            refuse(
                f"targets[{at}]",
                f"what {target.ranks} processes draw is held against what one draws; add the same target without gpus",
            )
    for name in names:
        if names.count(name) > 1:
            refuse("targets", f"{name!r} appears twice")


def _check_step_cache(recipe: Recipe, refuse: Callable[[str, str], None]) -> None:
    cache, steps = recipe.step_cache, recipe.sampling.steps
    assert cache is not None
    if cache.skip is not None and cache.max_error is not None:
        refuse("step_cache", "give either skip or max_error")
    if isinstance(cache.skip, float) and not cache.skip > 0:
        refuse(
            "step_cache.skip", f"must be more than 0, got {cache.skip:g}; leave step_cache out to compute every step"
        )
    if cache.max_error is not None and not cache.max_error > 0:
        refuse("step_cache.max_error", f"must be more than 0, got {cache.max_error:g}")
    if not 1 <= cache.degree <= 5:
        refuse("step_cache.degree", f"must be 1 to 5, got {cache.degree}")
    for field, least in (("first", 1), ("last", 0), ("longest_run", 1)):
        if getattr(cache, field) < least:
            refuse(f"step_cache.{field}", f"must be at least {least}, got {getattr(cache, field)}")
    if cache.longest_run > LAGS:
        refuse(
            "step_cache.longest_run", f"at most {LAGS}, which is how far back a trace looks, got {cache.longest_run}"
        )
    if steps < LEAST_STEPS:
        refuse(
            "step_cache",
            f"{steps} steps are too few to skip any (at least {LEAST_STEPS}): a model distilled to so few has none that "
            "resemble each other; leave step_cache out, or raise sampling.steps",
        )
    most = most_skipped(steps, cache.first, cache.last, cache.longest_run)
    wanted = [("skip", cache.skip)] if isinstance(cache.skip, float) else []
    wanted += [("frontier", max(cache.frontier))] if cache.frontier and cache.frontier != "auto" else []
    for field, count in wanted:
        if count > most:
            refuse(
                f"step_cache.{field}",
                f"{count:g} of {steps} steps cannot be skipped; at most {most} can, see longest_run",
            )
    if cache.frontier != "auto" and any(count < 1 for count in cache.frontier):
        refuse("step_cache.frontier", "lists numbers of skipped steps, 1 or more")


def most_skipped(steps: int, first: int, last: int, longest_run: int) -> int:
    """How many of `steps` can be skipped at most: a run of `longest_run`, a computed step, and so on."""
    free = max(steps - first - last, 0)
    runs, rest = divmod(free, longest_run + 1)
    return runs * longest_run + rest


def _check_target(target: Target, field: str, refuse: Callable[[str, str], None]) -> None:
    only = {
        "onnxruntime": ("activations", "weights_in_memory", "device", "dtype"),
        "tensorrt": ("compute_capabilities", "weights", "memory_gib", "shapes", "allow"),
    }
    own = "tensorrt" if target.is_tensorrt else target.kind
    for option in (option for kind, options in only.items() if kind != own for option in options):
        if getattr(target, option) != getattr(Target(target.kind), option):
            refuse(f"{field}.{option}", f"a target of kind {target.kind} has no such option")
    for option, needed in (("activations", "cpu"), ("weights_in_memory", "cpu"), ("dtype", "cuda")):
        plain = Target("onnxruntime")
        if (
            target.kind == "onnxruntime"
            and target.device != needed
            and getattr(target, option) != getattr(plain, option)
        ):
            refuse(f"{field}.{option}", f"goes with device: {needed}")
    if not target.gpu_counts or min(target.gpu_counts) < 1:
        refuse(f"{field}.gpus", f"must be at least 1, got {target.gpus}")
    if len(set(target.gpu_counts)) != len(target.gpu_counts):
        refuse(f"{field}.gpus", "one appears twice")
    if not target.is_visual_gen and not isinstance(target.gpus, int):
        refuse(f"{field}.gpus", f"a target of kind {target.kind} takes one number; make a target of each")
    if target.ranks > 1 and target.kind == "onnxruntime" and target.device == "cuda":
        refuse(
            f"{field}.gpus", "ONNX Runtime has no collectives for device: cuda; use a tensorrt target, or device: cpu"
        )
    if len(set(target.compute_capabilities)) != len(target.compute_capabilities):
        refuse(f"{field}.compute_capabilities", "one appears twice")
    if not target.memory_gib > 1:
        refuse(f"{field}.memory_gib", f"must be more than 1, which the library itself takes, got {target.memory_gib}")


def _with_defaults(target: Target) -> Target:
    """`target` with the GPUs that its library is used for most, if it names none."""
    if not target.is_tensorrt or target.compute_capabilities:
        return target
    return msgspec.structs.replace(target, compute_capabilities=LIBRARIES[target.kind].default)
