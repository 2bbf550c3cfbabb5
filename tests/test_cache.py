"""The stage cache: keys hold all that a stage reads and runs, results are shared and kept, refusals come before work."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from safetensors.torch import load_file, save_file

from conftest import RECIPE, RecordingProgress, compile_into, copy_checkpoint
from fluxc.base import imports
from fluxc.base.cache import KEEP_BYTES, LOCKS, Made, StageCache, UnknownDigestError
from fluxc.base.errors import BuildError, CheckpointError, RecipeError
from fluxc.base.imports import closure, code_digest
from fluxc.build.job import hash_checkpoint, open_job
from fluxc.build.runner import Stage, fingerprint
from fluxc.build.runner import run as run_stage
from fluxc.build.stages import exports
from fluxc.checkpoint.files import ComponentFiles
from fluxc.models.qwen3 import Qwen3
from fluxc.quantize.source import read_source
from fluxc.recipe.load import load_recipe
from fluxc.targets.base import TargetContext
from fluxc.targets.onnxruntime.kind import OnnxRuntime
from fluxc.targets.parts import Weights
from quick import QUICK

STAGES = (
    "fluxc.calibrate.costs_stage",
    "fluxc.calibrate.modelopt_stage",
    "fluxc.calibrate.sensitivity_stage",
    "fluxc.calibrate.stage",
    "fluxc.calibrate.tuning_stage",
    "fluxc.calibrate.weights_stage",
    "fluxc.checkpoint.template_stage",
    "fluxc.fidelity.reference_stage",
    "fluxc.fidelity.stage",
    "fluxc.graph.stage",
    "fluxc.stepcache.fit_stage",
    "fluxc.stepcache.frontier_stages",
    "fluxc.stepcache.skips_stage",
    "fluxc.stepcache.trace_stage",
    "fluxc.targets.onnxruntime.stage",
    "fluxc.targets.tensorrt.stage",
    "fluxc.targets.visual_gen.stage",
)


def digest(path: Path) -> str:
    return path.read_bytes().hex() if path.is_file() else "none"


def test_a_sharded_target_depends_on_whether_a_size_needs_padding(quick_bundle: Path) -> None:
    """64x64 is 64 tokens, for two ranks 32 each; 56x56 is 49, so one rank holds a token of padding."""
    targets = "targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 2}]"
    keys = []
    for sizes in ("[[64, 64]]", "[[64, 64], [32, 32]]", "[[64, 64], [56, 56]]"):
        loaded = load_recipe(RECIPE, (*QUICK, targets, f"sizes={sizes}"))
        context = TargetContext(loaded.recipe, read_source(loaded))
        weights = {name: Weights(name, quick_bundle / name) for name in ("transformer", "text_encoder", "vae")}
        graphs = dict.fromkeys(weights, Made(Path("graphs")))
        work = OnnxRuntime().work(loaded.recipe.targets[1], context, graphs, weights, None)
        keys.append(fingerprint(work.inputs, digest))
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


@pytest.mark.usefixtures("quick_bundle")
def test_a_vae_tensor_of_another_shape_is_refused_whatever_the_cache_holds(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"].repeat(2)
    save_file(tensors, file)
    progress = RecordingProgress()
    with pytest.raises(CheckpointError, match=r"vae: .*decoder\.conv_out\.bias is \[6\], expected \[3\]"):
        compile_into(tmp_path / "out", *QUICK, f"model.source={checkpoint}", progress=progress)
    assert progress.ran == []


def made(cache: StageCache, name: str, content: str = "x") -> Path:
    def work(folder: Path, report: object) -> None:
        (folder / "file").write_text(content)

    return cache.run(cache.folder(name, name, "fluxc.graph.stage"), name, work)


def test_pruning_drops_nothing_that_a_bundle_was_built_from(tmp_path: Path) -> None:
    for number in range(6):
        bundle = tmp_path / f"bundle-{number}"
        bundle.mkdir()
        with StageCache(tmp_path / ".fluxc", RecordingProgress()) as cache:
            made(cache, f"calibration-of-{number}")
            cache.remember(str(bundle))
            cache.prune(keep_bytes=0)
    kept = {path.name.rpartition("-")[0] for path in (tmp_path / ".fluxc").glob("calibration-*")}
    assert kept == {f"calibration-of-{number}" for number in range(6)}


def test_pruning_keeps_all_that_this_build_used_and_says_what_it_dropped(tmp_path: Path) -> None:
    with StageCache(tmp_path, RecordingProgress()) as cache:
        made(cache, "old", "x" * 1000)
        made(cache, "older", "x" * 1000)
    progress = RecordingProgress()
    with StageCache(tmp_path, progress) as cache:
        used = [made(cache, f"frontier-{number}") for number in range(12)]
        cache.prune(keep_bytes=KEEP_BYTES)
        assert len(list(tmp_path.glob("old*"))) == 2
        cache.prune(keep_bytes=0)
    assert all(path.is_dir() for path in used)
    assert list(tmp_path.glob("old*")) == []
    assert len(progress.said) == 1
    assert "removed 2 results" in progress.said[0]
    assert "old, older" in progress.said[0]


def test_pruning_leaves_what_another_build_is_using(tmp_path: Path) -> None:
    with StageCache(tmp_path, RecordingProgress()) as other, StageCache(tmp_path, RecordingProgress()) as cache:
        used = made(other, "calibration")
        cache.prune(keep_bytes=0)
        assert used.is_dir()
    with StageCache(tmp_path, RecordingProgress()) as cache:
        cache.prune(keep_bytes=0)
    assert not used.exists()


def test_two_builds_make_a_result_once(tmp_path: Path) -> None:
    began, times = threading.Event(), []

    def work(folder: Path, report: object) -> None:
        began.set()
        times.append(time.monotonic())
        time.sleep(0.3)
        (folder / "file").write_text("made")

    def build() -> None:
        with StageCache(tmp_path, RecordingProgress()) as cache:
            folder = cache.run(cache.folder("stage", 1, "fluxc.graph.stage"), "stage", work)
            assert (folder / "file").read_text() == "made"

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")] == []
    assert (tmp_path / LOCKS).is_dir()


@pytest.fixture
def hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StageCache, list[str]]:
    """A cache, and the files it reads to hash them."""
    hashed, digest_of = [], hashlib.file_digest

    def recorded(file: BinaryIO, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return digest_of(file, name)

    monkeypatch.setattr(hashlib, "file_digest", recorded)
    return StageCache(tmp_path / "cache", RecordingProgress()), hashed


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("way", ["written in place", "put in its place"])
def test_a_file_of_the_same_name_size_and_time_is_hashed_again(
    tmp_path: Path, hashing: tuple[StageCache, list[str]], way: str
) -> None:
    """As `cp -p` leaves it, which keeps the time and, of an existing file, the inode."""
    cache, hashed = hashing
    path, other = tmp_path / "weights", tmp_path / "other"
    path.write_bytes(b"one")
    before = path.stat()
    assert [cache.file_digest(path) for _ in range(3)] == [sha256(b"one")] * 3
    assert hashed == ["weights"]
    if way == "written in place":
        path.write_bytes(b"two")
    else:
        other.write_bytes(b"two")
        other.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert cache.file_digest(path) == sha256(b"two")


def test_weights_changed_under_the_same_size_and_time_are_another_checkpoint(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    digests = []
    for _ in range(2):
        job = open_job(load_recipe(RECIPE, (*QUICK, f"model.source={checkpoint}")), tmp_path / "cache")
        with StageCache(job.root, RecordingProgress()) as cache:
            hash_checkpoint(cache, job)
        assert job.digests is not None
        digests.append(job.digests["vae"][file.name])
        content, stat = bytearray(file.read_bytes()), file.stat()
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests[0] != digests[1]


def test_the_hash_of_a_file_is_known_after_links_to_it_come_and_go(
    tmp_path: Path, hashing: tuple[StageCache, list[str]]
) -> None:
    cache, hashed = hashing
    path, link = tmp_path / "weights", tmp_path / "link"
    path.write_bytes(b"one")
    expected = cache.file_digest(path)
    with cache.relinking([path]):
        link.hardlink_to(path)
    assert cache.known_digest(link) == expected
    with cache.relinking([link]):
        path.unlink()
    assert cache.known_digest(link) == expected
    assert hashed == ["weights"]
    with cache.relinking([link]):
        stat = link.stat()
        link.write_bytes(b"two")
        os.utime(link, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cache.file_digest(link) == sha256(b"two")


def test_a_file_whose_next_change_might_leave_no_trace_is_hashed_every_time(
    tmp_path: Path, hashing: tuple[StageCache, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock went back an hour, or belongs to a server that is ahead."""
    cache, hashed = hashing
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() - 3600 * 10**9)
    assert [cache.file_digest(path) for _ in range(2)] == [sha256(b"one")] * 2
    assert hashed == ["weights", "weights"]
    with pytest.raises(UnknownDigestError):
        cache.known_digest(path)


