"""The `visual_gen` target: a folder that TensorRT-LLM's VisualGen loads, and settings for each number of GPUs.

VisualGen reads a diffusers folder whose transformer is quantized in ModelOpt's layout, with one difference: of a SwiGLU's two
halves, stored as one matrix, it takes each under its own name. Everything else is what the bundle has anyway, so the folder
holds links to the bundle's files and one file of its own with those halves.

What VisualGen accepts was read in TensorRT-LLM 1.3 and 1.4; it was not loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fluxc.base.errors import RecipeError
from fluxc.base.progress import Report
from fluxc.base.safetensors import ITEM_BITS, TensorRef
from fluxc.checkpoint.components import INDEX, WEIGHTS_FILE
from fluxc.families.dev import DEV
from fluxc.families.klein import KLEIN
from fluxc.quantize.component_files import quantization_config
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.sharding import undivided
from fluxrt.manifest import StepCache
from fluxrt.visual_gen import PIXELS_PER_TOKEN

if TYPE_CHECKING:
    from fluxc.families.base import Family, Prompts
    from fluxc.quantize.writer import View
    from fluxc.recipe.structs import Recipe

FORMATS_TAKEN = ("nvfp4", "fp8")
SCHEMA = "VisualGenArgs of TensorRT-LLM 1.3 and 1.4"
FOLDER = "visual_gen"
HALVES = ("gate", "up")
HALVES_FILE = "gate_up.safetensors"
README = "README.md"
WARM_UP_TOKENS = 512
"""Text tokens that VisualGen warms up with, whatever requests ask for; a prompt's length where one does not say."""
BUILT_IN = (KLEIN, DEV)
"""Families whose way to read prompts and steps VisualGen has built in."""
FUSED = {
    "attn.to_q": "attn.qkv_proj",
    "attn.to_k": "attn.qkv_proj",
    "attn.to_v": "attn.qkv_proj",
    "attn.add_q_proj": "attn.add_qkv_proj",
    "attn.add_k_proj": "attn.add_qkv_proj",
    "attn.add_v_proj": "attn.add_qkv_proj",
    "ff.linear_in": "ff.gate_up_proj",
    "ff.linear_out": "ff.down_proj",
    "ff_context.linear_in": "ff_context.gate_up_proj",
    "ff_context.linear_out": "ff_context.down_proj",
}
SINGLE = {"attn.to_qkv_mlp_proj": "attn.to_qkv_mlp_proj.proj", "attn.to_out": "attn.to_out.proj"}


def module_of(layer: str) -> str:
    """VisualGen's own name of the module that a Linear of the checkpoint becomes, or a part of."""
    stem, _, rest = layer.partition(".")
    number, _, name = rest.partition(".")
    names = {"transformer_blocks": FUSED, "single_transformer_blocks": SINGLE}.get(stem, {})
    return f"{stem}.{number}.{names[name]}" if name in names else layer


def is_split(layer: str) -> bool:
    """Whether VisualGen takes the two halves of this Linear's rows under names of their own."""
    return layer.startswith("transformer_blocks.") and layer.endswith(".linear_in")


def check_visual_gen(
    field: str,
    gpu_counts: tuple[int, ...],
    plan: list[LayerPlan],
    heads: int,
    text_length: int,
    tokens: dict[tuple[int, int], int],
) -> None:
    """Refuse what VisualGen does not take; RecipeError names `field`, the target in the recipe, and what to write there.

    `plan` covers the transformer's Linears, `tokens` are the image tokens of every size.
    """
    formats = {entry.format for entry in plan if entry.format != "bf16"}
    if len(formats) > 1:
        raise RecipeError(
            f"{field}: VisualGen takes one quantized format and bf16, this plan has {', '.join(sorted(formats))}; keep "
            "to one of them in precision.transformer, or leave this target out"
        )
    unknown = formats - set(FORMATS_TAKEN)
    if unknown:
        raise RecipeError(
            f"{field}: VisualGen does not take {', '.join(sorted(unknown))}; plan {' or '.join(FORMATS_TAKEN)}, or leave "
            "this target out"
        )
    smoothed = [entry.layer.name for entry in plan if entry.rank or entry.is_smoothed]
    if smoothed:
        raise RecipeError(
            f"{field}: VisualGen does not take layers with a pre_quant_scale or low-rank factors, as {smoothed[0]} has; "
            "leave precision.transformer.low_rank and smoothing out, or quantize from the unquantized checkpoint, or leave "
            "this target out"
        )
    for number in gpu_counts:
        faults = undivided(number, heads, text_length, tokens) or undivided(number, heads, WARM_UP_TOKENS, {})
        if faults:
            raise RecipeError(
                f"{field}.gpus: {number} GPUs cannot share {' nor '.join(faults)} equally, and VisualGen does not pad; "
                "take another number, or other sizes"
            )


