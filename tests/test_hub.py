"""Checkpoints by hub id: real huggingface_hub, a local server. What is downloaded, resumed, found in the cache, refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from bfl import transformer_in_bfl, write
from conftest import NANO, RECIPE, ROOT, RecordingProgress, compile_into, copy_checkpoint
from fluxc.base.errors import BuildError, CheckpointError, RecipeError
from fluxc.base.progress import Report, StageProgress
from fluxc.base.safetensors import read_header
from fluxc.checkpoint import fetch as fetch_module
from fluxc.checkpoint.fetch import TITLE, fetch
from fluxc.checkpoint.source import Checkpoint, open_checkpoint
from fluxc.cli.main import main
from fluxrt.bundle import open_bundle
from hub_server import Hub, Repository, served
from quick import QUICK, contents

NAME = "someone/nano"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
WEIGHTS = (TRANSFORMER, ENCODER, VAE)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub-cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub with flux2-nano, and around it what published repositories hold besides."""
    with served(monkeypatch, cache) as hub:
        repository = Repository.of(copy_checkpoint(cache.parent / "published"))
        extra = {
            "flux2-dev.safetensors": b"x" * 5000,
            "ae.safetensors": b"x" * 5000,
            "transformer/diffusion_pytorch_model.fp16.safetensors": b"x" * 5000,
            "transformer/diffusion_pytorch_model.bin": b"x" * 5000,
            "text_encoder/model.onnx": b"x" * 5000,
            "README.md": b"---\nlicense: apache-2.0\n---\n",
            "LICENSE.md": b"a licence",
            "teaser.png": b"x" * 5000,
        }
        repository.commit({**repository.files, **extra})
        hub.repositories[NAME] = repository
        yield hub


def opened(folder: Path, revision: str | None = None, **more: Any) -> Checkpoint:
    return open_checkpoint(NAME, revision, folder, **more)


def fetched(folder: Path, revision: str | None = None) -> Checkpoint:
    fetch(opened(folder, revision).missing, StageProgress())
    return opened(folder, revision)


def told(error: pytest.ExceptionInfo[BaseException]) -> str:
    return " ".join(str(error.value).split())


def plan(*changes: str) -> Result:
    arguments = [argument for change in (*QUICK, f"model.source={NAME}", *changes) for argument in ("--set", change)]
    return CliRunner().invoke(main, ["plan", str(RECIPE), "--no-layers", *arguments])


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_opening_downloads_small_files_and_reads_headers(hub: Hub, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    assert {entry.path for entry in checkpoint.missing} == set(WEIGHTS)
    assert checkpoint.commits == {NAME: hub.repositories[NAME].refs["main"]}
    for file in WEIGHTS:
        component = checkpoint.components[file.partition("/")[0]]
        expected = read_header(NANO / file)
        assert {name: (ref.dtype, ref.shape, ref.offset) for name, ref in component.tensors.items()} == {
            name: (ref.dtype, ref.shape, ref.offset) for name, ref in expected.items()
        }
        assert component.weight_files[0].stat().st_size == (NANO / file).stat().st_size
    assert hub.sent(".safetensors") < sum((NANO / file).stat().st_size for file in WEIGHTS) / 3
    for kept in ("dev.safetensors", "ae.safetensors", "fp16.safetensors", ".bin", ".onnx", ".png"):
        assert hub.sent(kept) == 0


def test_outlines_are_gone_with_the_checkpoint(hub: Hub, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    outline = checkpoint.missing[0].outline
    assert outline.is_file()
    del checkpoint
    assert not outline.exists()


def test_a_fetched_checkpoint_is_the_published_one_and_holds_nothing_else(
    hub: Hub, cache: Path, tmp_path: Path
) -> None:
    checkpoint = fetched(tmp_path)
    assert not checkpoint.missing
    for file in WEIGHTS:
        assert (checkpoint.root / file).read_bytes() == (NANO / file).read_bytes()
    files = {path.relative_to(checkpoint.root).as_posix() for path in checkpoint.root.rglob("*") if path.is_file()}
    expected = {path.relative_to(NANO).as_posix() for path in NANO.glob("*/*") if path.is_file()}
    assert files - {"README.md", "LICENSE.md", "model_index.json"} == {
        name for name in expected if "__pycache__" not in name
    }


def test_a_complete_checkpoint_opens_offline_and_asks_for_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = fetched(tmp_path)
    hub.asked.clear()
    offline(monkeypatch)
    found = opened(tmp_path)
    assert (found.root, found.commits, found.missing) == (online.root, online.commits, ())
    assert hub.asked == []
    pinned = opened(tmp_path, hub.repositories[NAME].refs["main"])
    assert pinned.root == online.root


def test_an_incomplete_one_is_refused_offline_naming_the_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path)
    fetch([entry for entry in checkpoint.missing if entry.path != VAE], StageProgress())
    offline(monkeypatch)
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path)
    assert f"lacks {VAE} of commit" in told(error)
    assert "HF_HUB_OFFLINE is set" in told(error)
    assert TRANSFORMER not in told(error)
    shown = plan()
    assert shown.exit_code == 1
    assert VAE in shown.output


