"""A recipe to start from: for a model and a kind of GPU, with comments, prompt files, and what to do next."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import fluxc
from fluxc.base.errors import CheckpointError, RecipeError, nearest
from fluxc.base.output import check_output, names_place
from fluxc.build.starter_text import recipe_text
from fluxc.checkpoint.identify import family_of, text_encoder_of, transformer_of, vae_of
from fluxc.checkpoint.source import Checkpoint, open_checkpoint
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.published import MODELS, TEXT_ENCODERS
from fluxc.predict.gpus import GPUS
from fluxc.quantize.source import is_large
from fluxc.recipe.schema import FILE as SCHEMA
from fluxc.recipe.schema import schema_text
from fluxc.targets.sharding import check_sharding

CPU = "cpu"
NANO, NANO_DEV = "flux2-nano", "flux2-nano-dev"
NANO_SHAPE = (2, 6, 4)
"""Double and single blocks and heads of flux2-nano and flux2-nano-dev, by which a copy of them is recognized."""
LONGEST_MODEL = 1000
"""Characters of what names a model."""
PUBLISHED = (
    ("klein-4b", "klein-4B", 4, 1.0),
    ("klein-9b", "klein-9B", 4, 1.0),
    ("klein-4b", "klein-base-4B", 50, 4.0),
    ("klein-9b", "klein-base-9B", 50, 4.0),
    ("dev", "dev", 50, 4.0),
)
"""Published models: whose shapes they have, what they are called, and the steps and the guidance that they were made for."""


@dataclass(frozen=True)
class Start:
    """A model as recipes start from it: shapes, and what it was made for. `nbytes`: of its checkpoint."""

    name: str
    title: str
    source: str
    transformer: Flux2Transformer
    pixels_per_token: int
    nbytes: int
    size: tuple[int, int] = (1024, 1024)
    text_length: int = 512
    steps: int = 4
    guidance: float = 1.0
    is_small: bool = False
    is_quantized: bool = False

    @property
    def is_distilled(self) -> bool:
        """Whether it was trained to take few steps without guidance."""
        return self.guidance == 1.0

    @property
    def embeds_guidance(self) -> bool:
        """Whether the scale of the guidance is an input of the transformer, so that it takes one pass a step."""
        return self.transformer.guidance_embeds

    @property
    def is_large(self) -> bool:
        """Whether measuring takes less of it where a recipe does not say."""
        return is_large(self.transformer)

    @property
    def prompts(self) -> str:
        """What its prompt files are called: flux2-nano knows shapes and colours, other models the world."""
        return NANO if self.is_small else "natural"


@dataclass(frozen=True)
class Written:
    """What `init` wrote and for what."""

    recipe: Path
    others: tuple[Path, ...]
    start: Start
    bundle: Path
    on: str
    gpus: int


def write_start(model: str | None, on: str, gpus: int, out: Path | None) -> Written:
    """Write a recipe for `model` on the GPU `on` (a name of `predict --on`, or cpu), its prompt files and the schema.

    RecipeError for a model that there is not, a number of GPUs that cannot share it, and for what would be overwritten;
    BuildError for a place that cannot be written to.
    """
    base = (out or Path()).absolute().parent if out else Path.cwd()
    model = NANO if model is None else model
    start = find_start(model, base)
    tokens = math.prod(side // start.pixels_per_token for side in start.size)
    if gpus > 1:
        check_sharding("--gpus", gpus, start.transformer, start.text_length, {start.size: tokens}, on != CPU)
    name = start.name if on == CPU else f"{start.name}-{on}"
    recipe = out or Path(f"{name}.yaml")
    prompts = [f"{start.prompts}-{use}.txt" for use in ("calibration", "held-out")]
    files = {recipe.parent / "prompts" / file: _prompts(file) for file in prompts} | {
        recipe.parent / SCHEMA: schema_text()
    }
    check_output(recipe, "a recipe")
    if recipe.exists():
        raise RecipeError(f"{recipe}: exists already, and is not overwritten; give another --out, or move it away")
    for path, text in files.items():
        if path.exists() and path.name != SCHEMA and _content(path) != text:
            raise RecipeError(
                f"{path}: exists already with other prompts; give --out in another folder, or move it away"
            )
    files = {path: text for path, text in files.items() if not path.exists()}
    with names_place("init", recipe):
        try:
            for path, text in {**files, recipe: recipe_text(start, model, name, on, gpus)}.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        except (FileExistsError, NotADirectoryError, FileNotFoundError, IsADirectoryError) as error:
            raise RecipeError(f"{recipe}: {error.strerror}; give --out a file below a folder") from error
    return Written(recipe, tuple(files), start, Path("artifacts") / name, on, gpus)


def find_start(model: str, base: Path) -> Start:
    """The start of a published model, flux2-nano, a local folder, or a hub id; a local path is written relative to `base`."""
    can = f"{', '.join(_names())}, a diffusers folder or a hub id (owner/name)"
    if not model.strip() or not model.isprintable() or len(model) > LONGEST_MODEL:
        raise RecipeError(f"MODEL: {model[:40]!r} names no model; it can be {can}")
    for start in _known().values():
        if model.casefold() in (start.name, start.name.removeprefix("flux2-"), start.source.casefold()):
            return start
    folder = _folder(model)
    if folder is not None:
        return _local(folder, base)
    if model in (NANO, NANO_DEV):
        return _nano(model, base)
    if model.endswith((".yaml", ".yml")):
        raise RecipeError(f"{model}: names a recipe, and init starts from a model; `fluxc plan {model}` shows a recipe")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return _on_hub(model)
    raise RecipeError(f"{model}: no such folder or model{nearest(model, _names()) or '.'} It can be {can}")


def _folder(model: str) -> Path | None:
    """The folder that `model` names, if it names one."""
    try:
        folder = Path(model).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):
        return None


def _names() -> list[str]:
    return [*(start.name.removeprefix("flux2-") for start in _known().values()), NANO, NANO_DEV]


def _known() -> dict[str, Start]:
    """The published models that can be compiled."""
    found = {}
    for model, called, steps, guidance in PUBLISHED:
        transformer, (encoder, _) = Flux2Transformer.read(MODELS[model]), TEXT_ENCODERS[model]
        shapes = [transformer.tensors, encoder.tensors(encoder.num_hidden_layers), Flux2VAE().tensors]
        start = Start(
            name=f"flux2-{called.lower()}",
            title=f"FLUX.2 {called.replace('-', ' ')}",
            source=f"black-forest-labs/FLUX.2-{called}",
            transformer=transformer,
            pixels_per_token=Flux2VAE().pixels_per_token,
            nbytes=sum(2 * math.prod(shape) for tensors in shapes for shape in tensors.values()),
            steps=steps,
            guidance=guidance,
        )
        found[start.name] = start
    return found


def _nano(model: str, base: Path) -> Start:
    folder = Path(fluxc.__file__).resolve().parent.parent / "models" / model
    if not folder.is_dir():
        raise RecipeError(
            f"{model}: is part of fluxc's repository, which this fluxc was not installed from; clone it, or give another "
            f"model: {', '.join(_names()[:-2])}, a diffusers folder or a hub id"
        )
    relative = Path(os.path.relpath(folder, base.resolve()))
    is_inside = base.resolve().is_relative_to(folder.parent.parent)
    return replace(_local(folder, base), name=model, source=str(relative if is_inside else folder))


def _local(folder: Path, base: Path) -> Start:
    checkpoint = open_checkpoint(str(folder.resolve()), None, base)
    source = str(folder) if folder.is_absolute() else os.path.relpath(folder.resolve(), base.resolve())
    return _of_checkpoint(checkpoint, folder.resolve().name, source)


def _on_hub(model: str) -> Start:
    """The start of a hub id, of whose weights nothing but headers is read."""
    try:
        checkpoint = open_checkpoint(model, None, Path())
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or give one of {', '.join(_names())}, or a diffusers folder") from error
    return _of_checkpoint(checkpoint, model.rpartition("/")[2], model)


def _of_checkpoint(checkpoint: Checkpoint, called: str, source: str) -> Start:
    """What a checkpoint was made for, by its family, shapes and whether it says that it is distilled."""
    family_of(checkpoint)
    transformer, vae = transformer_of(checkpoint), vae_of(checkpoint)
    encoder = text_encoder_of(checkpoint)
    shapes = [transformer.tensors, encoder.tensors(encoder.num_hidden_layers), vae.tensors]
    is_nano = (transformer.num_layers, transformer.num_single_layers, transformer.num_attention_heads) == NANO_SHAPE
    is_distilled = bool(checkpoint.index.get("is_distilled", False))
    name = re.sub(r"[^a-z0-9._-]+", "-", called.lower().replace("flux.2", "flux2")).strip("-._") or "model"
    start = Start(
        name=name[:100],
        title=called,
        source=source,
        transformer=transformer,
        pixels_per_token=vae.pixels_per_token,
        nbytes=sum(2 * math.prod(shape) for tensors in shapes for shape in tensors.values()),
        is_quantized=any(
            checkpoint.components[part].quantization is not None for part in ("transformer", "text_encoder")
        ),
    )
    if is_nano:
        length, guidance = (64, 2.5) if transformer.guidance_embeds else (32, 1.5)
        return replace(start, size=(64, 64), text_length=length, steps=24, guidance=guidance, is_small=True)
    return start if is_distilled else replace(start, steps=50, guidance=4.0)


def _prompts(file: str) -> str:
    return (resources.files("fluxc.build") / "prompts" / file).read_text(encoding="utf-8")


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def next_steps(written: Written) -> list[str]:
    """What to type next, and what it takes, a line each."""
    start, recipe, bundle = written.start, written.recipe, written.bundle
    is_hub_id = not Path(recipe.parent, start.source).is_dir()
    size = start.nbytes / 1e9
    fetched = f"; downloads the checkpoint first, {size:.0f} GB" if is_hub_id else ""
    commands = [
        (f"fluxc plan {recipe}", "checks it, and shows what a build will do"),
        (f"fluxc build {recipe}", f"compiles it into {bundle}{fetched}"),
    ]
    if written.on != CPU:
        gpu = GPUS[written.on].name
        commands.insert(1, (f"fluxc predict {recipe} --on {written.on}", f"predicts time and memory on {gpu}"))
        if not written.on.startswith("rtx"):
            commands.append((f"fluxc finish {bundle}", f"on the {gpu}: builds the engines"))
    ranks = f" --gpus {written.gpus}" if written.gpus > 1 else ""
    commands.append((f"fluxrt generate {bundle}{ranks} --prompt 'a red circle' --out image.png", "generates an image"))
    lines = [line for command, what in commands for line in (f"  {command}", f"      {what}")]
    if start.is_small:
        return [*lines, "A build takes about a minute on two idle cores, and 1 GB of memory."]
    return [
        *lines,
        f"The checkpoint is {size:.0f} GB on disk, and the bundle a third to a half of that. `fluxc plan` says what memory, "
        "disk and time each stage takes here.",
    ]
