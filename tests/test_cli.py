"""The fluxc command line: what it prints, where errors go, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conftest import NANO, QUICK, RECIPE
from fluxc.cli import main


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_plan_shows_formats_rules_and_bytes_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("plan", RECIPE)
    assert result.exit_code == 0, result.output
    for expected in (
        "single_transformer_blocks.0-5.attn.to_qkv_mlp_proj",
        "keep 'norm_out*'",
        "default",
        "onnxruntime-nvfp4",
        "nvfp4",
        "text_encoder",
    ):
        assert expected in result.output
    assert list(tmp_path.iterdir()) == []


def test_plan_totals_equal_what_a_build_writes(nano_bundle: Path) -> None:
    weights = (nano_bundle / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    header = int.from_bytes(
        (nano_bundle / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()[:8], "little"
    )
    assert f"{weights - header - 8:,}" in invoke("plan", RECIPE, "--no-layers").output


def test_plan_refuses_a_pattern_that_matches_nothing() -> None:
    result = invoke("plan", RECIPE, "--set", "precision.transformer.keep=[x_embeder]")
    assert result.exit_code == 2
    assert "did you mean 'x_embedder'" in result.output


def test_inspect_prints_the_manifest_in_words(quick_bundle: Path) -> None:
    result = invoke("inspect", quick_bundle)
    assert result.exit_code == 0, result.output
    for expected in ("flux2-nano-nvfp4", "Flux2KleinPipeline", "nvfp4", "onnxruntime", "64x64", "torch 2.13.0"):
        assert expected in result.output


def test_verify_says_what_it_checked(quick_bundle: Path) -> None:
    result = invoke("verify", quick_bundle, "--target", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert "match their SHA-256" in result.output
    assert "the recorded picture is drawn again" in result.output


def test_verify_fails_with_one_paragraph_and_exit_code_1(quick_copy: Path) -> None:
    path = quick_copy / "transformer" / "prologue.onnx"
    path.write_bytes(path.read_bytes().replace(b"Linear", b"Lineae").replace(b"MatMul", b"MatMuk"))
    result = invoke("verify", quick_copy)
    assert result.exit_code == 1
    assert result.output.startswith("fluxc: ")
    assert "altered: transformer/prologue.onnx" in result.output


def test_doctor_lists_what_is_there() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for expected in ("Python 3", "compile", "CPUExecutionProvider", "torch 2.13.0"):
        assert expected in result.output


def test_build_stops_after_the_stage_it_was_asked_for(tmp_path: Path) -> None:
    result = invoke(
        "build", RECIPE, "--out", tmp_path / "out", "--only", "calibrate", *(a for c in QUICK for a in ("--set", c))
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    assert [p.name.split("-")[0] for p in (tmp_path / ".fluxc").glob("calibration-*")] == ["calibration"]


def test_an_unknown_recipe_field_exits_with_2(tmp_path: Path) -> None:
    result = invoke("build", RECIPE, "--set", "gatez={}", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "unknown field 'gatez'; did you mean 'gates'" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_exits_with_1(tmp_path: Path) -> None:
    result = invoke("build", RECIPE, "--set", f"model.source={tmp_path / 'none'}", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "no such folder" in result.output
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_is_at_most_16_mb_and_names_no_machine() -> None:
    files = [p for p in NANO.rglob("*") if p.is_file() and ".work" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 16_000_000
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in path.read_text(), path
