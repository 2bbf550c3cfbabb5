"""Places that are written to: errors of the disk are named with the place, and nothing is left half written."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from conftest import RECIPE, RecordingProgress
from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.output import check_output, check_writable, names_place
from fluxc.build.build import build
from fluxc.build.measure import calibrate_to_file
from fluxc.graph import stage as export_stage
from fluxc.recipe.load import load_recipe
from quick import QUICK

BIG = np.random.default_rng(0).integers(0, 256, 1 << 18, np.uint8)


@contextmanager
def small_files(limit: int = 1 << 16) -> Iterator[None]:
    """As on a disk that is full after `limit` bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(BIG.tobytes()),
        lambda path: np.save(path, BIG),
        lambda path: save_file({"big": BIG}, path),
        lambda path: Image.fromarray(BIG.reshape(512, 512)).save(path, "PNG"),
    ],
    ids=["python", "numpy", "safetensors", "pillow"],
)
def test_whatever_writes_a_full_disk_is_one_error_with_its_place(write: Any, tmp_path: Path) -> None:
    place, said = tmp_path / "out", r"^write weights: .*out.*run the command again"
    with pytest.raises(BuildError, match=said), small_files(), names_place("write weights", place):
        write(place)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE])
def test_errors_of_the_place_say_what_to_do(number: int) -> None:
    said = r"^build: /here: [A-Z].*; .* and run the command again$"
    with pytest.raises(BuildError, match=said), names_place("build", Path("/here")):
        raise OSError(number, "words", "/here")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), names_place("build", Path("/here")):
        Path("/none/at/all").read_bytes()
    with pytest.raises(BuildError, match=r"^the checkpoint"), names_place("build", Path("/here")):
        raise BuildError("the checkpoint is damaged")


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "there")
    check_output(tmp_path / "not" / "there", "a bundle", is_folder=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BuildError, match=r"cannot write: .*File too large"), small_files(1 << 10):
        check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    loaded = load_recipe(RECIPE, ("model.source=./none",))
    monkeypatch.setenv("FLUXC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RecipeError, match=r"file: is not a folder"):
        build(loaded, tmp_path / "out", RecordingProgress())
    (tmp_path / ".fluxc").write_text("")
    with pytest.raises(RecipeError, match=r"\.fluxc: is not a folder"):
        calibrate_to_file(loaded, tmp_path / "out", "cpu", RecordingProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fluxc", "file"]


def test_a_disk_that_fills_up_in_a_stage_ends_the_build_with_its_place(
    own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(inputs: Any, folder: Path, report: Any) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    run.__module__ = export_stage.__name__
    monkeypatch.setattr(export_stage, "run", run)
    with pytest.raises(BuildError, match=r"^trace vae: .*\.fluxc: No space left on device; free some space"):
        build(load_recipe(RECIPE, QUICK), tmp_path / "out", RecordingProgress())
    assert [path.name for path in tmp_path.iterdir()] == [".fluxc"]
    assert list(tmp_path.rglob("half")) == []
