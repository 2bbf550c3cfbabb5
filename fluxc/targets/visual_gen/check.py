"""Holds a folder against what TensorRT-LLM's VisualGen was read to accept; every fault is a sentence.

The YAML's fields are all that VisualGenArgs has; others are errors there and here. Where VisualGen would go on with a wrong
image (a missing input_scale, an ignore list under other names, halves that are never split), the folder is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from fluxc.base.errors import FluxError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.checkpoint.components import INDEX, WEIGHTS_FILE
from fluxc.families.dev import DEV
from fluxc.formats.constants import BLOCK
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.targets.sharding import undivided
from fluxc.targets.visual_gen.folder import BUILT_IN, HALVES, WARM_UP_TOKENS, ignored, is_split, module_of
from fluxrt.visual_gen import PIXELS_PER_TOKEN

PROCESSOR = ("processor_config.json", "preprocessor_config.json")
"""Files that AutoProcessor looks for."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class CompilationConfig(_Strict, frozen=True):
    resolutions: list[tuple[int, int]] | None = None
    num_frames: list[int] | None = None
    skip_warmup: bool = False


class TorchCompileConfig(_Strict, frozen=True):
    enable: bool = True
    enable_fullgraph: bool = False
    enable_autotune: bool = True


class CudaGraphConfig(_Strict, frozen=True):
    enable: bool = False


class CpuOffloadConfig(_Strict, frozen=True):
    enable: bool = False
    pin_memory: bool = True
    stages: list[str] | None = None


class AttentionConfig(_Strict, frozen=True):
    backend: Literal["VANILLA", "TRTLLM", "FA4", "CUTEDSL"] = "VANILLA"
    quant_attention_config: dict[str, Any] | None = None
    sparse_attention_config: dict[str, Any] | None = None


class ParallelConfig(_Strict, frozen=True):
    cfg_size: int = 1
    ulysses_size: int = 1
    async_ulysses: bool = False
    ring_size: int = 1
    attn2d_size: tuple[int, int] = (1, 1)
    tp_size: int = 1
    parallel_vae_size: int = 1


class CacheConfig(_Strict, frozen=True):
    cache_backend: Literal["teacache"]
    teacache_thresh: float = 0.2
    use_ret_steps: bool = False
    coefficients: list[float] | None = None
    coefficients_2: list[float] | None = None


class VisualGenArgs(_Strict, frozen=True):
    """The fields of VisualGenArgs (TensorRT-LLM 1.3 and 1.4)."""

    model: str | None = None
    revision: str | None = None
    quant_config: dict[str, Any] | None = None
    compilation_config: CompilationConfig = CompilationConfig()
    torch_compile_config: TorchCompileConfig = TorchCompileConfig()
    cuda_graph_config: CudaGraphConfig = CudaGraphConfig()
    cpu_offload_config: CpuOffloadConfig | None = None
    attention_config: AttentionConfig = AttentionConfig()
    parallel_config: ParallelConfig = ParallelConfig()
    cache_config: CacheConfig | None = None
    runtime_lora_config: dict[str, Any] | None = None
    pipeline_config: dict[str, Any] | None = None


class _Numbers(_Strict, frozen=True):
    dynamic: bool
    num_bits: int
    type: Literal["float"]
    group_size: int | None = None


class _Group(_Strict, frozen=True):
    input_activations: _Numbers
    weights: _Numbers
    targets: list[str]


class QuantizationConfig(_Strict, frozen=True):
    """`quantization_config` of the transformer's config.json."""

    config_groups: dict[str, _Group]
    ignore: list[str]
    quant_algo: Literal["NVFP4", "FP8"]
    producer: dict[str, str]
    quant_method: Literal["modelopt"]


def faults_of(folder: Path, text_tokens: int = WARM_UP_TOKENS) -> list[str]:
    """What VisualGen would refuse, or get wrong, of the folder; `text_tokens` is the length prompts are padded to."""
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text())
        transformer = Flux2Transformer.read(config, folder / "transformer")
        return [
            *_component_faults(folder),
            *_transformer_faults(folder / "transformer", config, transformer),
            *_text_encoder_faults(folder),
            *_settings_faults(folder, transformer.num_attention_heads, text_tokens),
        ]
    except (OSError, ValueError, FluxError) as error:
        return [f"{folder}: cannot be read: {error}"]


def _component_faults(folder: Path) -> Iterator[str]:
    index = json.loads((folder / "model_index.json").read_text())
    if "Flux2" not in str(index.get("_class_name")):
        yield f"model_index.json: _class_name {index.get('_class_name')!r} does not select the FLUX.2 pipeline"
    for name in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler"):
        if name not in index or not (folder / name).is_dir():
            yield f"model_index.json: component {name} is missing"
    if not (folder / "vae" / WEIGHTS_FILE["vae"]).is_file():
        yield f"vae/{WEIGHTS_FILE['vae']} is missing"


