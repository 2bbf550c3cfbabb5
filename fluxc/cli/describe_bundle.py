"""What `inspect` and `doctor` print: a bundle, and what a machine can do with it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from fluxc.base.console import new_console, new_table
from fluxc.fidelity.on_target import digest_without_entries, entries_of
from fluxc.gpu_check.evidence import evidence_lines
from fluxc.targets.registry import KINDS
from fluxc.targets.tensorrt.library import LIBRARIES, installed_version
from fluxrt.bundle import Bundle
from fluxrt.choose import Machine, choose, obstacle, this_machine
from fluxrt.errors import BackendError
from fluxrt.manifest import Manifest
from fluxrt.system import DOCKERS_SHM, ENOUGH_SHM, MORE_SHM, check_driver, old_driver


def print_bundle(bundle: Bundle) -> None:
    """The manifest in words: what was compiled, formats, targets, fidelity, sizes."""
    manifest = bundle.manifest
    console = new_console()
    console.print(f"{manifest.name}: {manifest.family}, bundle format {manifest.format_version}")
    console.print(f"from {manifest.provenance.source}, built {manifest.provenance.built_at}")
    console.print(f"digest {manifest.digest}")
    sampling = manifest.sampling
    sizes = ", ".join(f"{height}x{width}" for height, width in sampling.sizes)
    console.print(
        f"sizes {sizes}; text {manifest.prompting.length} tokens; {sampling.steps} steps; guidance {sampling.guidance}"
    )
    table = new_table(
        "component",
        "format",
        "layers",
        "bytes before",
        "bytes after",
        title="precision",
    )
    totals: dict[tuple[str, str], list[int]] = {}
    for layer in manifest.precision:
        row = totals.setdefault((layer.component, layer.format), [0, 0, 0])
        for at, value in enumerate((1, layer.bytes_before, layer.bytes_after)):
            row[at] += value
    for (component, format), (layers, before, after) in totals.items():
        table.add_row(component, format, str(layers), f"{before:,}", f"{after:,}")
    console.print(table)
    table = new_table(
        "target",
        "velocity cosine",
        "image PSNR, mean",
        "worst",
        "SSIM",
        title="fidelity",
    )
    for target in manifest.targets:
        figures = manifest.fidelity.targets.get(target.name, {"step_cosine": "not run"})
        keys = ("step_cosine", "image_psnr_db", "image_psnr_db_worst", "image_ssim")
        if target.name not in manifest.fidelity.ranks:
            table.add_row(target.name, *("" if figures.get(key) is None else str(figures[key]) for key in keys))
    console.print(table)
    for name, ranked in manifest.fidelity.ranks.items():
        console.print(
            f"{name}: {ranked.ranks} processes generate what {ranked.against} generates in one: PSNR "
            f"{ranked.image_psnr_db} dB mean, {ranked.image_psnr_db_worst} dB worst"
        )
    for target in manifest.targets:
        shown = KINDS[target.kind].inspect(target) if target.kind in KINDS else None
        if shown:
            console.print(shown)
    for line in _cache_lines(manifest):
        console.print(line)
    for line in evidence_lines(entries_of(manifest), digest_without_entries(manifest)):
        console.print(line)
    size = sum(file.size for file in manifest.files.values())
    tools = ", ".join(f"{name} {version}" for name, version in manifest.provenance.tools.items())
    console.print(f"{len(manifest.files)} files, {size:,} bytes; built with {tools}")


def _cache_lines(manifest: Manifest) -> Iterator[str]:
    """What there is to say of the step cache."""
    if not manifest.step_cache:
        return
    from fluxc.stepcache.summary import step_cache_lines

    yield from step_cache_lines(manifest.step_cache)
    cached = manifest.fidelity.step_cache
    if cached:
        mean, low, worst = (cached.get(key) for key in ("psnr_db", "psnr_db_p5", "psnr_db_worst"))
        yield f"against every step: PSNR {mean} dB mean, {low} dB 5th percentile, {worst} dB worst"


def print_targets(bundle: Bundle) -> None:
    """Which of a bundle's targets this machine runs, which it would choose, and what stands in the others' way."""
    machine = this_machine()
    obstacles = {target.name: obstacle(bundle, target, machine) for target in bundle.manifest.targets}
    able = [target for target in bundle.manifest.targets if obstacles[target.name] is None and target.gpus == 1]
    chosen = choose(bundle, machine)[0].name if able else None
    table = new_table(
        "target",
        "runs here",
        "why",
        title=f"targets of {bundle.manifest.name}",
    )
    for name, reason in obstacles.items():
        ready = "chosen" if name == chosen else "yes"
        table.add_row(name, "no" if reason else ready, reason or "")
    new_console().print(table)


def print_doctor() -> None:
    """What this machine can build and run, and what to install for what it cannot."""
    console = new_console()
    console.print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    needs: dict[str, tuple[str, ...]] = {
        "compile": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors"),
        "run onnxruntime targets": ("onnxruntime", "tokenizers", "numpy", "pillow"),
    }
    table = new_table("what", "ready", "with")
    for row in system_rows(this_machine()):
        table.add_row(*row)
    for purpose, packages in needs.items():
        found = {name: _version(name) for name in packages}
        missing = [name for name, version in found.items() if version is None]
        ready = "no" if missing else "yes"
        detail = f"missing: {', '.join(missing)}; pip install fluxc" if missing else _listed(found)
        table.add_row(purpose, ready, detail)
    for library in LIBRARIES.values():
        version = installed_version(library.kind)
        builds = "builds plans without a GPU" if library.builds_without_gpu else "builds plans on the GPU they are for"
        how = version or f"not installed; pip install 'fluxc[{library.extra}]'"
        table.add_row(f"build {library.kind} targets", "yes" if version else "no", f"{builds}; {how}")
    import onnxruntime
    import torch

    from fluxc.formats.kernel_cache import kernel_folder

    folder, notice = kernel_folder()
    table.add_row("compiled kernels", "yes" if folder else "no", notice or f"kept in {folder}")
    providers = ", ".join(onnxruntime.get_available_providers())
    table.add_row("ONNX Runtime providers", "", providers)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        table.add_row("GPU", "yes", f"{torch.cuda.get_device_name()}, SM{major}{minor}; calibration runs on it")
    else:
        table.add_row("GPU", "no", "not needed: calibration, compiling and the onnxruntime target use the CPU")
    console.print(table)


def system_rows(machine: Machine) -> list[tuple[str, str, str]]:
    """What the system gives GPU targets (what, ready, with): the driver, and of several GPUs, how they reach each other."""
    wrong = old_driver(machine.driver)
    if machine.gpu is None:
        return [("NVIDIA driver", "no", wrong)] if wrong else []
    try:
        check_driver(machine.gpu)
    except BackendError as error:
        rows = [("NVIDIA driver", "no", str(error))]
    else:
        rows = [("NVIDIA driver", "yes", f"{machine.driver or 'version unknown'}, CUDA {machine.gpu.driver}")]
    if machine.gpus == 1:
        return rows
    if not machine.apart:
        return [*rows, ("GPU to GPU", "yes", f"{machine.gpus} GPUs reach each other's memory (P2P)")]
    pairs = ", ".join(f"{a} and {b}" for a, b in machine.apart)
    slow = f"GPUs {pairs} do not reach each other's memory (no P2P): NCCL goes through the host's memory, many times slower"
    rows.append(("GPU to GPU", "slow", slow))
    if machine.shared_memory is not None and machine.shared_memory < ENOUGH_SHM:
        ready = "no" if machine.shared_memory <= DOCKERS_SHM else "perhaps"
        rows.append(("/dev/shm", ready, f"{machine.shared_memory >> 20} MiB, NCCL may need more; {MORE_SHM}"))
    return rows


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
