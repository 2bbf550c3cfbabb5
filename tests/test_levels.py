"""Levels of comparison: stages without an image, nothing at all, and recipes of which no target runs where they are built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fluxrt.evidence
from conftest import ROOT, RecordingProgress, compile_into
from fluxc.base.errors import GateError, RecipeError
from fluxc.build.build import _step_cache_left_out, failed_folder
from fluxc.build.job import open_job
from fluxc.build.stages import comparing
from fluxc.cli.main import main
from fluxc.fidelity.run import left_out
from fluxc.recipe.load import load_recipe
from fluxc.recipe.targets import OnnxRuntimeTarget, TensorRTRtxTarget
from fluxc.report.bundles import page_again, report_of
from fluxc.report.structs import REPORT_JSON, read_report
from fluxrt.bundle import open_bundle, verify_files
from fluxrt.verify import verify_evidence
from quick import QUICK

STAGES = ("fidelity.level=stages", "fidelity.max_prompts=1", "fidelity.steps=2")


@pytest.fixture(scope="module")
def stages(workshop: Path, quick_bundle: Path) -> Path:
    """The quick bundle, compared stage by stage; a target of two processes, and the gate that needs no image."""
    targets = "targets=[{kind: onnxruntime, activations: nvfp4}, {kind: onnxruntime, activations: nvfp4, gpus: 2}]"
    return compile_into(workshop / "stages", *QUICK[:-1], *STAGES, targets, "gates={step_cosine: 0.9}")


@pytest.fixture(scope="module")
def nothing(workshop: Path, quick_bundle: Path) -> Path:
    progress = RecordingProgress()
    built = compile_into(workshop / "nothing", *QUICK, "fidelity={level: none}", progress=progress)
    assert "generate reference" not in [*progress.ran, *progress.found]
    return built


def test_stages_compares_what_images_does_but_for_images(stages: Path, quick_bundle: Path) -> None:
    found, whole = report_of(stages), report_of(quick_bundle)
    assert (found.level, found.steps, found.prompts) == ("stages", 2, whole.prompts[:1])
    figures = found.targets["onnxruntime-nvfp4"]
    assert (figures.image_psnr_db, figures.image_psnr_db_worst, figures.image_ssim) == (None, None, None)
    (row,) = figures.prompts
    assert (row.text_error, row.image_psnr_db) == (whole.targets["onnxruntime-nvfp4"].prompts[0].text_error, None)
    assert [gate.name for gate in found.verdict.gates] == ["step_cosine", "rounding"]
    assert len(row.step_cosine) == 2
    manifest = open_bundle(stages).manifest
    assert (manifest.images, manifest.fidelity.level) == ((), "stages")
    assert not [name for name in manifest.files if name.startswith("report/images")]
    assert {name for name in manifest.files if name.startswith("evidence/")} == {"evidence/0.safetensors"}
    verify_files(open_bundle(stages))


def test_what_stages_leaves_out_is_said_everywhere(stages: Path, tmp_path: Path) -> None:
    lines = [(one.target, one.what) for one in report_of(stages).not_compared]
    sharded = "onnxruntime-nvfp4-2gpus"
    assert lines == [("onnxruntime-nvfp4", "images"), (sharded, "stages"), (sharded, "images")]
    page = (stages / "report" / "index.html").read_text()
    for shown in (
        "What was not compared",
        "its processes hold each image in shards",
        "fidelity.level is stages, which generates none",
        "No image was generated: text encoder, prologue, velocity and decoder were compared",
        "between the velocity of target onnxruntime-nvfp4 and the unquantized reference",
        "with 1 held-out prompt, 2 steps, guidance 1.5, 64",
    ):
        assert shown in page, shown
    assert "mean PSNR of target" not in page
    page_again(stages, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
    readme = (stages / "README.md").read_text()
    assert "**No image was generated: " in readme
    assert "PSNR" not in readme
    shown = " ".join(CliRunner().invoke(main, ["inspect", str(stages)]).output.split())
    assert "compared with diffusers Flux2KleinPipeline in float32: stages alone" in shown
    assert f"not compared: images of {sharded}: fidelity.level is stages, which generates none" in shown
    told = json.loads(CliRunner().invoke(main, ["inspect", str(stages), "--json"]).output)
    assert (told["compared"], len(told["not_compared"])) == ("stages", 3)
    assert told["evidence"]["prompts"][0]["file"] == "evidence/0.safetensors"


def test_a_bundle_compared_by_stages_is_verified_by_its_evidence(stages: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(stages), "--json"])
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert [(check["what"], check["status"]) for check in checks] == [
        ("files", "passed"),
        ("onnxruntime-nvfp4", "passed"),
        ("onnxruntime-nvfp4-2gpus", "not run"),
        ("onnxruntime-nvfp4", "not run"),
        ("onnxruntime-nvfp4-2gpus", "not run"),
    ]
    assert checks[1]["prompts"][0]["stages"][0]["stage"] == "text encoder"
    assert checks[3]["detail"] == "no image was recorded"


def test_stages_has_one_component_in_memory_at_a_time(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of the text encoder, of a step, and of the decoder are never loaded together."""
    loaded: list[set[str]] = []

    class Watched(fluxrt.pipeline.Pipeline):
        def close(self) -> None:
            loaded.append(set(self.backend._sessions))
            super().close()
            assert not self.backend._sessions

    monkeypatch.setattr("fluxrt.verify.Pipeline", Watched)
    (found, _) = verify_evidence(open_bundle(stages), threads=1)
    assert found.status == "passed"
    assert loaded == [{"text_encoder"}, {"prologue", "body", "epilogue"}, {"vae_decoder"}]


