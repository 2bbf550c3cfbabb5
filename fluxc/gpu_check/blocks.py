"""One block of each kind at the widths of published models, random weights: TensorRT beside torch in bf16 and torch.compile."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np

from fluxc.base.numbers import significant
from fluxc.gpu_check.child import Found
from fluxc.gpu_check.copies import profiled
from fluxc.gpu_check.place import builder_for
from fluxc.gpu_check.plan_runner import COPY_BYTES, copy_rate, running, timed
from fluxc.gpu_check.subject import Amount, Subject
from fluxc.models.published import KLEIN_4B, MODELS
from fluxrt import manifest as format
from fluxrt.bundle import Bundle, sha256_file
from fluxrt.sharding import sizes_of

PRESET = "modelopt-flux2"
SHAPES: dict[str, dict[str, Any]] = {
    **MODELS,
    "tiny": {**KLEIN_4B, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 256},
}
KINDS = ("double", "single")


class _Folder(Bundle):
    """Graphs and plans in a folder that is no bundle, for a library that looks them up in one."""

    def __init__(self, root: Path, files: dict[str, format.File]) -> None:
        super().__init__(root, cast(format.Manifest, SimpleNamespace(files=files)))


def check_block_plans(subject: Subject) -> Found:
    """Milliseconds of a double and a single block in the smallest format this GPU multiplies in; settings: `model`,
    `capability`, `format`."""
    from fluxc.targets.tensorrt.builder import PlanRequest

    model, capability = subject.settings["model"], subject.settings["capability"]
    chosen = subject.settings["format"]
    library = None if subject.place.is_rehearsal else builder_for(capability)
    if library is None and not subject.place.is_rehearsal:
        return Found(skipped=f"no TensorRT library that builds for compute capability {capability} is installed")
    amount = subject.amount
    with tempfile.TemporaryDirectory(prefix="fluxc-blocks-") as scratch:
        folder = Path(scratch)
        plans, sizes = _cut(SHAPES[model], amount, chosen, Path(subject.cache))
        entries, audits, files = {}, {}, {}
        for name in KINDS:
            plan = plans[name]
            source, built = folder / plan.entry.source, folder / f"{name}.plan"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_bytes(plan.model.SerializeToString(deterministic=True))
            request = PlanRequest(name, plan.model, (capability,), plan.profiles)
            audits[name] = subject.place.build(request, plan.expected, built)
            entries[name] = msgspec.structs.replace(plan.entry, file=built.name)
            for path in (source, built):
                files[path.relative_to(folder).as_posix()] = format.File(path.stat().st_size, sha256_file(path))
        kind = library.kind if library else "tensorrt_rtx"
        engine = format.Engine(kind, "0", (capability,), entries, {})
        target = format.struct_of(kind, format.TensorRTTarget)(kind, engine)
        driver = subject.place.driver()
        module = subject.place.library(_Folder(folder, files), target, driver)
        rate = copy_rate(driver, amount.runs, COPY_BYTES if library else 1 << 20)
        figures: dict[str, Any] = {
            "format": chosen,
            "copy_bytes_per_s": rate,
            "tokens": amount.tokens,
            "text_tokens": amount.text_tokens,
        }
        faults = []
        for name, entry in entries.items():
            with running(driver, module, name, entry, (folder / str(entry.file)).read_bytes(), sizes) as runner:
                figures[name] = timed(driver, runner, amount.runs)
                kernels = runner.kernels()
            copied = int(audits[name].get("copied_bytes", 0))
            figures[name] |= {"gemms": audits[name].get("gemms", {}), "copied_bytes": copied}
            figures[name]["copies_at_least_ms"] = significant(1e3 * copied / rate)
            figures[name] |= profiled(kernels, (folder / str(entry.file)).read_bytes(), plans[name].expected)
            faults += [f"{name}: {fault['text']}" for fault in audits[name].get("faults", ())]
        driver.close()
    return Found(figures, faults)


def check_block_torch(subject: Subject) -> Found:
    """Milliseconds of the same blocks by diffusers in bf16, eager and with torch.compile; settings: `model`."""
    if importlib.util.find_spec("torch") is None:
        return Found(skipped="torch is not installed")
    import torch

    rehearsal = subject.place.is_rehearsal
    if not rehearsal and not torch.cuda.is_available():
        return Found(
            skipped=f"torch {torch.__version__} has no CUDA here; install the one that has this driver's (pytorch.org)"
        )
    device = "cpu" if rehearsal else "cuda"
    blocks = _torch_blocks(SHAPES[subject.settings["model"]], subject.amount, device)
    figures: dict[str, Any] = {"torch": str(torch.__version__)}
    for name, (block, args, kwargs) in zip(KINDS, blocks, strict=True):
        figures[name] = {"eager_ms": _torch_ms(partial(block, *args, **kwargs), device, subject.amount.runs)}
        # Compiling on a CPU would rehearse another compiler.
        if not rehearsal:
            compiled = torch.compile(block, mode="max-autotune-no-cudagraphs")
            took = _torch_ms(partial(compiled, *args, **kwargs), device, subject.amount.runs)
            figures[name]["compiled_ms"] = took
    return Found(figures)


def _cut(config: dict[str, Any], amount: Amount, chosen: str, cache: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The plans of the transformer's stages, not built, and the sizes they are for."""
    import onnx

    from fluxc.base.cache import StageCache
    from fluxc.base.progress import StageProgress
    from fluxc.base.safetensors import TensorRef
    from fluxc.build import runner
    from fluxc.build.stages import export_of
    from fluxc.graph.stage import ExportInputs
    from fluxc.models.flux2_transformer import Flux2Transformer
    from fluxc.quantize.plan import precision_plan
    from fluxc.quantize.writer import planned_tensors
    from fluxc.recipe.structs import ComponentPrecision
    from fluxc.targets.tensorrt.cut import Component, Cutter

    shape = Flux2Transformer.read(config)
    settings = (
        ComponentPrecision(default=chosen, preset=PRESET) if chosen != "bf16" else ComponentPrecision(default="bf16")
    )
    plan = precision_plan("transformer", shape.linears, settings)
    stored = {
        name: TensorRef(name, "BF16", size, Path(), 0, 2 * int(np.prod(size))) for name, size in shape.tensors.items()
    }
    with StageCache(cache, StageProgress()) as stages:
        folder = runner.run(
            stages, export_of(ExportInputs("transformer", config, amount.text_tokens, dtype="bfloat16"))
        )
        pieces = {path.stem: onnx.load(path) for path in sorted(folder.glob("*.onnx")) if path.stem != "signal"}
    side = int(amount.tokens**0.5)
    sizes = sizes_of(1, (side, side)) | {"tokens": amount.tokens}
    cutter = Cutter([sizes], False, "blocks", "blocks")
    cutter.transformer(
        pieces, Component("transformer", planned_tensors(stored, plan), plan, ""), amount.text_tokens, None
    )
    return dict(cutter.cut.plans), sizes