def test_an_unknown_one_is_refused_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"someone/nano: HF_HUB_OFFLINE is set, and the cache .* does not hold it"
    ):
        opened(tmp_path)
    assert hub.asked == []


def test_a_cache_that_another_program_filled_is_refused_offline_where_it_lacks_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fetched(tmp_path).root
    shutil.rmtree(root.parent.parent / "trees")
    shutil.rmtree(root / "tokenizer")
    (root / VAE).unlink()
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    offline(monkeypatch)
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path)
    assert "tokenizer" in told(error)
    (root / "tokenizer").mkdir()
    shutil.copytree(NANO / "tokenizer", root / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"vae: no safetensors weights"):
        opened(tmp_path).components["vae"].tensors  # noqa: B018


def test_without_a_network_the_cache_is_taken(hub: Hub, tmp_path: Path) -> None:
    online = fetched(tmp_path)
    hub.down = True
    assert opened(tmp_path).root == online.root


def test_without_network_and_cache_the_error_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path)
    assert "http://127.0.0.1:9 cannot be reached" in told(error)
    assert "check the network" in told(error)


def test_a_gated_repository_is_explained(hub: Hub, cache: Path, tmp_path: Path) -> None:
    hub.repositories[NAME].gated = True
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path)
    assert f"accept its licence at {hub.url}/{NAME}" in told(error)
    assert "no token is set here" in told(error)
    assert "hf auth login" in told(error)
    assert "HF_TOKEN" in told(error)
    (cache / "token").write_text("hf_some_token")
    with pytest.raises(CheckpointError, match="the token that is used here"):
        opened(tmp_path)
    shown = plan()
    assert shown.exit_code == 1
    assert "is gated" in shown.output