def test_none_compares_nothing_and_says_so_loudly(nothing: Path) -> None:
    manifest = open_bundle(nothing).manifest
    assert (manifest.recorded, manifest.fidelity.targets, manifest.fidelity.level) == (None, {}, "none")
    assert not (nothing / "evidence").exists()
    said = CliRunner().invoke(main, ["report", str(nothing)]).output
    assert "not run: NOTHING WAS COMPARED with the original model: fidelity.level is none." in said
    for text in ((nothing / "README.md").read_text(), (nothing / "report" / "index.html").read_text()):
        assert "NOTHING WAS COMPARED with the original model" in text
    assert "NOTHING WAS COMPARED" in CliRunner().invoke(main, ["inspect", str(nothing)]).output
    report = read_report(nothing / REPORT_JSON)
    assert {(one.target, one.what) for one in report.not_compared} == {
        ("onnxruntime", "stages and images"),
        ("onnxruntime-exact", "stages and images"),
        ("onnxruntime-nvfp4", "stages and images"),
    }
    verified = CliRunner().invoke(main, ["verify", str(nothing)])
    assert verified.exit_code == 0
    assert "this bundle has no evidence" in verified.output


@pytest.mark.parametrize(
    ("gate", "level", "least"),
    [
        ("image_psnr_db: 30", "stages", "images"),
        ("step_cosine: 0.9", "none", "stages"),
        ("image_psnr_db: 30", "none", "images"),
    ],
)
def test_gates_on_what_a_level_does_not_measure_are_refused_by_name(
    tmp_path: Path, gate: str, level: str, least: str
) -> None:
    said = (
        rf"gates\.{gate.partition(':')[0]}: fidelity\.level is {level}, which measures nothing that could be held to it; "
        rf"set fidelity\.level to {least}, or leave the gate out"
    )
    with pytest.raises(RecipeError, match=said):
        compile_into(tmp_path / "out", *QUICK[:-1], f"gates={{{gate}}}", f"fidelity.level={level}")
    assert list(tmp_path.iterdir()) == []
    changes = [f"--set={change}" for change in (*QUICK[:-1], f"gates={{{gate}}}", f"fidelity.level={level}")]
    planned = CliRunner().invoke(main, ["plan", "recipes/flux2-nano.yaml", *changes])
    assert planned.exit_code == 2
    assert f"fidelity.level is {level}" in " ".join(planned.output.split())