def _reads(family: Family) -> tuple[tuple[int, ...], Prompts, str]:
    return family.text_layers, family.prompts, family.schedule


def check_built_in(field: str, recipe: Recipe, family: Family, cfg_batch: bool, pixels_per_token: int) -> None:
    """Refuse what VisualGen would compute otherwise, without a word, because it has the answer built in (pipeline_flux2.py).

    `cfg_batch`: whether guidance over 1 means a second row a step. RecipeError names `field`, and what to write where.
    """
    if pixels_per_token != PIXELS_PER_TOKEN:
        raise RecipeError(
            f"{field}: VisualGen takes every image token for {PIXELS_PER_TOKEN} pixels a side, this checkpoint's VAE decodes "
            f"one to {pixels_per_token}, so images would have another size; leave this target out"
        )
    if not any(_reads(family) == _reads(known) for known in BUILT_IN):
        raise RecipeError(
            f"{field}: VisualGen reads prompts and steps as FLUX.2 klein and dev do, {family.pipeline_class} does not; "
            "leave this target out"
        )
    if not cfg_batch:
        return
    without = "VisualGen computes the prompt's row alone, without guidance, for a transformer that does not embed it"
    if recipe.sampling.guidance > 1:
        raise RecipeError(
            f"{field}: {without}, and sampling.guidance is {recipe.sampling.guidance:g}; set sampling.guidance: 1.0 (a request "
            "to another target may ask for more), or leave this target out"
        )
    traced = recipe.calibration.guidance
    if recipe.step_cache and traced is not None and traced > 1:
        raise RecipeError(
            f"{field}: {without}, and its step cache would be fitted to steps with calibration.guidance {traced:g}; leave "
            "calibration.guidance, step_cache or this target out"
        )


@dataclass(frozen=True)
class Written:
    """What the folder is made of: links to files of the bundle (both relative to it), and the YAML of each number of GPUs."""

    links: dict[str, str]
    configs: dict[int, str]


@dataclass(frozen=True)
class Settings:
    """What the YAML files and the README say: sizes, numbers of GPUs, a request's defaults, and the step cache if its fit
    explains `min_r2`."""

    sizes: tuple[tuple[int, int], ...]
    gpu_counts: tuple[int, ...]
    text_length: int
    steps: int
    guidance: float
    step_cache: StepCache | None = None
    min_r2: float = 0.0


