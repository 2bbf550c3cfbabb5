"""The README.md of a bundle: what it is, how to run it, its figures, and the licence of the model in it.

Everything comes from the manifest and the checkpoint, so equal bundles have equal files. What changes later (plans that
`fluxc finish` builds, what GPUs did) is left to `fluxc inspect`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fluxc.checkpoint.named import PARTS
from fluxc.models.published import MODELS
from fluxc.report.tiers import UNCOMPARED
from fluxc.targets.tensorrt.library import GPUS
from fluxrt.backends.library import PACKAGE
from fluxrt.install import extra_requirements, install_elsewhere
from fluxrt.manifest import Manifest, OnnxRuntimeTarget, Target, TensorRTTarget, VisualGenTarget
from fluxrt.stepprecision import step_words
from fluxrt.visual_gen import how_to_serve_folder

NAME = "README.md"
TEMPLATE = "readme.md.j2"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
LICENCES = {
    "klein-4b": "FLUX.2 [klein] 4B: Apache License 2.0",
    "klein-9b": "FLUX.2 [klein] 9B: FLUX Non-Commercial License",
    "dev": "FLUX.2 [dev]: FLUX Non-Commercial License",
}
"""What Black Forest Labs states for the models it published."""


@dataclass(frozen=True)
class TargetRow:
    """How to run a target: where, what is installed beside fluxrt, and with which options; GPU targets name what they need."""

    name: str
    where: str
    install: str
    options: str


def place_readme(checkpoint: Path, manifest: Manifest, staging: Path) -> None:
    """Write README.md into the bundle being made at `staging`, and the licence files of the folder `checkpoint`.

    `manifest` has its figures and images already; its files are not read.
    """
    copied = _copy_licences(checkpoint, staging)
    licence = f"{_licence(checkpoint, staging)}{_elsewhere(manifest)}"
    (staging / NAME).write_text(_rendered(manifest, licence, copied), encoding="utf-8")


def _rendered(manifest: Manifest, licence: str, licence_files: list[str]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fluxc", "build"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    prompt = manifest.images[0].prompt if manifest.images else "a prompt"
    return environment.get_template(TEMPLATE).render(
        manifest=manifest,
        sampling=manifest.sampling,
        takes_guidance=_takes_guidance(manifest),
        licence=licence,
        licence_files=licence_files,
        targets=[_row(target) for target in manifest.targets],
        install=install_elsewhere("CLONE/runtime"),
        shell_prompt=shlex.quote(prompt),
        python_prompt=json.dumps(prompt),
        weights=_weights(manifest),
        fidelity=_fidelity(manifest),
        steps=[] if isinstance(manifest.step_precision, msgspec.UnsetType) else step_words(manifest.step_precision),
        has_images=manifest.fidelity.level == "images",
        uncompared=UNCOMPARED.get(str(manifest.fidelity.level), ""),
        evidence=manifest.recorded,
        tools=", ".join(f"{name} {version}" for name, version in manifest.provenance.tools.items()),
    )


def _takes_guidance(manifest: Manifest) -> bool:
    """Whether a request's guidance changes the image: as a second row of a batch, or as an input of some target's graphs."""
    graphs = [target for target in manifest.targets if target.parts]
    return manifest.sampling.cfg_batch or not graphs or any(target.reads("guidance") for target in graphs)


def _row(target: Target) -> TargetRow:
    gpus = target.gpus
    options = f"--target {target.name}" if gpus == 1 else f"--gpus {gpus}"
    nccl = extra_requirements("fluxrt", "nccl") if gpus > 1 and target.device == "cuda" else ()
    several = f"{gpus} NVIDIA GPUs, each of" if gpus > 1 else "NVIDIA GPU of"
    if isinstance(target, TensorRTTarget):
        engine = target.engine
        where = ", ".join(f"{c} ({GPUS.get(c, 'unnamed')})" for c in engine.compute_capabilities)
        exact = PACKAGE[engine.library] + (f"=={engine.version}" if engine.version else "")
        packages = install_elsewhere(*extra_requirements("fluxrt", "cuda"), exact, *nccl)
        first = "; plans are built on it first, by `fluxc finish`" if engine.unfinished else ""
        return TargetRow(target.name, f"{several} compute capability {where}{first}", packages, options)
    if isinstance(target, VisualGenTarget):
        serve = how_to_serve_folder(Path(), target, min(map(int, target.configs)))
        return TargetRow(
            target.name, f"TensorRT-LLM VisualGen on {', '.join(target.configs)} GPUs", "TensorRT-LLM", serve
        )
    if isinstance(target, OnnxRuntimeTarget) and target.device == "cuda":
        packages = install_elsewhere(*extra_requirements("fluxrt", "onnxruntime-gpu"), instead=("onnxruntime",))
        return TargetRow(target.name, "NVIDIA GPU of compute capability 9.0 or later", packages, options)
    where = target.hardware or ("CPU" if gpus == 1 else f"CPU, {gpus} processes")
    packages = install_elsewhere(*extra_requirements("fluxrt", target.extra)) if target.extra else ""
    return TargetRow(target.name, where, packages, options)


def _weights(manifest: Manifest) -> list[tuple[str, str, int, str, str]]:
    """Of the Linears: component, format, how many, size in the checkpoint and here."""
    rows: dict[tuple[str, str], list[int]] = {}
    for layer in manifest.precision:
        row = rows.setdefault((layer.component, layer.format), [0, 0, 0])
        for at, value in enumerate((1, layer.bytes_before, layer.bytes_after)):
            row[at] += value
    return [
        (component, format, layers, _size(before), _size(after))
        for (component, format), (layers, before, after) in rows.items()
    ]


def _fidelity(manifest: Manifest) -> list[tuple[str, ...]]:
    """Of each target that the build ran: the figures of the report."""
    keys = ["step_cosine"]
    if manifest.fidelity.level == "images":
        keys += ["image_psnr_db", "image_psnr_db_worst", "image_ssim"]
    return [
        (name, *("" if figures.get(key) is None else str(figures[key]) for key in keys))
        for name, figures in manifest.fidelity.targets.items()
        if name not in manifest.fidelity.ranks
    ]


def _size(bytes: int) -> str:
    for unit, step in (("GiB", 30), ("MiB", 20)):
        if bytes >= 1 << step:
            return f"{bytes / (1 << step):.2f} {unit}"
    return f"{bytes / 1024:.1f} KiB"


def _copy_licences(checkpoint: Path, staging: Path) -> list[str]:
    """Copy the checkpoint's own licence files; their names."""
    files = sorted({file for pattern in LICENCE_FILES for file in checkpoint.glob(pattern) if file.is_file()})
    for file in files:
        shutil.copyfile(file, staging / file.name)
    return [file.name for file in files]