def test_a_step_cache_is_not_judged_without_images(tmp_path: Path) -> None:
    """Its gate is refused; without it no image is generated, and the report says so."""
    recipe = ROOT / "recipes" / "flux2-nano-50-steps.yaml"
    with pytest.raises(
        RecipeError, match=r"gates\.step_cache_psnr_db: fidelity\.level is stages, which measures nothing"
    ):
        open_job(load_recipe(recipe, ["fidelity.level=stages", "gates={step_cache_psnr_db: 30}"]), tmp_path)
    steps = {}
    for level in ("none", "stages", "images"):
        job = open_job(load_recipe(recipe, [f"fidelity.level={level}", "gates={}"]), tmp_path)
        steps[level] = [step.name for step in comparing(job)]
    assert steps["none"] == steps["stages"] == ["compare"]
    assert "frontier-chosen" in steps["images"]
    told = _step_cache_left_out("stages")
    assert (told["target"], told["what"]) == ("step cache", "images with steps skipped")
    assert told["why"].startswith("fidelity.level is stages, which generates no images")


def test_the_cosine_gate_holds_without_images(workshop: Path, stages: Path) -> None:
    with pytest.raises(GateError, match=r"gates: target onnxruntime-nvfp4: step_cosine 0\.99"):
        compile_into(
            workshop / "missed", *QUICK[:-1], *STAGES, "targets=[{kind: onnxruntime, activations: nvfp4}]",
            "gates={step_cosine: 0.9999}",
        )  # fmt: skip
    failed = read_report(failed_folder(workshop / "missed") / REPORT_JSON)
    assert (failed.level, failed.verdict.passed) == ("stages", False)
    assert [path.name for path in failed_folder(workshop / "missed").iterdir()] == ["report"]


def test_two_levels_beside_each_other_say_that_they_differ(stages: Path, quick_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    result = CliRunner().invoke(main, ["report", str(quick_bundle), str(stages), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert "what was compared (fidelity.level)" in json.loads(result.output)["comparable"]


def test_where_no_target_runs_only_evidence_is_made_of_the_reference(workshop: Path) -> None:
    """Of at most two prompts, at most four steps, and no image; its bounds do not depend on figures there are none of."""
    many = workshop / "prompts.txt"
    many.write_text("\n".join(f"a red circle, number {number}" for number in range(5)))
    prompts = f"fidelity.prompts={many}"
    targets = "targets=[{kind: onnxruntime, device: cuda}]"
    built = compile_into(workshop / "gpu-only", *QUICK[:1], prompts, "sampling.steps=6", *QUICK[3:], targets)
    manifest = open_bundle(built).manifest
    report = report_of(built)
    assert (report.level, report.targets, report.steps, len(report.prompts)) == ("stages", {}, 4, 2)
    evidence = manifest.recorded
    assert evidence is not None
    assert [entry.prompt for entry in evidence.prompts] == [f"a red circle, number {number}" for number in (0, 1)]
    assert (len(evidence.sigmas), evidence.steps) == (4, 4)
    (limits,) = evidence.targets.values()
    assert limits.measured == ()
    assert limits.bounds["step_error"].error == 0.6
    assert limits.bounds["step_error"].of == "rounding to nvfp4; no target that rounds alike ran"
    (found,) = report.not_compared
    assert "a build runs no target on a GPU; `fluxrt verify` replays the bundle's evidence where it runs" in found.why
    assert "None was generated" in (built / "report" / "index.html").read_text()
    (checked,) = verify_evidence(open_bundle(built))
    assert (checked.status, checked.why.partition(":")[0]) == ("not run", "does not run here")


def test_what_is_left_out_by_level_and_kind_of_target() -> None:
    cpu, ranks, gpu = OnnxRuntimeTarget(), OnnxRuntimeTarget(gpus=2), TensorRTRtxTarget()
    found: dict[str, Any] = {
        level: [(one.target, one.what) for one in left_out(level, [cpu, ranks, gpu])]
        for level in ("none", "stages", "images")
    }
    everything = "stages and images"
    assert found["none"] == [(target.name, everything) for target in (cpu, ranks, gpu)]
    assert found["stages"] == [
        (cpu.name, "images"),
        (ranks.name, "stages"),
        (ranks.name, "images"),
        (gpu.name, everything),
    ]
    assert found["images"] == [(ranks.name, "stages"), (gpu.name, everything)]


def test_relative_errors_and_cosines_are_those_of_numpy() -> None:
    """By hand: (3, 4) beside (3, 0)."""
    ours, reference = np.float32([3, 4]), np.float32([3, 0])
    assert fluxrt.evidence.relative_error(ours, reference) == pytest.approx(4 / 3)
    assert fluxrt.evidence.cosine(ours, reference) == pytest.approx(3 / 5)
