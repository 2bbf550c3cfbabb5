"""Folders with exactly the files that fluxc reads of a checkpoint, for diffusers and transformers, which pick their own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxc.base.errors import BuildError
from fluxc.checkpoint.components import INDEX, WEIGHTS_FILE, small_files
from fluxc.checkpoint.source import Checkpoint, Component


@contextmanager
def exact_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder of links to the checkpoint's files, its weights under the names that loaders expect, while the body runs."""
    with _scratch() as root:
        (root / "model_index.json").symlink_to(checkpoint.root / "model_index.json")
        for component in checkpoint.components.values():
            _link(component, root / component.name)
        yield root


@contextmanager
def exact_component(component: Component) -> Iterator[Path]:
    """The same of one component."""
    with _scratch() as root:
        _link(component, root / component.name)
        yield root / component.name


@contextmanager
def _scratch() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="fluxc-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BuildError(
            f"no temporary folder can be made ({error.strerror or error}); set TMPDIR to a folder that can be written"
        ) from error
    with folder as name:
        yield Path(name)


def _link(component: Component, folder: Path) -> None:
    folder.mkdir()
    for file in small_files(component):
        (folder / file.name).symlink_to(file)
    if component.file is not None and component.quantization is None:
        # What the folder's config says of quantization is about the weights that the file stands in for.
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(component.config))
    if component.name not in WEIGHTS_FILE:
        return
    expected = WEIGHTS_FILE[component.name]
    weights = component.weights
    if weights.weight_map is None:
        (folder / expected).symlink_to(weights.files[0])
        return
    # Shards get names of their own: one that is called as a whole file is would be taken for that.
    stem, count = expected.removesuffix(".safetensors"), len(weights.files)
    links = {file.name: f"{stem}-{at:05}-of-{count:05}.safetensors" for at, file in enumerate(weights.files, 1)}
    for file in weights.files:
        (folder / links[file.name]).symlink_to(file)
    index = {"metadata": {}, "weight_map": {tensor: links[file] for tensor, file in weights.weight_map.items()}}
    (folder / f"{expected}{INDEX}").write_text(json.dumps(index))
