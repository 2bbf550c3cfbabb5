"""What `plan`, `inspect` and `doctor` print."""

from __future__ import annotations

import platform
import re
from importlib import metadata

from rich.console import Console
from rich.table import Table

from fluxc.components import WEIGHTS_FILE
from fluxc.quantize.plan import LayerPlan, summary_by_format
from fluxc.recipe import LoadedRecipe
from fluxc.stages import Source, kept_tensors, read_source
from fluxrt.bundle import Bundle


def print_plan(loaded: LoadedRecipe, every_layer: bool) -> None:
    """The precision of every layer with the rule that decided it, sizes before and after, what each target will do."""
    source = read_source(loaded)
    console = _console()
    recipe = loaded.recipe
    console.print(f"{recipe.name}: {source.checkpoint.pipeline_class} from {recipe.model.source}")
    for component, plan in source.plans.items():
        if every_layer:
            console.print(_layer_table(component, plan))
        console.print(_format_table(component, plan))
    console.print(_component_table(source))
    table = Table("target", "what it will do", title="targets", title_justify="left")
    for target in recipe.targets:
        weights = f"NVFP4 weights {target.weights_in_memory} in memory; matrix products in fp32"
        inputs = (
            "activations in full precision"
            if target.activations == "none"
            else "inputs of quantized layers rounded as an FP4 GPU rounds them (block scales from input_scale)"
        )
        table.add_row(target.name, f"ONNX Runtime on the CPU; {weights}; {inputs}; built and run on this machine")
    console.print(table)
    sizes = ", ".join(f"{height}x{width}" for height, width in recipe.sizes)
    branches = "two passes a step (guidance)" if source.guidance_branches else "one pass a step"
    console.print(f"sizes {sizes}; text {recipe.text.length} tokens; {recipe.sampling.steps} steps; {branches}")


def print_bundle(bundle: Bundle) -> None:
    """The manifest in words: what was compiled, formats, targets, fidelity, sizes."""
    manifest = bundle.manifest
    console = _console()
    console.print(f"{manifest.name}: {manifest.family}, bundle format {manifest.format_version}")
    console.print(f"from {manifest.provenance.source}, built {manifest.provenance.built_at}")
    console.print(f"digest {manifest.digest}")
    sampling = manifest.sampling
    sizes = ", ".join(f"{height}x{width}" for height, width in sampling.sizes)
    console.print(
        f"sizes {sizes}; text {manifest.prompting.length} tokens; {sampling.steps} steps; guidance {sampling.guidance}"
    )
    table = Table(
        "component", "format", "layers", "bytes before", "bytes after", title="precision", title_justify="left"
    )
    totals: dict[tuple[str, str], list[int]] = {}
    for layer in manifest.precision:
        row = totals.setdefault((layer.component, layer.format), [0, 0, 0])
        for at, value in enumerate((1, layer.bytes_before, layer.bytes_after)):
            row[at] += value
    for (component, format), (layers, before, after) in totals.items():
        table.add_row(component, format, str(layers), f"{before:,}", f"{after:,}")
    console.print(table)
    table = Table(
        "target", "velocity cosine", "picture PSNR, mean", "worst", "SSIM", title="fidelity", title_justify="left"
    )
    for target in manifest.targets:
        figures = manifest.fidelity.get("targets", {}).get(target.name, {})
        keys = ("step_cosine", "image_psnr_db", "image_psnr_db_worst", "image_ssim")
        table.add_row(target.name, *(str(figures.get(key, "")) for key in keys))
    console.print(table)
    size = sum(file.size for file in manifest.files.values())
    tools = ", ".join(f"{name} {version}" for name, version in manifest.provenance.tools.items())
    console.print(f"{len(manifest.files)} files, {size:,} bytes; built with {tools}")


def print_doctor() -> None:
    """What this machine can build and run, and what to install for what it cannot."""
    console = _console()
    console.print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    needs = {
        "compile": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors"),
        "run onnxruntime targets": ("onnxruntime", "tokenizers", "numpy", "pillow"),
    }
    table = Table("what", "ready", "with")
    for purpose, packages in needs.items():
        found = {name: _version(name) for name in packages}
        missing = [name for name, version in found.items() if version is None]
        ready = "no" if missing else "yes"
        detail = f"missing: {', '.join(missing)}; pip install fluxc" if missing else _listed(found)
        table.add_row(purpose, ready, detail)
    import onnxruntime
    import torch

    providers = ", ".join(onnxruntime.get_available_providers())
    table.add_row("ONNX Runtime providers", "", providers)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        table.add_row("GPU", "yes", f"{torch.cuda.get_device_name()}, SM{major}{minor}; calibration stays on the CPU")
    else:
        table.add_row("GPU", "no", "not needed: calibration, compiling and the onnxruntime target use the CPU")
    console.print(table)


def _layer_table(component: str, plan: list[LayerPlan]) -> Table:
    """Layers of the same kind, format and rule in one row, with their block numbers as ranges."""
    table = Table(
        "layer",
        "out x in",
        "format",
        "decided by",
        "bytes before",
        "bytes after",
        title=component,
        title_justify="left",
    )
    rows: dict[tuple[str, str, str, str], list[LayerPlan]] = {}
    for entry in plan:
        kind = re.sub(r"\.\d+\.", ".{}.", entry.layer.name, count=1)
        shape = f"{entry.layer.out_features} x {entry.layer.in_features}"
        rows.setdefault((kind, shape, entry.format, entry.rule), []).append(entry)
    for (kind, shape, format, rule), entries in rows.items():
        numbers = [int(m[1]) for e in entries if (m := re.search(r"\.(\d+)\.", e.layer.name)) and "{}" in kind]
        name = kind.replace("{}", _ranges(numbers)) if numbers else kind
        before, after = sum(e.source_bytes for e in entries), sum(e.bytes_after for e in entries)
        table.add_row(name, shape, format, rule, f"{before:,}", f"{after:,}")
    return table


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as '0-2,5'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _format_table(component: str, plan: list[LayerPlan]) -> Table:
    table = Table(
        "format",
        "layers",
        "parameters",
        "share",
        "bytes before",
        "bytes after",
        title=f"{component} Linears",
        title_justify="left",
    )
    total = sum(entry.parameters for entry in plan)
    for format, (layers, parameters, before, after) in sorted(summary_by_format(plan).items()):
        table.add_row(format, str(layers), f"{parameters:,}", f"{parameters / total:.2%}", f"{before:,}", f"{after:,}")
    before, after = sum(entry.source_bytes for entry in plan), sum(entry.bytes_after for entry in plan)
    table.add_row("all", str(len(plan)), f"{total:,}", "100%", f"{before:,}", f"{after:,} ({after / before - 1:+.0%})")
    return table


def _component_table(source: Source) -> Table:
    table = Table(
        "component", "bytes in the checkpoint", "bytes in the bundle", title="weights files", title_justify="left"
    )
    for name in WEIGHTS_FILE:
        tensors = source.checkpoint.components[name].tensors
        before = sum(ref.nbytes for ref in tensors.values())
        kept = kept_tensors(source, name)
        planned = {f"{entry.layer.name}.weight": entry for entry in source.plans.get(name, [])}
        after = sum(
            planned[t].bytes_after if t in planned and planned[t].format != "bf16" else tensors[t].nbytes for t in kept
        )
        table.add_row(name, f"{before:,}", f"{after:,}")
    return table


def _console() -> Console:
    """Tables keep their full width when they are not shown on a terminal, so that they can be searched."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
