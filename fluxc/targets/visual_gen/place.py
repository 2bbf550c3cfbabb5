"""Puts the folder for VisualGen into the bundle in the making, and holds it against what VisualGen loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from fluxc.base.errors import BuildError
from fluxc.targets.parts import link_or_copy
from fluxc.targets.visual_gen.check import faults_of
from fluxc.targets.visual_gen.stage import LINKS
from fluxrt.manifest import VisualGenTarget


def place_folder(entry: VisualGenTarget, folder: Path, staging: Path) -> None:
    """Put the folder of the stage's result into the bundle at `staging`, with links to the bundle's own files.

    Raises BuildError for one that VisualGen would not take.
    """
    for file in sorted(path for path in (folder / entry.folder).rglob("*") if path.is_file()):
        target = staging / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of weights one copy on the disk is enough; the others are small, and may be edited.
        (link_or_copy if file.suffix == ".safetensors" else shutil.copyfile)(file, target)
    for name, file in json.loads((folder / LINKS).read_text()).items():
        link = staging / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(staging / file, link.parent))
    faults = faults_of(staging / entry.folder, entry.text_length)
    if faults:
        raise BuildError(
            f"target {entry.name}: TensorRT-LLM would not take the folder: {'; '.join(faults[:4])}"
            f"{' and more' if len(faults) > 4 else ''}. No bundle was written"
        )
