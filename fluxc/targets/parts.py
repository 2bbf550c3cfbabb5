"""What every target is made from: exported graphs, the weights files a build wrote, precision plans."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fluxc.base.cache import Made
from fluxc.base.numbers import check_finite
from fluxc.base.safetensors import TensorRef
from fluxc.checkpoint.components import weights_entry, weights_files, weights_tensors
from fluxrt.manifest import Graph, Target, read_target

if TYPE_CHECKING:
    import onnx

ENTRY = "target.json"
CANNOT_SHARE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)
"""How file systems and kernels say that they do not copy from file to file."""


@dataclass(frozen=True)
class Weights:
    """A component's weights as the weights stage left them in `folder`; a graph depends on where its tensors lie there."""

    component: str
    folder: Path

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """Every tensor by name."""
        return weights_tensors(self.folder, self.component)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in order."""
        return weights_files(self.folder, self.component)

    @property
    def entry(self) -> str:
        """The one file or the index, as the bundle names it."""
        return f"{self.component}/{weights_entry(self.folder, self.component)}"

    def fingerprint(self) -> list[Any]:
        """Names, types and places of the tensors."""
        return [[t.name, t.dtype, list(t.shape), t.file.name, t.offset] for t in self.tensors.values()]


def load_exports(exports: Mapping[str, Made], with_signal: bool) -> dict[str, dict[str, onnx.ModelProto]]:
    """The exported graphs by component and name; the step cache's `signal` only where it is wanted."""
    import onnx

    graphs = {
        name: {file.stem: onnx.load(file) for file in sorted(made.folder.glob("*.onnx"))}
        for name, made in exports.items()
    }
    if not with_signal:
        graphs["transformer"].pop("signal")
    return graphs


@contextmanager
def weights_beside(folder: Path, weights: Mapping[str, Weights]) -> Iterator[None]:
    """The weights files under COMPONENT/ in `folder` while the body runs, where graphs expect them."""
    links = []
    try:
        for name, written in weights.items():
            (folder / name).mkdir(exist_ok=True)
            for file in written.files:
                links.append(folder / name / file.name)
                links[-1].hardlink_to(file.resolve())
        yield
    finally:
        for link in links:
            link.unlink(missing_ok=True)


def write_entry(folder: Path, entry: Target) -> None:
    """Write the target's manifest entry into its result folder."""
    check_finite(msgspec.to_builtins(entry), f"target {entry.name}")
    (folder / ENTRY).write_bytes(msgspec.json.encode(entry, order="deterministic"))


def read_entry(folder: Path) -> Target:
    """The manifest entry of a target's result folder."""
    return read_target(msgspec.json.decode((folder / ENTRY).read_bytes()))


def copy_file(source: Path, target: Path) -> None:
    """A copy of a file, which takes no room of its own where the file system shares what is equal (XFS, Btrfs)."""
    with source.open("rb") as read, target.open("wb") as written:
        left = os.fstat(read.fileno()).st_size
        try:
            while left and (copied := os.copy_file_range(read.fileno(), written.fileno(), left)):
                left -= copied
        except OSError as error:
            if error.errno not in CANNOT_SHARE:
                raise
    if left:
        shutil.copyfile(source, target)


def place_graphs(target: str, graphs: Mapping[str, Graph], folder: Path, staging: Path) -> dict[str, Graph]:
    """`graphs` with their files copied from `folder` into the bundle at `staging`, under the names they have there.

    A file that is the same to the byte as another target's is shared; one that is not gets the name of `target`.
    """

    def placed(file: str) -> str:
        content, there = (folder / file).read_bytes(), file
        if (staging / there).exists() and (staging / there).read_bytes() != content:
            there = f"{file.removesuffix('.onnx')}.{target}.onnx"
        if not (staging / there).exists():
            shutil.copyfile(folder / file, staging / there)
        return there

    return {name: graph.with_files(placed) for name, graph in graphs.items()}


def link_or_copy(source: Path, target: Path) -> None:
    """Another name for a file, or a copy where the file system gives it none."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)