def _torch_blocks(
    config: dict[str, Any], amount: Amount, device: str
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """A block of each kind with what the model itself gives it."""
    import torch
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        small = {**config, "num_layers": 1, "num_single_layers": 1}
        model = Flux2Transformer2DModel.from_config(small).to(torch.bfloat16).eval()
    given: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def remember(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((block, args, kwargs))

    blocks = (model.transformer_blocks[0], model.single_transformer_blocks[0])
    hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    side = int(amount.tokens**0.5)

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    with torch.no_grad():
        model(
            hidden_states=drawn(1, amount.tokens, config["in_channels"]),
            encoder_hidden_states=drawn(1, amount.text_tokens, config["joint_attention_dim"]),
            timestep=torch.full((1,), 0.7, device=device),
            guidance=torch.full((1,), 4.0, device=device) if config["guidance_embeds"] else None,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 16, side, side)).to(device),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(torch.empty(1, amount.text_tokens, 1)).to(device),
            return_dict=False,
        )
    for hook in hooks:
        hook.remove()
    return given


def _torch_ms(work: Callable[[], Any], device: str, runs: int) -> float:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        for _ in range(3):
            work()
        wait()
        began = time.perf_counter()
        for _ in range(runs):
            work()
        wait()
    return significant(1e3 * (time.perf_counter() - began) / runs)
