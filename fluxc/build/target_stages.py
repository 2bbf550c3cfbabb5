"""The stages of a target: what it needs checked first, the graphs it starts from, its files and manifest entry."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import StageCache, key_of
from fluxc.models.flux2 import pixels_per_token
from fluxc.base.safetensors import TensorRef
from fluxc.checkpoint.source import HF_QUANT_CONFIG
from fluxc.checkpoint.components import (
    INDEX,
    WEIGHTS_FILE,
    small_files,
    text_encoder_config,
    weights_entry,
    weights_files,
    weights_tensors,
)
from fluxc.targets.tensorrt.library import LIBRARIES, check_capabilities, gpu_here, installed_version, load_library
from fluxc.base.errors import RecipeError
from fluxc.quantize.source import Source, kept_tensors
from fluxc.base.progress import Report
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import Recipe, Target
from fluxc.targets.sharding import Shares, check_sharding, needs_padding, shares_of
from fluxc.targets.visual_gen import folder as visual_gen
from fluxc.targets.unused import check_no_stray
from fluxrt import bundle as format


def check_targets(loaded: LoadedRecipe, source: Source) -> None:
    """Refuse targets whose GPUs do not compute in the formats the plan asks for, and gates that nothing would be held to."""
    formats = {entry.format for plan in source.plans.values() for entry in plan}
    for at, target in enumerate(loaded.recipe.targets):
        if target.is_tensorrt:
            field = f"targets[{at}].compute_capabilities"
            check_capabilities(target.kind, target.compute_capabilities, formats, field)
            if not LIBRARIES[target.kind].builds_without_gpu and len(target.compute_capabilities) > 1:
                raise RecipeError(
                    f"{field}: {target.kind} builds for one kind of GPU, the one it is finished on; give one"
                )
        if target.is_visual_gen:
            visual_gen.check_visual_gen(
                f"targets[{at}]",
                target.gpu_counts,
                source.stored_plan("transformer"),
                source.checkpoint.components["transformer"].config["num_attention_heads"],
                loaded.recipe.text.length,
                tokens_of_sizes(loaded.recipe, source),
            )
            if source.quantized.get("text_encoder"):
                raise RecipeError(
                    f"targets[{at}]: VisualGen takes a bf16 text encoder, this checkpoint's is quantized; start from one that "
                    "is not, or leave this target out"
                )
        if target.ranks > 1:
            check_sharding(
                f"targets[{at}].gpus",
                target.ranks,
                source.checkpoint.components["transformer"].config,
                loaded.recipe.text.length,
                tokens_of_sizes(loaded.recipe, source),
                target.is_tensorrt,
            )
    gates = loaded.recipe.gates
    gated = [field for field in ("step_cosine", "image_psnr_db") if getattr(gates, field) is not None]
    if gated and not any(target.runs_here for target in loaded.recipe.targets):
        raise RecipeError(
            f"gates.{gated[0]}: no target of this recipe runs on the machine that builds, so nothing would be held to it; add "
            "{kind: onnxruntime, activations: nvfp4}, which rounds as an FP4 GPU does, or leave the gate out"
        )


def tokens_of_sizes(recipe: Recipe, source: Source) -> dict[tuple[int, int], int]:
    """Image tokens of every size (height, width) of the recipe."""
    pixels = pixels_per_token(source.checkpoint)
    return {(height, width): height // pixels * (width // pixels) for height, width in recipe.sizes}


def shares_of_target(target: Target, recipe: Recipe, source: Source) -> list[Shares]:
    """What each rank of a sharded target holds, for every size of the recipe."""
    config = source.checkpoint.components["transformer"].config
    branches, itemsize = 2 if source.guidance_branches else 1, 2 if target.is_for_gpu else 4
    return [
        shares_of(target.ranks, size, tokens, config, recipe.text.length, branches, itemsize)
        for size, tokens in tokens_of_sizes(recipe, source).items()
    ]


def check_libraries(recipe: Recipe) -> None:
    """Refuse, before anything long runs, a target whose library is missing here although it could build here."""
    for target in recipe.targets:
        if target.is_tensorrt and LIBRARIES[target.kind].builds_without_gpu:
            load_library(target.kind)


def run_pieces(
    cache: StageCache, component: str, loaded: LoadedRecipe, source: Source, dtype: str, ranks: int = 1
) -> Path:
    """The component's neutral graphs as .onnx files, one for each kind of block: GPU and sharded targets start there.

    With `ranks` they are the transformer's for one rank's share of tokens.
    """
    config = source.checkpoint.components[component].config
    length, family = loaded.recipe.text.length // ranks, source.family

    def work(folder: Path, report: Report) -> None:
        import torch

        from fluxc.graph import export as trace

        if component == "transformer":
            pieces = trace.trace_transformer(
                config, length, source.guidance_branches, getattr(torch, dtype), part=ranks > 1
            )
        elif component == "text_encoder":
            pieces = trace.trace_text_encoder(config, length, family, getattr(torch, dtype))
        else:
            pieces = {"vae_decoder": trace.trace_vae_decoder(config, getattr(torch, dtype))[0]}
        for name, model in pieces.items():
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))

    inputs = [component, config, length, source.guidance_branches, dtype, ranks > 1]
    of = f" for one of {ranks} ranks" if ranks > 1 else ""
    return cache.run(f"pieces-{component}", f"trace {component} in {dtype}{of}", inputs, work)


def run_graphs(
    cache: StageCache, target: Target, loaded: LoadedRecipe, source: Source, traces: dict[str, Path]
) -> dict[str, Path]:
    """The neutral graphs that `target` starts from, by component; `traces` are those in fp32."""
    if target.is_visual_gen:
        return {}
    if not target.is_for_gpu:
        if target.ranks == 1:
            return traces
        return traces | {"transformer": run_pieces(cache, "transformer", loaded, source, "float32", target.ranks)}
    pieces = {
        name: run_pieces(cache, name, loaded, source, target.dtype, target.ranks if name == "transformer" else 1)
        for name in traces
        if name != "vae"
    }
    if target.is_tensorrt:
        return pieces | {"vae": run_pieces(cache, "vae", loaded, source, target.dtype)}
    return pieces | {"vae": traces["vae"]}


def run_target(
    cache: StageCache,
    target: Target,
    recipe: Recipe,
    source: Source,
    traces: dict[str, Path],
    weights: dict[str, Path],
) -> Path:
    """The target's files below its folder, and target.json: its manifest entry. `traces` are its neutral graphs."""
    headers = {
        name: [[t.name, t.dtype, list(t.shape), t.file.name, t.offset] for t in weights_tensors(folder, name).values()]
        for name, folder in weights.items()
    }
    formats = {name: [[e.layer.name, e.format, e.layer.group] for e in plan] for name, plan in source.plans.items()}
    inputs: list[Any] = [[path.name for path in traces.values()], headers, formats, msgspec.to_builtins(target)]
    inputs.append(recipe.step_cache is not None)
    if target.is_tensorrt:
        scales = {name: _scalar_digest(folder, name) for name, folder in weights.items()}
        library = installed_version(target.kind)
        inputs += [library, _builds_here(target), recipe.sizes, source.guidance_branches, scales]
        if target.weights == "baked":
            inputs.append(
                [cache.file_digest(file.resolve()) for n, f in weights.items() for file in weights_files(f, n)]
            )

    def work(folder: Path, report: Report) -> None:
        import onnx

        neutral = {
            name: {file.stem: onnx.load(file) for file in sorted(path.glob("*.onnx"))} for name, path in traces.items()
        }
        if recipe.step_cache is None:
            neutral["transformer"].pop("signal")
        refs = {name: weights_tensors(path, name) for name, path in weights.items()}
        entries = {name: weights_entry(path, name) for name, path in weights.items()}
        links = []
        for name, path in weights.items():
            (folder / name).mkdir()
            for file in weights_files(path, name):
                links.append(folder / name / file.name)
                links[-1].hardlink_to(file.resolve())
        make = _tensorrt_target if target.is_tensorrt else _onnxruntime_target
        entry = make(target, recipe, source, _Parts(neutral, refs, entries, folder), report)
        for link in links:
            link.unlink()
        (folder / "target.json").write_bytes(msgspec.json.encode(entry, order="deterministic"))

    return cache.run(f"target-{target.name}", f"build {target.name}", inputs, work)