def _licence(checkpoint: Path, staging: Path) -> str:
    """The model's licence: as the checkpoint's model card states it, else as its publisher does for models of its shape."""
    card = _card(checkpoint)
    stated = card.get("license_name") or card.get("license")
    if stated:
        link = f" ({card['license_link']})" if card.get("license_link") else ""
        return f"{stated}{link}, as the checkpoint's own README.md states"
    config: dict[str, Any] = json.loads((staging / "transformer" / "config.json").read_text())
    for name, published in MODELS.items():
        if all(config.get(key) == value for key, value in published.items()):
            return f"{LICENCES[name]}, as its publisher states for the model of this shape; the checkpoint itself names none"
    return "not known: the checkpoint names none. Ask whoever gave it to you"


def _elsewhere(manifest: Manifest) -> str:
    """What of the checkpoint is from elsewhere, and may have a licence of its own."""
    model = manifest.recipe["model"]
    parts = [f"{name.replace('_', ' ')} ({Path(model[name]).name})" for name in PARTS if model.get(name)]
    return f". Taken from elsewhere, where another licence may hold: {', '.join(parts)}" if parts else ""


def _card(checkpoint: Path) -> dict[str, Any]:
    """What the model card says between its first two lines of dashes; nothing, where there is none or it is not a mapping."""
    import yaml

    try:
        _, head, _ = (checkpoint / NAME).read_text(encoding="utf-8").split("---\n", 2)
        card = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return card if isinstance(card, dict) else {}