def test_what_is_not_there_is_told_apart(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"someone/else: no such folder here, and no such repository at http"):
        open_checkpoint("someone/else", None, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no branch, tag or commit 'v9'"):
        opened(tmp_path, "v9")
    with pytest.raises(RecipeError, match=r"is no hub id"):
        open_checkpoint("some one/na--me", None, tmp_path)
    assert plan("model.revision=v9").exit_code == 1


def test_a_repository_without_a_pipeline_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["some/lora"] = Repository({}, {})
    hub.repositories["some/lora"].commit({"lora.safetensors": b"x", "README.md": b"y"})
    with pytest.raises(RecipeError, match=r"there is no model_index\.json"):
        open_checkpoint("some/lora", None, tmp_path)


def test_branches_tags_and_commits(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories[NAME]
    first = repository.refs["main"]
    changed = dict(repository.files)
    changed["transformer/config.json"] += b"\n"
    second = repository.commit(changed)
    repository.refs["v1"] = first
    assert opened(tmp_path).commits == {NAME: second}
    assert opened(tmp_path, "v1").commits == {NAME: first}
    assert opened(tmp_path, first).commits == {NAME: first}
    assert (opened(tmp_path, second).root / "transformer" / "config.json").read_bytes().endswith(b"\n")


def test_a_branch_that_moved_is_told_and_one_command_stays_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories[NAME]
    before = repository.refs["main"]
    assert opened(tmp_path).notices == ()
    commits: dict[str, str] = {}
    opened(tmp_path, commits=commits)
    now = repository.commit({**repository.files, "README.md": b"another"})
    assert opened(tmp_path, commits=commits).commits == {NAME: before}
    (notice,) = opened(tmp_path).notices
    assert notice.startswith(f"{NAME}: main is at commit {now} now, and was at {before} the last time")
    assert f"model.revision: {before}" in notice
    assert opened(tmp_path).notices == ()


def test_a_variant_is_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories[NAME]
    files = dict(repository.files)
    files["transformer/diffusion_pytorch_model.fp16.safetensors"] = (NANO / TRANSFORMER).read_bytes()
    repository.commit(files)
    checkpoint = opened(tmp_path, variant="fp16")
    expected = {"transformer/diffusion_pytorch_model.fp16.safetensors", ENCODER, VAE}
    assert {entry.path for entry in checkpoint.missing} == expected
    fetch(checkpoint.missing, StageProgress())
    assert not opened(tmp_path, variant="fp16").missing
    assert hub.sent(TRANSFORMER) == 0
    with pytest.raises(CheckpointError, match=r"no component has weights of the variant 'fp8'"):
        opened(tmp_path, variant="fp8")


def test_shards_are_fetched_by_the_index(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories[NAME]
    files = dict(repository.files)
    del files[ENCODER]
    tensors = load_file(NANO / ENCODER)
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        files[f"text_encoder/{file}"] = (tmp_path / file).read_bytes()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    files["text_encoder/model.safetensors.index.json"] = json.dumps(index).encode()
    repository.commit(files)
    checkpoint = opened(tmp_path)
    assert {entry.path for entry in checkpoint.missing if "text_encoder" in entry.path} == {
        f"text_encoder/{file}" for file in parts
    }
    assert set(checkpoint.components["text_encoder"].tensors) == set(tensors)
    assert set(fetched(tmp_path).components["text_encoder"].tensors) == set(tensors)


def test_weights_that_readers_would_differ_about_are_refused_before_they_are_fetched(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories[NAME]
    repository.commit({**repository.files, "vae/other.safetensors": b"x" * 100})
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path)
    assert f"{NAME}@" in told(error)
    assert "2 weights files" in told(error)
    assert "/fluxc-outline" not in told(error)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What arrived of a piece is lost with the connection, and pieces are larger than this file.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 18)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    repository = hub.repositories[NAME]
    repository.cut_after[TRANSFORMER], repository.cuts[TRANSFORMER] = 1 << 20, 2
    missing = opened(tmp_path).missing
    hub.ranges.clear()
    fetch(missing, StageProgress())
    assert (opened(tmp_path).root / TRANSFORMER).read_bytes() == (NANO / TRANSFORMER).read_bytes()
    assert hub.ranges == [f"{TRANSFORMER} bytes={1 << 20}-", f"{TRANSFORMER} bytes={2 << 20}-"]


def test_a_download_that_ends_goes_on_with_the_files_that_are_missing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub.repositories[NAME]
    missing = opened(tmp_path).missing
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    repository.cut_after[TRANSFORMER], repository.cuts[TRANSFORMER] = 0, 100
    with pytest.raises(CheckpointError) as error:
        fetch(missing, StageProgress())
    assert told(error).startswith(f"{NAME}: the download from {hub.url} stopped")
    assert "run the same command again: what is complete is kept" in told(error)
    repository.cuts[TRANSFORMER] = 0
    assert [entry.path for entry in opened(tmp_path).missing] == [TRANSFORMER]
    hub.asked.clear()
    assert not fetched(tmp_path).missing
    assert hub.sent(VAE) == hub.sent(ENCODER) == 0


def test_progress_is_told_in_bytes_and_no_bar_is_shown(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int, str]] = []

    class Recording(RecordingProgress):
        def stage(self, title: str) -> nullcontext[Report]:
            assert title == TITLE
            return nullcontext(lambda done, total, detail="": seen.append((done, total, detail)))

    missing = opened(tmp_path).missing
    fetch(missing, Recording())
    total = sum(entry.size for entry in missing)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (total, total)
    assert {entry[1] for entry in seen} == {total}
    assert f"3 files of {NAME}" in {detail for _, _, detail in seen}
    assert "Fetching" not in capfd.readouterr().err


def test_a_disk_that_is_too_small_is_refused_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = opened(tmp_path).missing
    hub.asked.clear()
    monkeypatch.setattr(fetch_module, "free_in_cache", lambda: 1000)
    with pytest.raises(BuildError, match=r"3 files of someone/nano need .*set HF_HUB_CACHE to a larger disk"):
        fetch(missing, StageProgress())
    assert hub.asked == []


def test_a_full_disk_and_a_cache_that_cannot_be_written_are_told(hub: Hub, tmp_path: Path) -> None:
    import errno

    from fluxc.checkpoint.hub_errors import telling
    from fluxc.checkpoint.named import OnHub

    for number, message in ((errno.ENOSPC, "no room is left"), (errno.EACCES, "the cache cannot be written")):
        with (
            pytest.raises(CheckpointError, match=message),
            telling(OnHub(NAME)),
        ):
            raise OSError(number, os.strerror(number))


def test_plan_downloads_no_weights_and_says_what_a_build_will(hub: Hub) -> None:
    shown = plan()
    assert shown.exit_code == 0, shown.output
    commit = hub.repositories[NAME].refs["main"]
    assert f"{NAME} at commit {commit}" in shown.output
    assert "a build downloads 3 files of weights first, 9 MiB" in " ".join(shown.output.split())
    assert hub.sent(".safetensors") < 3 << 20
    result = CliRunner().invoke(main, ["plan", str(RECIPE), "--json", "--set", f"model.source={NAME}"])
    found = json.loads(result.stdout)
    assert found["commits"] == {NAME: commit}
    assert found["downloads"] == {f"{NAME}/{file}": (NANO / file).stat().st_size for file in WEIGHTS}


def test_plan_of_a_quantized_checkpoint_reads_its_scales(
    hub: Hub, quick_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["some/quantized"] = Repository.of(quick_bundle)
    monkeypatch.setattr("fluxc.checkpoint.hub.FIRST", 4096)
    shown = plan("model.source=some/quantized", "precision={}")
    assert shown.exit_code == 0, shown.output
    checkpoint = open_checkpoint("some/quantized", None, tmp_path)
    here = open_checkpoint(str(quick_bundle), None, tmp_path)
    for name, ref in here.components["transformer"].tensors.items():
        if name.endswith(("input_scale", "weight_scale_2")):
            found = checkpoint.components["transformer"].tensors[name]
            assert found.bytes_view().tobytes() == ref.bytes_view().tobytes(), name
    assert hub.sent(TRANSFORMER) < (quick_bundle / TRANSFORMER).stat().st_size


def test_a_build_fetches_after_everything_that_can_be_refused(
    hub: Hub, tmp_path: Path, quick_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError):
        compile_into(tmp_path / "out", *QUICK, f"model.source={NAME}", "precision.transformer.keep=[nowhere]")
    assert hub.sent(".safetensors") < 3 << 20
    progress = RecordingProgress()
    bundle = compile_into(tmp_path / "out", *QUICK, f"model.source={NAME}", progress=progress)
    assert progress.ran[0] == TITLE
    commit = hub.repositories[NAME].refs["main"]
    manifest, folder = open_bundle(bundle).manifest, open_bundle(quick_bundle).manifest
    assert manifest.provenance.commits == {NAME: commit}
    assert manifest.provenance.checkpoint == folder.provenance.checkpoint
    assert (bundle / "LICENSE.md").read_text() == "a licence"
    assert f"{NAME} at commit {commit}" in CliRunner().invoke(main, ["inspect", str(bundle)]).output
    assert json.loads(CliRunner().invoke(main, ["inspect", str(bundle), "--json"]).stdout)["commits"] == {NAME: commit}
    hub.asked.clear()
    offline(monkeypatch)
    again = RecordingProgress()
    before = contents(bundle)
    compile_into(tmp_path / "out", *QUICK, f"model.source={NAME}", progress=again)
    assert again.ran == ["hash checkpoint"]
    assert contents(bundle) == before
    assert hub.asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    repository = hub.repositories[NAME]
    moved = repository.commit({**repository.files, "teaser.png": b"another"})
    after = RecordingProgress()
    compile_into(tmp_path / "out", *QUICK, f"model.source={NAME}", progress=after)
    assert open_bundle(bundle).manifest.provenance.commits == {NAME: moved}
    assert after.ran == [TITLE, "hash checkpoint"]
    assert any(moved in line for line in after.said)


def test_a_build_that_the_disk_has_no_room_for_downloads_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxc.build.budget.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(BuildError, match=r"the download \(HF_HUB_CACHE\).* needs"):
        compile_into(tmp_path / "out", *QUICK, f"model.source={NAME}")
    assert hub.sent(".safetensors") < 3 << 20


def test_a_command_that_measures_fetches_too(hub: Hub, tmp_path: Path) -> None:
    from fluxc.build.measure import calibrate_to_file
    from fluxc.recipe.load import load_recipe

    progress = RecordingProgress()
    loaded = load_recipe(RECIPE, (*QUICK, f"model.source={NAME}", "calibration.max_prompts=1", "calibration.steps=1"))
    measured = calibrate_to_file(loaded, tmp_path / "nano.calibration", "cpu", progress)
    assert progress.ran[:2] == [TITLE, "hash checkpoint"]
    assert measured.origin.checkpoint["transformer"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (NANO / "transformer").iterdir()
    }


def test_overridden_components_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    write(tmp_path / "flux2.safetensors", transformer_in_bfl(NANO / TRANSFORMER))
    shutil.copytree(NANO / "text_encoder", tmp_path / "encoder")
    parts = {"transformer": "flux2.safetensors", "text_encoder": "encoder"}
    checkpoint = opened(tmp_path, parts=parts)
    assert [entry.path for entry in checkpoint.missing] == [VAE]
    assert hub.sent(TRANSFORMER) == hub.sent(ENCODER) == hub.sent("text_encoder/config.json") == 0
    assert checkpoint.components["transformer"].config["num_layers"] == 2


def test_a_file_on_the_hub_stands_in_for_a_component(hub: Hub, tmp_path: Path) -> None:
    file = write(tmp_path / "one" / "flux2-nano.safetensors", transformer_in_bfl(NANO / TRANSFORMER))
    hub.repositories["lab/nano"] = Repository.of(tmp_path / "one")
    commit = hub.repositories["lab/nano"].refs["main"]
    for place in ("lab/nano/flux2-nano.safetensors", f"lab/nano@{commit}/flux2-nano.safetensors"):
        checkpoint = open_checkpoint(str(NANO), None, tmp_path, None, {"transformer": place})
        assert [(entry.repo, entry.path) for entry in checkpoint.missing] == [("lab/nano", "flux2-nano.safetensors")]
        assert checkpoint.commits == {"lab/nano": commit}
        assert "proj_out.weight" in checkpoint.components["transformer"].tensors
    shown = plan(f"model.source={NANO}", "model.transformer=lab/nano/flux2-nano.safetensors")
    assert shown.exit_code == 0, shown.output
    assert hub.sent(".safetensors") < file.stat().st_size
    fetch(checkpoint.missing, StageProgress())
    again = open_checkpoint(str(NANO), None, tmp_path, None, {"transformer": place})
    assert again.components["transformer"].weight_files[0].read_bytes() == file.read_bytes()
    with pytest.raises(CheckpointError, match=r"there is no file 'gone\.safetensors'.*flux2-nano\.safetensors"):
        open_checkpoint(str(NANO), None, tmp_path, None, {"transformer": "lab/nano/gone.safetensors"})


def test_the_command_line_honours_the_environment(hub: Hub, cache: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FLUXC"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fluxc", "plan", str(RECIPE), "--no-layers", "--set", f"model.source={NAME}"]

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment | more, cwd=ROOT, capture_output=True, text=True, check=False)

    shown = run()
    assert shown.returncode == 0, shown.stderr
    assert f"{NAME} at commit" in shown.stdout
    assert list((tmp_path / "home" / "hub").glob("models--someone--nano/snapshots/*/model_index.json"))
    refused = run(HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    assert re.search(rf"cache lacks .*{VAE}", " ".join(refused.stderr.split()))
    assert "Traceback" not in refused.stderr


def test_init_reads_configs_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["init", NAME])
    assert result.exit_code == 0, result.output
    assert f"source: {NAME}" in (tmp_path / "nano.yaml").read_text()
    assert hub.sent(".safetensors") < 3 << 20
    hub.repositories[NAME].gated = True
    refused = CliRunner().invoke(main, ["init", "someone/else"])
    assert refused.exit_code == 1
    assert "no such repository" in refused.output
