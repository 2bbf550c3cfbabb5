"""The fluxc command line: what it prints, where errors go, exit codes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from conftest import NANO, RECIPE, hollow_checkpoint
from fluxc.base.console import new_console, new_table
from fluxc.cli.doctor import Check, machine_checks, system_checks
from fluxc.cli.main import main
from fluxc.models.published import QWEN3_4B
from fluxc.quantize.presets import PRESETS
from fluxrt.cuda import Gpu
from fluxrt.machine import Machine
from quick import QUICK
from test_flux2_tables import KLEIN_4B


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_plan_shows_formats_rules_and_bytes_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("plan", RECIPE)
    assert result.exit_code == 0, result.output
    for expected in (
        "single_transformer_blocks.0-5.attn.to_qkv_mlp_proj",
        "exclude 'norm_out*'",
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


GATES = "gates={layer_snr_db: 15}"
"""A large model is compared without images, so that the recipe's gate on those would be refused."""


@pytest.fixture(scope="module")
def klein_4b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with klein-4B's configs and headers, and flux2-nano's VAE; the large weights are holes."""
    return hollow_checkpoint(tmp_path_factory.mktemp("klein") / "klein-4B", KLEIN_4B, QWEN3_4B)


def plan_json(*arguments: object) -> Any:
    result = invoke("plan", RECIPE, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_plan_shows_memory_against_bf16_and_fp8(klein_4b: Path) -> None:
    preset = "precision.transformer={default: nvfp4, preset: modelopt-flux2}"
    encoder = "precision.text_encoder.default=fp8"
    arguments = ("--set", f"model.source={klein_4b}", "--set", GATES, "--set", preset, "--set", encoder)
    result = invoke("plan", RECIPE, "--no-layers", *arguments)
    assert result.exit_code == 0, result.output
    # klein-4B has 3.88e9 parameters; docs/recipe.md gives 2.29 GiB for this preset.
    memory = result.output.partition("weights in memory, GiB")[2].splitlines()
    transformer = next(line for line in memory if "transformer" in line)
    for expected in ("7.22", "3.61 (-50.0%)", "2.29 (-68.3%)"):
        assert expected in transformer
    assert any(line.startswith("│ all ") for line in memory)
    assert "preset modelopt-flux2: '*time_text_embed*' names no layer here" in result.output


def test_plan_as_json_says_what_the_tables_say(klein_4b: Path) -> None:
    plan = plan_json(
        "--set",
        f"model.source={klein_4b}",
        "--set",
        GATES,
        "--set",
        "precision.transformer={default: nvfp4, preset: nvidia-blog, rules: [{match: '*.0.attn.to_q', format: fp8}]}",
    )
    layers = {layer["name"]: layer for layer in plan["precision"]}
    assert plan["presets"] == {"transformer": "nvidia-blog", "text_encoder": None}
    assert layers["x_embedder"]["rule"] == "preset nvidia-blog: '*embedder*'"
    assert layers["x_embedder"]["shape"] == [3072, 128]
    assert layers["transformer_blocks.0.attn.to_k"]["format"] == "fp8"
    assert plan["widened"] == {
        "transformer_blocks.0.attn.to_qkv": {
            "follow": ["transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"],
            "rule": "rule '*.0.attn.to_q', widened to the fusion group",
        }
    }
    formats = plan["formats"]["transformer"]
    assert sum(entry["share"] for entry in formats.values()) == pytest.approx(1)
    assert sum(entry["layers"] for entry in formats.values()) == 109
    weights = plan["weights_bytes"]
    # 27 of 36 layers are run and one more is kept, with the embedding.
    assert weights["text_encoder"]["bf16"] == 2 * (
        151936 * 2560 + 28 * (2560 * (2 * 4096 + 2 * 1024 + 3 * 9728 + 2) + 256) + 2560
    )
    assert weights["all"]["planned"] == sum(weights[name]["planned"] for name in ("transformer", "text_encoder", "vae"))


def test_plan_lists_groups_that_were_widened() -> None:
    result = invoke(
        "plan", RECIPE, "--no-layers", "--set", "precision.transformer.rules=[{match: '*.to_q', format: fp8}]"
    )
    assert "widened to the whole fusion group" in result.output
    line = next(line for line in result.output.splitlines() if "transformer_blocks.0-1.attn.to_qkv" in line)
    assert "to_k, to_v" in line
    assert "rule '*.to_q'" in line
    assert "widened" not in invoke("plan", RECIPE, "--no-layers").output


def test_plan_compares_the_presets_on_the_checkpoint(klein_4b: Path) -> None:
    result = invoke("plan", RECIPE, "--presets", "--set", f"model.source={klein_4b}", "--set", GATES)
    assert result.exit_code == 0, result.output
    for name, preset in PRESETS.items():
        assert name in result.output
        assert preset.source in result.output
    for expected in ("9.90%", "2.54", "5.03%", "2.29", "0.28%", "2.05", "(this recipe)", "(all FP8)", "3.61"):
        assert expected in result.output
    compared = plan_json("--presets", "--set", f"model.source={klein_4b}", "--set", GATES)
    assert [row["name"] for row in compared] == list(PRESETS)
    assert compared[0]["share"] == pytest.approx(0.0990, abs=5e-5)


def test_plan_refuses_a_pattern_that_matches_nothing() -> None:
    result = invoke("plan", RECIPE, "--set", "precision.transformer.exclude=[x_embeder]")
    assert result.exit_code == 2
    assert "did you mean 'x_embedder'" in result.output


def test_inspect_prints_the_manifest_in_words(quick_bundle: Path) -> None:
    result = invoke("inspect", quick_bundle)
    assert result.exit_code == 0, result.output
    for expected in ("flux2-nano-nvfp4", "Flux2KleinPipeline", "nvfp4", "onnxruntime", "64x64", "torch 2.13.0"):
        assert expected in result.output
    assert "(2 prompts, 3 steps, 64x64); reference on" in " ".join(result.output.split())


def test_verify_says_what_it_checked(quick_bundle: Path) -> None:
    result = invoke("verify", quick_bundle, "--target", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert "match their SHA-256" in result.output
    assert "the recorded image is generated again" in result.output


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
    for expected in ("Python", "compile", "onnxruntime 1.", "torch 2.13.0"):
        assert expected in result.output


GPU = Gpu("RTX 5090", "12.0", "13.0")


@pytest.mark.parametrize(
    ("machine", "rows"),
    [
        (Machine(None, "no driver"), []),
        (
            Machine(None, driver="570.86.15"),
            [("NVIDIA driver", "no", "driver 570.86.15 is too old for CUDA 13; install")],
        ),
        (
            Machine(replace(GPU, driver="12.8")),
            [("NVIDIA driver", "no", "supports CUDA 12.8, the libraries need CUDA 13")],
        ),
        (Machine(GPU, driver="580.95.05"), [("NVIDIA driver", "yes", "580.95.05, CUDA 13.0")]),
        (
            Machine(GPU, gpus=2),
            [("NVIDIA driver", "yes", "CUDA 13.0"), ("GPU to GPU", "yes", "2 GPUs reach each other's")],
        ),
        (
            Machine(GPU, gpus=2, apart=((0, 1),), shared_memory=64 << 20),
            [
                ("NVIDIA driver", "yes", ""),
                ("GPU to GPU", "slow", "0 and 1 do not"),
                ("/dev/shm", "no", "64 MiB, NCCL"),
            ],
        ),
        (
            Machine(GPU, gpus=2, apart=((0, 1),), shared_memory=512 << 20),
            [
                ("NVIDIA driver", "yes", ""),
                ("GPU to GPU", "slow", ""),
                ("/dev/shm", "perhaps", "--shm-size=1g or --ipc=host"),
            ],
        ),
    ],
)
def test_doctor_names_what_the_system_lacks_first(machine: Machine, rows: list[tuple[str, str, str]]) -> None:
    found = system_checks(machine)
    assert [(check.what, check.ready) for check in found] == [row[:2] for row in rows]
    for check, (_, _, expected) in zip(found, rows, strict=True):
        assert expected in f"{check.detail} {check.do}"


def asks(checks: list[Check]) -> str:
    return " ".join(f"{check.what} {check.do}" for check in checks if check.do)


def test_doctor_asks_for_nothing_of_cuda_on_a_machine_without_an_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxc.cli.doctor.installed_version", lambda kind: None)
    checks = machine_checks(Machine(None, "no NVIDIA GPU"), has_gpu=False)
    assert [check.ready for check in checks if check.what == "NVIDIA GPU"] == ["not needed"]
    asked = asks(checks)
    # TensorRT-RTX builds for other machines' GPUs, so it is the one that is offered.
    assert "tensorrt-rtx-cu13" in asked
    assert not any(name in asked for name in ("cuda-bindings", "onnxruntime-gpu", "tensorrt-cu13", "pytorch.org"))


def test_doctor_says_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxc.cli.doctor.installed_version", lambda kind: None)
    monkeypatch.setattr("fluxc.cli.doctor._version", lambda name: None if name in ("cuda-bindings", "onnx") else "1")
    checks = {check.what: check for check in machine_checks(Machine(None, "cuda-bindings"), has_gpu=True)}
    for what, command in (
        ("compile", "install 'onnx>=1."),
        ("run GPU targets", "install 'cuda-bindings>=13'"),
        ("run onnxruntime targets on the GPU", "-m pip install 'cuda-bindings>=13' 'onnxruntime-gpu[cuda,cudnn]>=1."),
        ("build tensorrt targets", "install 'tensorrt-cu13>=11"),
    ):
        assert checks[what].ready == "no"
        assert command in str(checks[what].do)


def test_calibrate_prints_kinds_outliers_and_where_it_ran(tmp_path: Path) -> None:
    from fluxc.calibrate.file import read_calibration

    file = tmp_path / "nano.safetensors"
    result = invoke("calibrate", RECIPE, "--out", file, *(a for c in QUICK for a in ("--set", c)))
    assert result.exit_code == 0, result.output
    for expected in (
        "transformer outliers",
        "text_encoder outliers",
        "99.9%",
        "2 prompts, 3 steps",
        "cpu, ",
        str(file),
    ):
        assert expected in result.output, expected
    records = read_calibration(file).records["transformer"]
    layer = "transformer_blocks.1.ff_context.linear_out"
    row = next(line for line in result.output.splitlines() if layer in line)
    assert f"{records[layer].amax:.4g}" in row
    assert f" {records[layer].channel_amax.argmax()}" in row


def test_build_stops_after_the_part_it_was_asked_for(shared_cache: Path, tmp_path: Path) -> None:
    result = invoke(
        "build", RECIPE, "--out", tmp_path / "out", "--until", "calibrate", *(a for c in QUICK for a in ("--set", c))
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    assert list(shared_cache.glob("calibration-*"))
    assert "done up to calibrate" in result.output


def test_an_unknown_recipe_field_exits_with_2(tmp_path: Path) -> None:
    result = invoke("build", RECIPE, "--set", "gatez={}", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "unknown field 'gatez'; did you mean 'gates'" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "pattern", ["re:.*[.]attn[.]to_[qkv]", "re:[/]?transformer_blocks.*", "re:(:smile:)?x_embedder"]
)
def test_plan_prints_patterns_as_they_are(pattern: str) -> None:
    result = invoke("plan", RECIPE, "--set", f"precision.transformer.exclude=['{pattern}']")
    assert result.exit_code == 0, result.output
    assert pattern in result.output


def test_no_text_is_cut_on_a_narrow_terminal() -> None:
    pattern = "re:single_transformer_blocks[.](0|1|2|3|4|5)[.]attn[.]to_(qkv_mlp_proj|out)"
    shown = Console(width=60, file=io.StringIO(), markup=False)
    table = new_table("layer", "decided by", title="[bold]")
    table.add_row("x", pattern)
    shown.print(table)
    output = shown.file.getvalue()
    assert "[bold]" in output
    assert "".join(line[4:].strip("│ ") for line in output.splitlines() if "│" in line).endswith(pattern)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("folder", "exists and is not a"),
        ("file", "exists and is not a"),
        ("link", "is a symbolic link"),
        ("file/below", "is not a folder, so nothing can be written below it"),
        ("b" * 300, "the name is longer than 200 bytes"),
        ("/proc/none/x", "/proc"),
        ("..", "give the name of a"),
    ],
)
@pytest.mark.parametrize("verb", ["build", "calibrate", "trace", "merge-traces"])
def test_an_output_that_cannot_be_is_refused_before_any_work(
    verb: str, name: str, expected: str, tmp_path: Path
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    (place / "folder").mkdir()
    (place / "folder" / "note").write_text("mine")
    (place / "file").write_text("mine")
    (place / "link").symlink_to(tmp_path / "elsewhere")
    before = sorted(place.rglob("*"))
    subject = [tmp_path / "none"] if verb == "merge-traces" else [RECIPE, "--set", "model.source=./none"]
    subject += ["--set", "sampling.steps=20", "--set", "step_cache={skip: auto}"] if verb == "trace" else []
    result = invoke(verb, *subject, "--out", place / name)
    # What the name says is a wrong request; what the system refuses is a failure.
    assert result.exit_code == (1 if name.startswith("/proc") else 2), result.output
    assert expected in result.output
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_checkpoint_exits_with_2(tmp_path: Path) -> None:
    result = invoke("build", RECIPE, "--set", f"model.source={tmp_path / 'none'}", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no such folder" in result.output
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_is_at_most_16_mb_and_names_no_machine() -> None:
    files = [p for p in NANO.rglob("*") if p.is_file() and ".work" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 16_000_000
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in path.read_text(), path


def shown_at(width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that `plan` prints in a terminal of this width, or into a pipe."""
    from fluxc.cli import describe

    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, markup=False, color_system=None)
    monkeypatch.setattr(describe, "new_console", lambda: console if terminal else new_console())
    result = invoke("plan", RECIPE)
    assert result.exit_code == 0, result.output
    return (console.file.getvalue() if terminal else result.output).splitlines()


@pytest.mark.parametrize("width", [70, 80, 120, 200])
def test_a_terminal_of_any_width_shows_whole_names_formats_and_rules(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown_at(width, True, monkeypatch)
    assert max(map(len, lines)) <= width
    for name in ("single_transformer_blocks.0-5.attn.to_qkv_mlp_proj", "model.layers.0-26.self_attn.q_proj"):
        if len(name) <= 0.7 * width:
            line = next(line for line in lines if name in line)
            assert "default" in line
            assert ("nvfp4" in line) or ("bf16" in line)
    left_out = next((line for line in lines if "not shown at this width" in line), "")
    assert ("share" in left_out, "bytes before" in left_out) == {
        70: (True, True),
        80: (True, True),
        120: (False, True),
        200: (False, False),
    }[width]


def test_a_pipe_gets_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown_at(0, False, monkeypatch)
    header = next(line for line in lines if "decided by" in line)
    for column in ("out x in", "format", "share", "bytes before", "bytes after"):
        assert column in header