@pytest.mark.parametrize("times", [1, 9])
def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    cache, path = StageCache(tmp_path / "cache", RecordingProgress()), tmp_path / "weights"
    path.write_bytes(b"a")
    left, digest_of = list(range(times)), hashlib.file_digest

    def disturbed(file: BinaryIO, name: str) -> Any:
        found = digest_of(file, name)
        if left:
            left.pop()
            path.write_bytes(path.read_bytes() + b"a")
        return found

    monkeypatch.setattr(hashlib, "file_digest", disturbed)
    if times == 1:
        assert cache.file_digest(path) == sha256(b"aa")
    else:
        with pytest.raises(BuildError, match="weights: it changes while it is read"):
            cache.file_digest(path)


def test_a_note_that_was_cut_short_is_no_hash(tmp_path: Path) -> None:
    cache, path = StageCache(tmp_path / "cache", RecordingProgress()), tmp_path / "weights"
    path.write_bytes(b"one")
    cache.file_digest(path)
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text("")
    assert cache.file_digest(path) == sha256(b"one")


@dataclass(frozen=True)
class Reading:
    """Inputs of a stage that reads files."""

    given: Path
    files: ComponentFiles


@pytest.mark.parametrize("name", ["given", "weights"])
def test_a_stage_whose_files_changed_while_it_ran_has_no_result(tmp_path: Path, name: str) -> None:
    """Its key names the files as they were; the next build would take the result for one of those."""
    for file in ("given", "weights"):
        (tmp_path / file).write_text("before")

    def work(inputs: Reading, folder: Path, report: object) -> None:
        (folder / "result").write_text((tmp_path / name).read_text())
        (tmp_path / name).write_text("after")

    work.__module__ = "fluxc.graph.stage"
    with StageCache(tmp_path / "cache", RecordingProgress()) as cache:
        digests = {tmp_path / "weights": cache.file_digest(tmp_path / "weights")}
        stage = Stage(
            "stage", "read files", Reading(tmp_path / "given", ComponentFiles(digests)), work, lambda path: path
        )
        with pytest.raises(BuildError, match=rf"{name}: it changed while the build read it \(read files\)"):
            run_stage(cache, stage)
        assert list((tmp_path / "cache").glob("stage-*")) == []


