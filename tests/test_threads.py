"""`--threads` and how threads wait: what is set before a library is loaded, and what a bundle owes to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fluxc.base.cache import ENVIRONMENT
from fluxc.base.threads import HOW_MANY, HOW_TO_WAIT, WAITING, chosen_threads, computing_with, wait_quietly
from fluxc.cli.main import main
from quick import results_of

SHOWN = """\
import os, sys
from fluxc import entry
from fluxc.cli import main
def show(**_):
    import torch, numba
    from fluxc.base.threads import chosen_threads
    print(torch.get_num_threads(), numba.get_num_threads(), chosen_threads(), os.environ["GOMP_SPINCOUNT"])
main.main.commands["verify"].callback = show
entry.main(sys.argv[1:])
"""


def test_a_number_of_threads_reaches_every_library() -> None:
    """torch, numba, and what is given to ONNX Runtime; OpenMP's turns of waiting are set before torch is loaded."""
    kept = {name: value for name, value in os.environ.items() if name not in (*HOW_MANY, *HOW_TO_WAIT)}
    command = [sys.executable, "-c", SHOWN, "verify", "bundle", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=kept)
    assert done.stdout.split() == ["1", "1", "1", WAITING["GOMP_SPINCOUNT"]]


@pytest.mark.parametrize("theirs", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_a_users_own_way_to_wait_is_kept(theirs: dict[str, str]) -> None:
    environment = dict(theirs)
    wait_quietly(environment)
    assert environment == theirs


def test_threads_are_those_of_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    with computing_with(3):
        assert (chosen_threads(), chosen_threads(2), chosen_threads(8)) == (3, 1, 1)
        assert {os.environ[name] for name in HOW_MANY} == {"3"}
    assert chosen_threads() is None
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert "NUMBA_NUM_THREADS" not in os.environ


def test_more_threads_than_cores_are_allowed_and_told() -> None:
    result = CliRunner().invoke(main, ["verify", "none", "--threads", "1024"])
    assert "--threads 1024: " in result.stderr
    assert "none" in result.stderr.splitlines()[-1]


STAGES = """\
import sys
from pathlib import Path
from fluxc.base.threads import computing_with
with computing_with(2):
    sys.path.insert(0, {tests!r})
    from conftest import RECIPE
    from quick import QUICK
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    build(load_recipe(RECIPE, QUICK), Path(sys.argv[1]), StageProgress(), "targets")
"""


def test_weights_and_graphs_do_not_depend_on_threads(quick_bundle: Path, shared_cache: Path, tmp_path: Path) -> None:
    """Nor do the keys of their results. torch's last digits may: the reference that a bundle is compared with has them.

    The bundle is built with one thread, as all of this suite is, and its stages here with two.
    """
    (tmp_path / ".fluxc").mkdir()
    for known in [*shared_cache.glob("export-*"), *shared_cache.glob("template-*")]:
        (tmp_path / ".fluxc" / known.name).symlink_to(known)
    kept = {name: value for name, value in os.environ.items() if name not in (*HOW_MANY, *HOW_TO_WAIT, ENVIRONMENT)}
    code = STAGES.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "bundle")], check=True, timeout=300, env=kept)
    made = [folder for folder in (tmp_path / ".fluxc").glob("[a-z]*-*") if not folder.is_symlink()]
    assert {folder.name.partition("-")[0] for folder in made} == {"calibration", "weights", "target"}
    assert {folder.name for folder in made} <= {folder.name for folder in results_of(shared_cache, quick_bundle)}
    for path in (path for folder in made for path in folder.rglob("*") if path.is_file()):
        assert path.read_bytes() == (shared_cache / path.relative_to(tmp_path / ".fluxc")).read_bytes(), path