def write_folder(
    folder: Path,
    settings: Settings,
    transformer: dict[str, Any],
    plan: list[LayerPlan],
    tensors: dict[str, TensorRef],
    linked: Iterable[str],
    report: Report | None = None,
) -> Written:
    """Write visual_gen/ below `folder`: configs, halves, index, YAML files and README.

    `transformer` is the component's config, `plan` covers its Linears, `tensors` are those of its weights files in the bundle;
    `linked` are the bundle's other files, by their paths, that the folder is to have.
    """
    from fluxc.quantize.writer import write_views

    root = folder / FOLDER
    (root / "transformer").mkdir(parents=True)
    config = transformer | {"quantization_config": _quantization_config(plan)}
    (root / "transformer" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    views, kept = [], {}
    for name, ref in tensors.items():
        layer, _, part = name.rpartition(".")
        if is_split(layer):
            views += _halves(layer, part, ref)
        else:
            kept[name] = ref.file.name
    # Wide numbers first, so that each lies at a multiple of its size.
    views.sort(key=lambda view: -ITEM_BITS[view.ref.dtype])
    write_views(root / "transformer" / HALVES_FILE, views, report)
    weight_map = kept | {view.name: HALVES_FILE for view in views}
    total = sum(ref.nbytes for name, ref in tensors.items() if name in kept) + sum(v.stop - v.start for v in views)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (root / "transformer" / (WEIGHTS_FILE["transformer"] + INDEX)).write_text(json.dumps(index, indent=1) + "\n")
    links = {f"{FOLDER}/{file}": file for file in linked}
    links |= {f"{FOLDER}/transformer/{file}": f"transformer/{file}" for file in sorted(set(kept.values()))}
    configs = {}
    for number in settings.gpu_counts:
        configs[number] = f"{FOLDER}/{number}gpu.yaml"
        (folder / configs[number]).write_text(_yaml(settings, number))
    (root / README).write_text(_readme(settings))
    return Written(links, configs)


def _halves(layer: str, part: str, ref: TensorRef) -> list[View]:
    """The gate's and the up projection's part of a tensor: the first and the last half of its rows; scalars go to both."""
    from fluxc.quantize.writer import View

    rows = ref.shape[0] // 2 if ref.shape else 0
    views = []
    for number, half in enumerate(HALVES):
        start, stop = (number * ref.nbytes // 2, (number + 1) * ref.nbytes // 2) if rows else (0, ref.nbytes)
        views.append(View(f"{layer}_{half}.{part}", (rows, *ref.shape[1:]) if rows else (), ref, start, stop))
    return views


def _quantization_config(plan: list[LayerPlan]) -> dict[str, Any] | None:
    """ModelOpt's, with every layer left in bf16 under the checkpoint's name and VisualGen's."""
    config = quantization_config(plan)
    if config is None:
        return None
    names = [
        name for entry in plan if entry.format == "bf16" for name in (entry.layer.name, module_of(entry.layer.name))
    ]
    names += [
        f"{entry.layer.name}_{half}"
        for entry in plan
        if entry.format == "bf16" and is_split(entry.layer.name)
        for half in HALVES
    ]
    return config | {"ignore": list(dict.fromkeys(names))}


def _yaml(settings: Settings, gpus: int) -> str:
    """VisualGenArgs for so many GPUs, as YAML; `model` is the folder, which the command line names."""
    args: dict[str, Any] = {
        "compilation_config": {"resolutions": [list(size) for size in settings.sizes], "skip_warmup": False},
        "torch_compile_config": {"enable": True, "enable_fullgraph": False, "enable_autotune": True},
        # TensorRT-LLM's release notes list CUDA graphs together with torch.compile as a known failure.
        "cuda_graph_config": {"enable": False},
        "parallel_config": {"cfg_size": 1, "ulysses_size": gpus, "ring_size": 1, "tp_size": 1},
    }
    lines = [f"# {SCHEMA}. Written by fluxc; there is no quant_config, which would override the checkpoint's."]
    step_cache, least = settings.step_cache, settings.min_r2
    if step_cache:
        rule, r2 = step_cache.visual_gen, step_cache.fit["latent"]["r2"]
        teacache = {
            "cache_backend": "teacache",
            "teacache_thresh": rule.threshold,
            "use_ret_steps": False,
            "coefficients": list(rule.coefficients),
        }
        if r2 >= least:
            args["cache_config"] = teacache
        else:
            lines.append(
                f"# TeaCache is off. On held-out prompts the polynomial fitted to residuals of the latents has R2 {r2}, under "
                f"step_cache.min_r2 {least}; it was to be {json.dumps(teacache)}"
            )
    return "\n".join(lines) + "\n" + yaml.safe_dump(args, sort_keys=False, default_flow_style=None)


def request_of(settings: Settings) -> dict[str, Any]:
    """What a request says besides the prompt, by the names of VisualGenParams: everything that VisualGen has defaults of its
    own for."""
    height, width = settings.sizes[0]
    return {
        "height": height,
        "width": width,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "max_sequence_length": settings.text_length,
        "seed": 0,
    }


def _readme(settings: Settings) -> str:
    """How to serve the folder, and what every request must say."""
    request, gpus = request_of(settings), settings.gpu_counts[0]
    posted = json.dumps({"prompt": "...", **request, "response_format": "b64_json"}, indent=1)
    assigned = "\n".join(f"params.{name} = {value!r}" for name, value in request.items())
    sizes = ", ".join(f"{height}x{width}" for height, width in settings.sizes)
    return f"""\
# For TensorRT-LLM's VisualGen

Written by fluxc for {SCHEMA}; not run with it. `Ngpu.yaml` are the settings for N GPUs.

Every request must give steps, guidance, size and text length: VisualGen's own defaults (50 steps, guidance 3.5, 1024x1024
pixels, 512 tokens) are not this bundle's. Sizes (height x width) that were compiled: {sizes}.

Guidance has no effect where the transformer does not embed it (klein): VisualGen computes the prompt's row alone. Longer
prompts than `max_sequence_length` are cut without a word; fluxrt refuses them.

## Serve

```
trtllm-serve . --visual_gen_args {gpus}gpu.yaml
curl http://localhost:8000/v1/images/generations -H 'Content-Type: application/json' -d '{posted}'
```

## From Python

With fluxrt, in the bundle's folder, which sends all of this:

```python
import fluxrt

with fluxrt.load(".", target="visual_gen", gpus={gpus}) as pipeline:
    pipeline.generate(fluxrt.Request("...", seed=0)).images[0].save("image.png")
```

With TensorRT-LLM alone, in this folder:

```python
from tensorrt_llm import VisualGen, VisualGenArgs

engine = VisualGen(model=".", args=VisualGenArgs.from_yaml("{gpus}gpu.yaml"))
params = engine.default_params
{assigned}
engine.generate(inputs="...", params=params).save("image.png")
```
"""


def ignored(pattern_list: Iterable[str], module: str) -> bool:
    """Whether VisualGen leaves a module unquantized: some pattern matches its own name."""
    return any(fnmatchcase(module, pattern) for pattern in pattern_list)
