"""`fluxc add-evidence`: what a GPU check found, in the bundle it ran and in no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from conftest import RecordingProgress, compile_into
from fluxc.base.errors import BuildError
from fluxc.cli.main import main
from fluxc.fidelity.on_target import FILES, digest_without_entries, entries_of
from fluxc.gpu_check.evidence import add_evidence
from fluxc.gpu_check.record import Outcome, Ran, new_record, read_record, write_record
from fluxc.gpu_check.subject import file_hashes
from fluxrt.bundle import open_bundle, verify_files
from fluxrt.errors import BundleError
from fluxrt.manifest import FORMAT_VERSION, encode_manifest
from quick import QUICK, contents

STEP = {"step": {"p50_ms": 20.5, "p99_ms": 22.25, "count": 200}}
CHECKS = {
    "machine": Outcome("passed", 1.0),
    "images:onnxruntime": Outcome("passed", 3.0, figures={"images": [{"psnr_db": 41.5}]}),
    "stages:onnxruntime": Outcome("passed", 2.0, figures={"step_cosine": [0.999]}),
    "steps:onnxruntime": Outcome("passed", 2.0, figures=STEP),
    "images:onnxruntime-nvfp4": Outcome("crashed", 2.0, "its process was ended by SIGSEGV"),
    "target:elsewhere": Outcome("skipped", why="the plans are for compute capability 12.0"),
}


def file_for(path: Path, file: Path, gpu: str = "a GPU", rehearsal: bool = False, **changes: Any) -> Path:
    """What gpu-check would write of the bundle at `path` on a machine with `gpu`; `changes` are to what ran."""
    opened = open_bundle(path)
    device = {
        "gpus": [{"name": gpu, "compute_capability": "12.0", "memory_bytes": 32 << 30, "id": "0123456789ab"}],
        "peers": [[True]],
        "driver": "580.95",
        "cuda": "13.0",
    }
    ran = Ran(
        opened.manifest.name,
        digest_without_entries(opened.manifest),
        file_hashes(opened),
        device,
        {"fluxc": "0.1.0", "tensorrt-rtx-cu13": "1.7.1"},
    )
    record = new_record(msgspec.structs.replace(ran, **changes), rehearsal)
    write_record(file, msgspec.structs.replace(record, checks=CHECKS))
    return file


def test_figures_go_into_manifest_and_report(quick_copy: Path, tmp_path: Path) -> None:
    before = open_bundle(quick_copy).manifest
    file = file_for(quick_copy, tmp_path / "day.json")
    result = CliRunner().invoke(main, ["add-evidence", str(quick_copy), str(file)])
    assert result.exit_code == 0, result.output
    assert (
        "a GPU: onnxruntime matched on the target, onnxruntime-nvfp4 failed on the target; entries of 1 machines in all"
        in result.output
    )
    opened = open_bundle(quick_copy)
    verify_files(opened)
    after = opened.manifest
    assert after.format_version == before.format_version == FORMAT_VERSION
    assert after.digest != before.digest
    assert digest_without_entries(after) == before.digest
    (entry,) = entries_of(after)
    assert entry.tiers == {
        "onnxruntime": "matched on the target",
        "onnxruntime-nvfp4": "failed on the target",
    }
    assert entry.checks["steps:onnxruntime"].figures == STEP
    assert entry.bundle == before.digest
    added = sorted(name for name in after.files if name.startswith(FILES))
    assert sorted(Path(name).suffix for name in added) == [".html", ".json"]
    page = next(name for name in added if name.endswith(".html"))
    text = (quick_copy / page).read_text()
    for shown in ("SIGSEGV", "20.5 ms", "matched on the target", "stages:onnxruntime", "PASSED", "How much smaller?"):
        assert shown in text
    assert "No GPU has run this bundle" not in text
    assert "No GPU has run this bundle" in (quick_copy / "report" / "index.html").read_text()
    said = CliRunner().invoke(main, ["report", str(quick_copy)]).output
    assert said.splitlines()[-1] == str(quick_copy / page)
    assert "not run" not in said
    assert CliRunner().invoke(main, ["report", str(quick_copy), "--out", str(tmp_path / "again.html")]).exit_code == 0
    assert (tmp_path / "again.html").read_text() == text
    kept = next(name for name in added if name.endswith(".json"))
    assert (quick_copy / kept).read_bytes() == file.read_bytes()
    assert [path.name for path in quick_copy.parent.iterdir() if path.name.startswith(".")] == []
    shown = CliRunner().invoke(main, ["inspect", str(quick_copy)]).output
    assert (
        "onnxruntime: matched on the target: a GPU, driver 580.95; a step 20.5 ms (p50), 22.25 ms (p99) of 200" in shown
    )
    verified = CliRunner().invoke(main, ["verify", str(quick_copy), "--target", "onnxruntime"])
    assert verified.exit_code == 0, verified.output


def test_the_same_file_again_changes_nothing_and_another_gpu_adds_an_entry(quick_copy: Path, tmp_path: Path) -> None:
    first = file_for(quick_copy, tmp_path / "one.json", "B GPU")
    second = file_for(quick_copy, tmp_path / "two.json", "A GPU")
    add_evidence(quick_copy, first)
    once = contents(quick_copy)
    add_evidence(quick_copy, first)
    assert contents(quick_copy) == once
    add_evidence(quick_copy, second)
    both = contents(quick_copy)
    assert [e.gpu for e in entries_of(open_bundle(quick_copy).manifest)] == ["A GPU", "B GPU"]
    assert sum(name.startswith(FILES) for name in both) == 3
    add_evidence(quick_copy, first)
    assert contents(quick_copy) == both
    # The same machine, checked again: its entry is replaced.
    record = read_record(first)
    more = {**record.checks, "copies:onnxruntime": Outcome("passed", 1.0)}
    write_record(first, msgspec.structs.replace(record, checks=more))
    add_evidence(quick_copy, first)
    entries = entries_of(open_bundle(quick_copy).manifest)
    assert ["copies:onnxruntime" in entry.checks for entry in entries] == [False, True]
    verify_files(open_bundle(quick_copy))


def test_files_of_other_bundles_are_refused_by_the_hash_that_differs(quick_copy: Path, tmp_path: Path) -> None:
    manifest = (quick_copy / "bundle.json").read_bytes()
    files = file_hashes(open_bundle(quick_copy))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    other = file_for(quick_copy, tmp_path / "other.json", files={**files, weights: "f" * 64})
    with pytest.raises(
        BuildError, match=f"made with another bundle: {weights} has SHA-256 ffffffffffffffff there and "
    ):
        add_evidence(quick_copy, other)
    other = file_for(quick_copy, tmp_path / "other.json", files={**files, "engines/more.plan": "e" * 64})
    with pytest.raises(BuildError, match=r"engines/more\.plan has SHA-256 eeeeeeeeeeeeeeee there and nothing in"):
        add_evidence(quick_copy, other)
    other = file_for(quick_copy, tmp_path / "other.json", bundle="d" * 64)
    with pytest.raises(BuildError, match="its digest without evidence is dddddddddddddddd, that of"):
        add_evidence(quick_copy, other)
    assert (quick_copy / "bundle.json").read_bytes() == manifest


def test_rehearsals_and_damaged_files_are_refused(quick_copy: Path, tmp_path: Path) -> None:
    manifest, file = (quick_copy / "bundle.json").read_bytes(), tmp_path / "day.json"
    file_for(quick_copy, file, rehearsal=True)
    with pytest.raises(BuildError, match="a rehearsal on a made-up GPU"):
        add_evidence(quick_copy, file)
    whole = file_for(quick_copy, file).read_bytes()
    for damaged, said in (
        (whole[:-40], "damaged, or not a file of gpu-check"),
        (whole.replace(b"41.5", b"51.5"), "its seal .* is not that of what it holds"),
        (whole.replace(b'"rehearsal": false', b'"rehearsal": 3'), "damaged: "),
        (b'{"format": "fluxc-gpu-check", "format_version": 9}', "gpu-check format 9, this fluxc reads 1"),
        (b"{}", "not a file of gpu-check"),
        (b"\xff\xfe", "damaged, or not a file of gpu-check"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(BuildError, match=said):
            add_evidence(quick_copy, file)
    with pytest.raises(BuildError, match="cannot be read: No such file"):
        add_evidence(quick_copy, tmp_path / "nothing.json")
    none = read_record(file_for(quick_copy, file))
    write_record(file, msgspec.structs.replace(none, checks={"machine": Outcome("passed")}))
    with pytest.raises(BuildError, match="no target of the bundle ran there"):
        add_evidence(quick_copy, file)
    assert (quick_copy / "bundle.json").read_bytes() == manifest


def test_what_a_killed_run_left_is_removed_by_the_next(quick_copy: Path, tmp_path: Path) -> None:
    """Killed before the manifest was renamed, or after: a file that the manifest does not name."""
    left = quick_copy / f"{FILES}0000.html"
    left.write_text("half")
    with pytest.raises(BundleError, match="not listed in the manifest"):
        verify_files(open_bundle(quick_copy))
    add_evidence(quick_copy, file_for(quick_copy, tmp_path / "day.json"))
    assert not left.exists()
    verify_files(open_bundle(quick_copy))


def test_a_build_that_changes_nothing_keeps_the_evidence_and_another_says_that_it_goes(
    quick_copy: Path, tmp_path: Path
) -> None:
    add_evidence(quick_copy, file_for(quick_copy, tmp_path / "day.json"))
    before = contents(quick_copy)
    compile_into(quick_copy, *QUICK)
    assert contents(quick_copy) == before
    assert len(entries_of(open_bundle(quick_copy).manifest)) == 1
    progress = RecordingProgress()
    compile_into(quick_copy, *QUICK, "gates={layer_snr_db: 1}", progress=progress)
    assert any("what 1 GPUs did was about the bundle that is now replaced" in said for said in progress.said)
    assert entries_of(open_bundle(quick_copy).manifest) == ()


def test_a_bundle_without_evidence_says_nothing_of_it(quick_bundle: Path) -> None:
    manifest = open_bundle(quick_bundle).manifest
    assert digest_without_entries(manifest) == manifest.digest
    assert "on_target" not in json.loads(encode_manifest(manifest))["fidelity"]