def test_an_export_depends_on_which_text_layers_are_taken_and_on_the_encoders_class() -> None:
    loaded = load_recipe(RECIPE, (*QUICK, "targets=[{kind: tensorrt_rtx}]"))
    inputs = exports(open_job(loaded, Path("unused")))["export-text_encoder-bfloat16"]
    assert inputs.family is not None

    class Other(Qwen3, frozen=True):
        class_name = "Qwen2ForCausalLM"

    others = [
        replace(inputs, family=replace(inputs.family, text_layers=(9, 18))),
        replace(inputs, family=replace(inputs.family, text_encoder=Other)),
    ]
    assert len({json.dumps(fingerprint(each, digest)) for each in (inputs, *others)}) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_runs_the_command_line_or_the_list_of_stages(stage: str) -> None:
    """So a changed help text, or a stage added to the list, throws no result away."""
    code = closure(stage)
    assert not [name for name in code if name.startswith(("fluxc.cli", "fluxc.build", "fluxrt.cli"))]


def test_a_stage_depends_on_the_code_it_runs_and_on_no_other() -> None:
    calibration = closure("fluxc.calibrate.stage")
    assert {"fluxc.calibrate.run", "fluxc.calibrate.observe", "fluxc.running.placement"} <= set(calibration)
    assert not [name for name in calibration if name.startswith(("fluxc.targets", "fluxc.stepcache", "fluxc.fidelity"))]
    assert "fluxc.targets.tensorrt.audit" in closure("fluxc.targets.tensorrt.stage")
    assert "fluxc.targets.tensorrt.audit" not in closure("fluxc.targets.onnxruntime.stage")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose imports are read as fluxc's own are."""
    folder = tmp_path / "imported_here"
    folder.mkdir()
    files = {
        "__init__": "",
        "stage": "def run():\n    from imported_here import helper\n",
        "helper": "import imported_here.deep\n",
        "deep": "x = 1\n",
        "typed": "",
        "other": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import imported_here.typed\n",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "PACKAGES", ("imported_here",))
    forget()
    yield folder
    forget()


def forget() -> None:
    for function in (imports.code_digest, imports.closure, imports.imports_of, imports._file):
        function.cache_clear()


def test_the_closure_follows_imports_in_functions_and_not_those_for_type_checkers(package: Path) -> None:
    assert closure("imported_here.stage") == tuple(
        f"imported_here{name}" for name in ("", ".deep", ".helper", ".stage")
    )
    assert closure("imported_here.other") == ("imported_here", "imported_here.other")


def test_a_change_in_an_imported_module_changes_the_digest_and_one_elsewhere_does_not(package: Path) -> None:
    before = code_digest("imported_here.stage")
    (package / "typed.py").write_text("y = 2\n")
    forget()
    assert code_digest("imported_here.stage") == before
    (package / "deep.py").write_text("x = 2\n")
    forget()
    assert code_digest("imported_here.stage") != before


TRACED = ("sampling.steps=12", "step_cache={prompts: prompts/flux2-nano-calibration.txt}")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("text.length=4",), r"calibration\.prompts: the prompt .*text\.length is 4"),
        (("fidelity.prompts=missing.txt",), r"fidelity\.prompts: cannot read"),
        (("step_cache={skip: 2}", "sampling.steps=12"), r"calibration\.prompts: 2 prompts are too few"),
        (("fidelity.lpips=missing.pth", *TRACED), r"fidelity\.lpips: there is no file"),
        (("fidelity.image_text=empty", *TRACED), r"fidelity\.image_text: there is no folder"),
        (("fidelity.lpips=missing.pth",), r"fidelity\.lpips: there is no step_cache in this recipe"),
        (("fidelity.prompts=../tests",), r"fidelity\.prompts: .* is not a file"),
        ((f"fidelity.seed={(1 << 64) - 1}",), r"fidelity\.seed: 2 prompts start from"),
        (("targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 3}]",), r"targets\[1\]\.gpus: among 3 GPUs"),
    ],
)
def test_what_the_recipe_gets_wrong_is_refused_before_the_first_stage(
    tmp_path: Path, changes: tuple[str, ...], says: str
) -> None:
    progress = RecordingProgress()
    with pytest.raises(RecipeError, match=says):
        compile_into(tmp_path / "out", *QUICK, *changes, progress=progress)
    assert progress.ran == []
    assert list(tmp_path.iterdir()) == []