@dataclass(frozen=True)
class _Parts:
    """What a target is made of: neutral graphs, tensors of the weights files and their entries by component, in a folder."""

    neutral: dict[str, dict[str, Any]]
    refs: dict[str, dict[str, TensorRef]]
    entries: dict[str, str]
    folder: Path


def _onnxruntime_target(target: Target, recipe: Recipe, source: Source, parts: _Parts, report: Report) -> format.Target:
    from fluxc.graph.compose import compose_body, compose_text_encoder
    from fluxc.targets.onnxruntime import build as module

    graphs = {name: model for pieces in parts.neutral.values() for name, model in pieces.items()}
    sharding = None
    if target.ranks > 1:
        graphs, sharding = _sharded(target, recipe, source, graphs)
    if target.is_for_gpu:
        config, text_layers = source.checkpoint.components["transformer"].config, source.family.text_layers
        body = compose_body(graphs, config["num_layers"], config["num_single_layers"], recipe.text.length)
        encoder = compose_text_encoder(graphs, text_layers)
        kept = ("prologue", "signal", "epilogue", "vae_decoder")
        graphs = {name: graphs[name] for name in kept if name in graphs}
        graphs |= {"body": body, "text_encoder": encoder}
    built = module.build_graphs(graphs, parts.refs, parts.entries, source.plans, target, source.unused)
    for graph in built.values():
        (parts.folder / graph.entry.file).write_bytes(graph.model.SerializeToString(deterministic=True))
    module.check_loads(parts.folder, [graph.entry.file for graph in built.values()], target.is_for_gpu)
    graph_entries = {name: graph.entry for name, graph in built.items()}
    return format.Target(
        target.name, target.kind, target.activations, graph_entries, device=target.device, sharding=sharding
    )