def _tensors(folder: Path, name: str) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors VisualGen would read: those of the files an index names, or without one of every safetensors file."""
    index = folder / (name + INDEX)
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        return {tensor: ref for file in files for tensor, ref in read_header(file).items()}, []
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    found = {t: ref for file in sorted(set(weight_map.values())) for t, ref in read_header(folder / file).items()}
    faults = [f"{index.name}: {t} is not in {file}" for t, file in weight_map.items() if t not in found]
    faults += [f"{ref.file.name}: {t} is not in the index" for t, ref in found.items() if t not in weight_map]
    faults += [
        f"{index.name}: {t} is in {found[t].file.name}, not in {file}"
        for t, file in weight_map.items()
        if t in found and found[t].file.name != Path(file).name
    ]
    return found, faults


def _transformer_faults(folder: Path, config: dict[str, Any], transformer: Flux2Transformer) -> Iterator[str]:
    tensors, faults = _tensors(folder, WEIGHTS_FILE["transformer"])
    yield from faults
    ignore, algorithm = [], None
    if "quantization_config" in config:
        try:
            quantization = msgspec.convert(config["quantization_config"], QuantizationConfig)
        except msgspec.ValidationError as error:
            yield f"transformer/config.json: quantization_config: {error}"
            return
        ignore, algorithm = quantization.ignore, quantization.quant_algo
        yield from _group_faults(quantization)
    # Its loader asks for the substring, which the scales' names contain too, and never splits input_scale.
    unsplit = [name for name in tensors if ".linear_in.weight" in name]
    if unsplit:
        yield f"transformer: {unsplit[0]} is not split into gate and up: the loader would take {len(unsplit)} tensors wrongly"
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    linears = {layer.name: (layer.out_features, layer.in_features) for layer in transformer.linears}
    modules: dict[str, list[str]] = {}
    for layer, (rows, columns) in linears.items():
        names = [f"{layer}_{half}" for half in HALVES] if is_split(layer) else [layer]
        modules.setdefault(module_of(layer), []).extend(names)
        left_out = algorithm is None or ignored(ignore, module_of(layer))
        if algorithm is not None and left_out != any(ignored(ignore, name) for name in (layer, *names)):
            yield f"quantization_config.ignore: {layer} and VisualGen's {module_of(layer)} are not both in it"
        for name in names:
            expected |= _linear_tensors(name, rows // len(names), columns, None if left_out else algorithm)
    for name, shape in transformer.tensors.items():
        if name.removesuffix(".weight") not in linears:
            expected[name] = ("BF16", shape)
    known = {*linears, *modules, *(name for names in modules.values() for name in names)}
    yield from (
        f"quantization_config.ignore: {pattern!r} matches nothing"
        for pattern in ignore
        if not any(ignored([pattern], name) for name in known)
    )
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    if missing:
        what = ", uninitialised memory would scale its inputs" if missing[0].endswith("input_scale") else ""
        yield f"transformer: {len(missing)} tensors are missing, the first {missing[0]}{what}"
    if surplus:
        yield f"transformer: {len(surplus)} tensors that no module takes, the first {surplus[0]}"
    for name in expected.keys() & tensors.keys():
        found = (tensors[name].dtype, tensors[name].shape)
        if found != expected[name]:
            yield f"transformer: {name} is {found[0]} {list(found[1])}, not {expected[name][0]} {list(expected[name][1])}"
    for module, names in modules.items():
        for part in ("weight_scale_2", "input_scale", *(["weight_scale"] if algorithm == "FP8" else [])):
            values = {bytes(tensors[f"{name}.{part}"].bytes_view()) for name in names if f"{name}.{part}" in tensors}
            if len(values) > 1:
                yield f"transformer: {module}: {part} differs between {', '.join(names)}, which become one matrix"


def _linear_tensors(
    name: str, rows: int, columns: int, algorithm: str | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a Linear, by name."""
    if algorithm is None:
        return {f"{name}.weight": ("BF16", (rows, columns))}
    scalars: dict[str, tuple[str, tuple[int, ...]]] = {f"{name}.input_scale": ("F32", ())}
    if algorithm == "FP8":
        return scalars | {f"{name}.weight": ("F8_E4M3", (rows, columns)), f"{name}.weight_scale": ("F32", ())}
    return scalars | {
        f"{name}.weight": ("U8", (rows, columns // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (rows, columns // BLOCK)),
        f"{name}.weight_scale_2": ("F32", ()),
    }


def _group_faults(config: QuantizationConfig) -> Iterator[str]:
    if set(config.config_groups) != {"group_0"}:
        yield "quantization_config.config_groups: must be group_0 alone; a mixed recipe is one algorithm and bf16"
        return
    group = config.config_groups["group_0"]
    bits, block = (4, BLOCK) if config.quant_algo == "NVFP4" else (8, None)
    for what, numbers in (("weights", group.weights), ("input_activations", group.input_activations)):
        if numbers.dynamic or numbers.num_bits != bits or numbers.group_size != block:
            yield f"quantization_config.config_groups.group_0.{what}: is not static {config.quant_algo}"
    if group.targets != ["Linear"]:
        yield f'quantization_config.config_groups.group_0.targets: must be ["Linear"], not {group.targets}'


def _text_encoder_faults(root: Path) -> Iterator[str]:
    folder, index = root / "text_encoder", json.loads((root / "model_index.json").read_text())
    tensors, faults = _tensors(folder, WEIGHTS_FILE["text_encoder"])
    yield from faults
    other = sorted({ref.dtype for ref in tensors.values()} - {"BF16"})
    if other or not tensors:
        yield f"text_encoder: must be bf16, holds {', '.join(other) or 'no weights'}"
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        yield "text_encoder/config.json: has a quantization_config, which VisualGen does not take"
    entry = index.get("text_encoder")
    if not isinstance(entry, list) or len(entry) != 2:
        yield f"model_index.json: text_encoder is {entry!r}, expected the names of a library and a class"
        return
    named = entry[1]
    family = next((known for known in BUILT_IN if known.text_encoder.class_name == named), None)
    if family is None:
        yield f"model_index.json: text_encoder is a {named}, and VisualGen would take hidden states of layers that are dev's"
        return
    encoder = family.text_encoder.read(config, folder)
    if encoder.num_hidden_layers <= family.text_layers[-1]:
        yield (
            f"text_encoder/config.json: {encoder.num_hidden_layers} layers; VisualGen takes the output of layer "
            f"{family.text_layers[-1]}, which would be normalised as the last one's"
        )
    expected = encoder.tensors(encoder.num_hidden_layers)
    missing = sorted(name for name in expected if name not in tensors)
    if missing:
        yield f"text_encoder: {len(missing)} tensors are missing and would be random, the first {missing[0]}"
    if named == DEV.text_encoder.class_name and not any((root / "tokenizer" / name).is_file() for name in PROCESSOR):
        yield f"tokenizer: holds none of {', '.join(PROCESSOR)}, so AutoProcessor finds no processor"


def _settings_faults(folder: Path, heads: int, text_tokens: int) -> Iterator[str]:
    files = sorted(folder.glob("*gpu.yaml"))
    if not files:
        yield "there is no NUMBERgpu.yaml"
    vae = json.loads((folder / "vae" / "config.json").read_text())
    pixels = Flux2VAE.read(vae, folder / "vae").pixels_per_token
    if pixels != PIXELS_PER_TOKEN:
        yield f"vae/config.json: a token has {pixels} pixels a side, VisualGen takes it for {PIXELS_PER_TOKEN}"
    for file in files:
        try:
            args = msgspec.convert(yaml.safe_load(file.read_text()), VisualGenArgs)
        except (msgspec.ValidationError, yaml.YAMLError) as error:
            yield f"{file.name}: {error}"
            continue
        yield from (f"{file.name}: {fault}" for fault in _args_faults(args, file, heads, pixels, text_tokens))


def _args_faults(args: VisualGenArgs, file: Path, heads: int, pixels: int, text_tokens: int) -> Iterator[str]:
    if args.quant_config is not None:
        yield "quant_config quantizes again and overrides the checkpoint; leave it out"
    parallel, gpus = args.parallel_config, file.name.removesuffix("gpu.yaml")
    if str(parallel.ulysses_size) != gpus:
        yield f"parallel_config.ulysses_size {parallel.ulysses_size} is not the {gpus} GPUs of its name"
    if parallel.tp_size != 1:
        yield "parallel_config.tp_size above 1 drops scales of static NVFP4 in single-stream blocks"
    if (parallel.cfg_size, parallel.ring_size, parallel.attn2d_size) != (1, 1, (1, 1)):
        yield "parallel_config: cfg_size, ring_size and attn2d_size must be 1"
    tokens = {}
    for height, width in args.compilation_config.resolutions or []:
        if height % pixels or width % pixels:
            yield f"compilation_config.resolutions: {height}x{width} is not a multiple of {pixels} pixels"
        tokens[height, width] = height // pixels * (width // pixels)
    if not args.compilation_config.resolutions:
        yield "compilation_config.resolutions is missing, so nothing is compiled for the sizes served"
    for what in undivided(parallel.ulysses_size, heads, text_tokens, tokens):
        yield f"{parallel.ulysses_size} GPUs cannot share {what}, and VisualGen does not pad"
    if WARM_UP_TOKENS % parallel.ulysses_size and not args.compilation_config.skip_warmup:
        yield f"{parallel.ulysses_size} GPUs cannot share the {WARM_UP_TOKENS} text tokens of the warm-up"
    if args.torch_compile_config.enable and args.cuda_graph_config.enable:
        yield "torch_compile_config and cuda_graph_config are both enabled, which TensorRT-LLM lists as a known failure"
    cache = args.cache_config
    if cache and not cache.teacache_thresh > 0:
        yield f"cache_config.teacache_thresh must be more than 0, is {cache.teacache_thresh}"
    if cache and not (cache.coefficients and all(math.isfinite(c) for c in cache.coefficients)):
        yield "cache_config.coefficients: there are none for klein, and a guess by the model's name otherwise; write them"