def _sharded(
    target: Target, recipe: Recipe, source: Source, graphs: dict[str, Any]
) -> tuple[dict[str, Any], format.Sharding]:
    """The graphs of one rank, the body in pieces between its exchanges, and what becomes of them."""
    from fluxc.graph.compose import compose_body
    from fluxc.graph.ulysses import Exchange, hide_padding, shard, split_at_exchanges
    from fluxc.targets.onnxruntime.build import port_of

    config = source.checkpoint.components["transformer"].config
    padded = needs_padding(target.ranks, list(tokens_of_sizes(recipe, source).values()))
    text_tokens = recipe.text.length // target.ranks
    body = compose_body(graphs, config["num_layers"], config["num_single_layers"], text_tokens)
    kept = {name: graph for name, graph in graphs.items() if not name.endswith("_block")}
    if padded and "signal" in kept:
        kept["signal"] = hide_padding(kept["signal"])
    order: list[str | format.Exchange] = []
    for part in split_at_exchanges(shard(body, config, target.ranks, padded)):
        if isinstance(part, Exchange):
            port = port_of(part.sends)
            order.append(format.Exchange(port.name, part.receives.name, port.dtype, port.shape))
        else:
            name = f"body-{sum(isinstance(known, str) for known in order)}"
            order.append(name)
            kept[name] = part
    return kept, format.Sharding(target.ranks, text_tokens, padded, tuple(order))


def _tensorrt_target(target: Target, recipe: Recipe, source: Source, parts: _Parts, report: Report) -> format.Target:
    from fluxc.targets.tensorrt.cut import Component
    from fluxc.graph.ulysses import shard
    from fluxc.targets.tensorrt import build as module

    components = {
        name: Component(name, refs, source.plans.get(name, []), f"{name}/{parts.entries[name]}")
        for name, refs in parts.refs.items()
    }
    pixels = pixels_per_token(source.checkpoint)
    sizes = module.Sizes(
        grids=tuple((height // pixels, width // pixels) for height, width in recipe.sizes),
        branches=(1, 2) if source.guidance_branches else (1,),
        text_length=recipe.text.length,
        ranks=target.ranks,
    )
    sharding = None
    if target.ranks > 1:
        blocks = parts.neutral["transformer"]
        config = source.checkpoint.components["transformer"].config
        blocks |= {name: shard(blocks[name], config, target.ranks) for name in blocks if name.endswith("_block")}
        sharding = format.Sharding(target.ranks, recipe.text.length // target.ranks)
    cut = module.cut_target(target, parts.neutral, components, sizes, source.family.text_layers)
    for name, tensors in parts.refs.items():
        spare = module.spare_scales(source.plans.get(name, []), cut.tensors[name])
        check_no_stray(name, [t for t in tensors if t not in cut.tensors[name] | spare], source.unused.get(name, ()))
    module.write_sources(cut, parts.folder)
    if _builds_here(target):
        engine = module.build_engine(target, cut, parts.folder, report)
    else:
        engine = module.unfinished_engine(target, cut)
    counts = [rows * columns for rows, columns in sizes.grids]
    tokens = (min(counts), max(counts)) if target.shapes == "range" else None
    return format.Target(
        target.name, target.kind, "nvfp4", {}, device="cuda", tokens=tokens, engine=engine, sharding=sharding
    )


def _builds_here(target: Target) -> bool:
    """Whether this machine builds the plans of `target`; check_libraries refused a library that could be here and is not."""
    if LIBRARIES[target.kind].builds_without_gpu:
        return True
    return installed_version(target.kind) is not None and gpu_here(target.compute_capabilities)


def _scalar_digest(folder: Path, component: str) -> str:
    """A hash of a component's scalar scales, which decide whether its fusion groups can be one."""
    scalars = [bytes(ref.bytes_view()).hex() for ref in weights_tensors(folder, component).values() if ref.shape == ()]
    return key_of(scalars)


def run_visual_gen(
    cache: StageCache,
    target: Target,
    recipe: Recipe,
    source: Source,
    weights: dict[str, Path],
    step_cache: format.StepCache | None,
) -> Path:
    """The files of the visual_gen folder that are its own, links.json (path to the bundle's file), and target.json."""
    plan = source.stored_plan("transformer")
    config = source.checkpoint.components["transformer"].config
    is_bf16 = all(entry.format == "bf16" for entry in source.plans.get("text_encoder", []))
    linked = _linked_files(source, weights, is_bf16)
    inputs: list[Any] = [
        [cache.file_digest(file.resolve()) for file in weights_files(weights["transformer"], "transformer")],
        [[entry.layer.name, entry.format] for entry in plan],
        [config, linked, is_bf16, msgspec.to_builtins([target, recipe.sizes, recipe.text.length, step_cache])],
        []
        if is_bf16
        else [cache.file_digest(file) for file in source.checkpoint.components["text_encoder"].weight_files],
        recipe.step_cache.min_r2 if recipe.step_cache else None,
    ]

    def work(folder: Path, report: Report) -> None:
        tensors = weights_tensors(weights["transformer"], "transformer")
        written = visual_gen.write_folder(folder, recipe, config, plan, tensors, linked, step_cache, report)
        if not is_bf16:
            from fluxc.quantize.writer import write_weights

            encoder = folder / visual_gen.FOLDER / "text_encoder"
            encoder.mkdir()
            write_weights(encoder / WEIGHTS_FILE["text_encoder"], kept_tensors(source, "text_encoder"), [], {})
            settings = text_encoder_config(source.checkpoint.components["text_encoder"].config, source.text_layers_kept)
            (encoder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (folder / "links.json").write_text(json.dumps(written.links))
        configs = {str(number): file for number, file in written.configs.items()}
        served = format.VisualGen(visual_gen.FOLDER, visual_gen.SCHEMA, configs, recipe.text.length)
        entry = format.Target(target.name, target.kind, "nvfp4", {}, device="cuda", visual_gen=served)
        (folder / "target.json").write_bytes(msgspec.json.encode(entry, order="deterministic"))

    return cache.run(f"target-{target.name}", f"build {target.name}", inputs, work)


def _linked_files(source: Source, weights: dict[str, Path], with_text_encoder: bool) -> list[str]:
    """The files of a bundle, by path, that VisualGen reads as they are."""
    files = ["model_index.json"]
    for name, component in source.checkpoint.components.items():
        if name == "transformer" or (name == "text_encoder" and not with_text_encoder):
            continue
        files += [f"{name}/{file.name}" for file in small_files(component) if file.name != HF_QUANT_CONFIG]
        if name in weights:
            entry = weights_entry(weights[name], name)
            files += [f"{name}/{file.name}" for file in weights_files(weights[name], name)]
            files += [f"{name}/{entry}"] if entry.endswith(INDEX) else []
    return list(dict.fromkeys(files))
