"""fluxc build: the same input gives the same bytes, the cache repeats only what changed, a killed build goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from conftest import RECIPE, RecordingProgress, compile_into, quantized_by_modelopt, seed_cache
from fluxc.base.cache import ENVIRONMENT, locked
from fluxc.base.errors import BuildError, GateError, RecipeError
from fluxc.build import build as build_module
from fluxc.fidelity.compare import _check_finite
from fluxc.fidelity.gates import check_gates, check_stages, stage_bounds
from fluxc.fidelity.metrics import psnr
from fluxc.fidelity.verify import verify_bundle
from fluxc.models.base import Linear
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Gates
from fluxc.recipe.targets import OnnxRuntimeTarget
from fluxrt.bundle import open_bundle
from quick import QUICK, contents


@pytest.fixture(scope="module")
def own(quick_bundle: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick bundle in a folder with a cache of its own, which knows how it was made and nothing else."""
    folder = tmp_path_factory.mktemp("own")
    seed_cache(shared_cache, quick_bundle, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ENVIRONMENT)
        return compile_into(folder / "quick", *QUICK)


@pytest.mark.usefixtures("own_cache")
def test_nothing_runs_when_nothing_changed(own: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in own.rglob("*")}
    progress = RecordingProgress()
    compile_into(own, *QUICK, progress=progress)
    assert progress.ran == ["hash checkpoint"]
    assert {p: p.stat().st_mtime_ns for p in own.rglob("*")} == before


@pytest.mark.usefixtures("own_cache")
def test_a_build_that_changes_nothing_reads_no_weights_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It links the bundle's weights to where it puts the bundle together, which changes a file's times."""
    compile_into(own, *QUICK)
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    compile_into(own, *QUICK)
    assert [name for name in hashed if name.endswith(".safetensors") and "/evidence/" not in name] == []


@pytest.mark.usefixtures("own_cache")
def test_a_cached_build_never_imports_torch(own: Path) -> None:
    code = (
        "import sys\n"
        "from fluxc.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
    )
    arguments = ["build", str(RECIPE), "--out", str(own), *(a for c in QUICK for a in ("--set", c))]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=120)


@pytest.mark.usefixtures("own_cache")
def test_a_changed_keep_list_repeats_only_what_depends_on_it(own: Path) -> None:
    progress = RecordingProgress()
    outside = "x_embedder, context_embedder, 'time_guidance_embed*', '*modulation*', 'norm_out*', proj_out"
    keep = f"precision.transformer.exclude=[{outside}, '*.ff_context.linear_out']"
    kept = compile_into(own.parent / "kept", *QUICK, keep, progress=progress)
    assert progress.ran == [
        "hash checkpoint",
        "write transformer weights",
        "build onnxruntime",
        "build onnxruntime-exact",
        "build onnxruntime-nvfp4",
        "compare with diffusers",
    ]
    before, after = contents(own), contents(kept)
    unchanged = [n for n in before if n.split("/")[0] in ("text_encoder", "vae", "tokenizer", "scheduler")]
    assert all(before[name] == after[name] for name in unchanged)


@pytest.mark.usefixtures("own_cache")
def test_a_bundle_owns_its_weights_and_onnx_loads_its_graphs(own: Path) -> None:
    """onnx refuses external data with several hard links, so two bundles from one cache must not share a file."""
    other = compile_into(own.parent / "other", *QUICK)
    for bundle in (own, other):
        assert {p.stat().st_nlink for p in bundle.rglob("*") if p.is_file()} == {1}
        assert not [p for p in bundle.rglob("*") if p.is_symlink()]
        model = onnx.load(bundle / "transformer" / "body.onnx")
        assert all(len(i.raw_data) for i in model.graph.initializer if i.name.endswith(".weight"))
    assert contents(other) == contents(own)


@pytest.mark.usefixtures("own_cache")
def test_a_deleted_bundle_comes_back_the_same(
    own: Path, quick_bundle: Path, shared_cache: Path, tmp_path: Path
) -> None:
    seed_cache(shared_cache, quick_bundle, tmp_path)
    out = compile_into(tmp_path / "mine", *QUICK)
    shutil.rmtree(out)
    progress = RecordingProgress()
    compile_into(out, *QUICK, progress=progress)
    assert progress.ran == ["hash checkpoint"] + [f"write {c} weights" for c in ("transformer", "text_encoder", "vae")]
    assert contents(out) == contents(own)


@pytest.mark.usefixtures("own_cache")
def test_a_damaged_stage_result_is_made_again(quick_bundle: Path, shared_cache: Path, tmp_path: Path) -> None:
    seed_cache(shared_cache, quick_bundle, tmp_path)
    out = compile_into(tmp_path / "mine", *QUICK)
    expected = contents(out)
    target = out / "vae" / "diffusion_pytorch_model.safetensors"
    with target.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    progress = RecordingProgress()
    compile_into(out, *QUICK, progress=progress)
    assert "write vae weights" in progress.ran
    assert contents(out) == expected


PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
KILLED_IN = ("export-vae", "export-transformer", "calibration", "weights", "target", "fidelity", "bundle")


@pytest.mark.usefixtures("own_cache")
def test_killed_at_every_stage_ends_with_the_bytes_of_an_undisturbed_build(quick_bundle: Path, tmp_path: Path) -> None:
    """SIGKILL once in each stage, when it has begun to write its result; the next run goes on from there.

    Both are built from clean, in processes and caches that share nothing.
    """
    arguments = ["build", str(RECIPE), *(a for c in QUICK for a in ("--set", c)), "--out"]
    out = tmp_path / "killed" / "quick"
    cache = out.parent / ".fluxc"
    command = [sys.executable, str(Path(__file__).with_name("killed_in.py"))]
    with (tmp_path / "said").open("w+") as said, subprocess.Popen(command, **PIPES, stderr=said) as process:
        assert process.stdin
        assert process.stdout

        def ends(stage: str | None) -> int:
            print(json.dumps([stage, [*arguments, str(out)]]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        for stage in KILLED_IN:
            assert ends(stage) == -signal.SIGKILL, (stage, (tmp_path / "said").read_text()[-500:])
            assert not out.exists(), stage
            half = [path for path in cache.glob(f".{stage if stage != 'bundle' else out.name}*") if path.is_dir()]
            assert any(stage.startswith("export") or any(path.iterdir()) for path in half), (
                f"{stage} had written nothing"
            )
        assert ends(None) == 0, (tmp_path / "said").read_text()[-500:]
        process.stdin.close()
    first, second = contents(quick_bundle), contents(out)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert [p for p in cache.iterdir() if p.is_dir() and p.name.startswith(".")] == []


@pytest.mark.usefixtures("own_cache")
def test_a_build_that_is_terminated_leaves_nothing_half_made(tmp_path: Path) -> None:
    out, cache = tmp_path / "bundle", tmp_path / ".fluxc"
    arguments = ["build", str(RECIPE), *(a for c in QUICK for a in ("--set", c)), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "fluxc", *arguments], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list(cache.glob(".export-*")):
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert [path for path in cache.iterdir() if path.is_dir() and path.name.startswith(".")] == []
    assert not out.exists()


def test_quantized_tensors_equal_modelopt_bit_for_bit(quick_bundle: Path) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from conftest import NANO

    ours = load_file(quick_bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    source = load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = [layer for layer in open_bundle(quick_bundle).manifest.precision if layer.component == "transformer"]
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.group or layer.name, []).append(layer.name)
    quantized = [layer for layer in layers if layer.format == "nvfp4"]
    assert len(quantized) == 36
    for layer in quantized:
        members = groups[layer.group or layer.name]
        shared = torch.cat([source[f"{name}.weight"].flatten() for name in members])
        scale = NVFP4QTensor.get_weights_scaling_factor_2(shared)
        weight = source[f"{layer.name}.weight"]
        packed, scales, _ = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale)
        assert torch.equal(ours[f"{layer.name}.weight"], packed._quantized_data), layer.name
        assert torch.equal(ours[f"{layer.name}.weight_scale"].view(torch.uint8), scales.view(torch.uint8))
        assert torch.equal(ours[f"{layer.name}.weight_scale_2"], scale)
        assert ours[f"{layer.name}.input_scale"].dtype == torch.float32
    kept = [layer.name for layer in layers if layer.format == "bf16"]
    assert all(torch.equal(ours[f"{name}.weight"], source[f"{name}.weight"]) for name in kept)


def test_input_scales_equal_modelopts_own_calibration(quick_bundle: Path) -> None:
    """modelopt calibrates the same pipeline on the same prompts; its input_scale is ours, the fusion group's largest."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    pipeline = quantized_by_modelopt()
    ours = load_file(quick_bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = [
        x for x in open_bundle(quick_bundle).manifest.precision if x.component == "transformer" and x.format == "nvfp4"
    ]
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.group or layer.name, []).append(layer.name)
    for layer in layers:
        theirs = [
            NVFP4QTensor.get_activation_scaling_factor(pipeline.transformer.get_submodule(name).input_quantizer)
            for name in groups[layer.group or layer.name]
        ]
        assert ours[f"{layer.name}.input_scale"].item() == max(t.item() for t in theirs), layer.name


def test_fusion_groups_share_scales_and_lie_side_by_side(nano_bundle: Path) -> None:
    from fluxc.base.safetensors import read_header

    path = nano_bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    refs, tensors = read_header(path), load_file(path)
    block = "transformer_blocks.0.attn"
    for members in (["to_q", "to_k", "to_v"], ["add_q_proj", "add_k_proj", "add_v_proj"]):
        for name in ("weight_scale_2", "input_scale"):
            assert len({tensors[f"{block}.{member}.{name}"].item() for member in members}) == 1
        for name in ("weight", "weight_scale"):
            parts = [refs[f"{block}.{member}.{name}"] for member in members]
            assert all(b.offset == a.offset + a.nbytes for a, b in pairwise(parts))


def test_diffusers_and_onnx_read_the_bundle_to_the_same_values(nano_bundle: Path) -> None:
    from diffusers.quantizers.bfl.utils import dequantize_nvfp4

    from test_nvfp4 import onnx_dequantize

    tensors = load_file(nano_bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    for layer in ("transformer_blocks.1.ff.linear_out", "single_transformer_blocks.3.attn.to_qkv_mlp_proj"):
        parts = [tensors[f"{layer}.{name}"] for name in ("weight", "weight_scale", "weight_scale_2")]
        by_diffusers = dequantize_nvfp4(*parts)
        assert (onnx_dequantize(*parts) == by_diffusers.numpy()).all()


@pytest.mark.parametrize(
    ("target", "kind"),
    [("onnxruntime-exact", onnx.TensorProto.UINT8), ("onnxruntime-4-bit", onnx.TensorProto.FLOAT4E2M1)],
)
def test_weights_stay_quantized_in_the_session(four_bit_bundle: Path, tmp_path: Path, target: str, kind: int) -> None:
    """After ONNX Runtime's own optimization all 36 weights are there in 8 or 4 bits, and none was unfolded to fp32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    file = open_bundle(four_bit_bundle).target(target).graphs["body"].file
    onnxruntime.InferenceSession(str(four_bit_bundle / file), options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    large = [i.data_type for i in model.graph.initializer if math.prod(i.dims) >= 128 * 64]
    assert large.count(kind) == 36
    assert onnx.TensorProto.FLOAT not in large


def test_every_way_of_holding_weights_computes_the_same(four_bit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fluxrt
    from fluxrt.backends.onnxruntime import OnnxRuntimeBackend

    def image(target: str) -> np.ndarray:
        with fluxrt.load(four_bit_bundle, target=target) as pipeline:
            return np.asarray(pipeline("a red circle", seed=3, steps=3).images[0], np.float32) / 255

    in_fp32 = [image(target) for target in ("onnxruntime-exact", "onnxruntime-4-bit")]
    monkeypatch.setattr(OnnxRuntimeBackend, "_unfolds_once", lambda self: frozenset())
    as_stored = [image(target) for target in ("onnxruntime-exact", "onnxruntime-4-bit")]
    assert psnr(*in_fp32) == psnr(as_stored[0], in_fp32[0]) == psnr(as_stored[1], in_fp32[0]) == 120


@pytest.fixture(scope="module")
def four_bit_bundle(workshop: Path) -> Path:
    targets = "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, weights_in_memory: 4-bit}]"
    return compile_into(workshop / "four-bit", *QUICK, targets)


def test_mixed_formats_build_and_generate(workshop: Path) -> None:
    import fluxrt

    out = compile_into(
        workshop / "mixed",
        *QUICK,
        "precision.transformer.rules=[{match: '*.ff_context.linear_out', format: fp8}]",
        "precision.text_encoder.default=fp8",
    )
    manifest = open_bundle(out).manifest
    formats = {(layer.component, layer.format) for layer in manifest.precision}
    assert {("transformer", "fp8"), ("transformer", "nvfp4"), ("text_encoder", "fp8")} <= formats
    config = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    request = fluxrt.Request("a large red circle at the left on a white background")
    for target in manifest.targets:
        assert manifest.fidelity.targets[target.name]["step_cosine"] > 0.9
        assert fluxrt.load(out, target=target.name).generate(request).images


def test_a_missed_gate_fails_naming_figures_and_writes_no_bundle(workshop: Path) -> None:
    out = workshop / "gated"
    with pytest.raises(GateError, match=r"layer_snr_db 90.*dB.*step_cosine .* under 0\.999999") as raised:
        compile_into(out, *QUICK[:-1], "gates={layer_snr_db: 90, step_cosine: 0.999999}")
    assert raised.value.exit_code == 1
    assert not out.exists()
    kept = workshop / "gated-failed" / "report"
    assert str(raised.value).endswith(
        f"relax gates.layer_snr_db, gates.step_cosine; what was measured: {kept}/index.html"
    )
    assert "step 3 0." in str(raised.value)
    assert {"index.html", "report.json", "images"} <= {path.name for path in kept.iterdir()}
    compile_into(out, *QUICK)
    assert not kept.parent.exists(), "the next build that succeeds removes it"


def test_a_report_of_a_missed_gate_takes_nobody_elses_place(workshop: Path) -> None:
    mine = workshop / "mine-failed"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    with pytest.raises(GateError, match=r"what was measured: .*/mine-failed-2/report/index\.html$") as raised:
        compile_into(workshop / "mine", *QUICK[:-1], "gates={step_cosine: 0.999999}")
    assert Path(str(raised.value).rpartition(": ")[2]).is_file()
    assert [path.name for path in mine.iterdir()] == ["notes"]


def test_a_missed_gate_names_the_worst_steps_images_and_layers() -> None:
    prompts = [
        {"prompt": "a dot", "step_cosine": [0.999, 0.97, 0.95], "image_psnr_db": 41.0},
        {"prompt": "a ring", "step_cosine": [0.999, 0.96, 0.99], "image_psnr_db": 33.0},
    ]
    figures = {"onnxruntime": {"step_cosine": 0.95, "image_psnr_db": 37.0, "prompts": prompts}}
    layers = {f"layer{number}": 20.0 - number for number in range(6)} | {"good": 30.0}
    with pytest.raises(GateError) as raised:
        check_gates(Gates(layer_snr_db=21, step_cosine=0.98, image_psnr_db=40), layers, figures)
    assert str(raised.value) == (
        "gates: 6 layers under layer_snr_db 21: layer5 15.00 dB, layer4 16.00 dB, layer3 17.00 dB, layer2 18.00 dB, "
        "and 2 more; "
        "target onnxruntime: step_cosine 0.95 under 0.98 (2 steps: step 3 0.95 for 'a dot', step 2 0.96 for 'a ring'); "
        "target onnxruntime: image_psnr_db 37.0 under 40 (1 of 2 images: 33.0 dB for 'a ring'). No bundle was written; "
        "keep the layers that lose most in higher precision (precision.transformer.exclude, or a rule with format: fp8), or "
        "let `exclude: auto` choose them; or, if this loss is acceptable, relax gates.layer_snr_db, gates.step_cosine, "
        "gates.image_psnr_db"
    )


def test_a_figure_that_is_nan_misses_its_gate() -> None:
    figures = {"target": {"step_cosine": float("nan"), "image_psnr_db": 50.0}}
    with pytest.raises(GateError, match=r"step_cosine nan under 0\.9"):
        check_gates(Gates(step_cosine=0.9, image_psnr_db=20), {}, figures)
    with pytest.raises(GateError, match="layer nan dB"):
        check_gates(Gates(layer_snr_db=15), {"layer": float("nan")}, {})
    check_gates(Gates(step_cosine=0.9), {}, {"target": {"step_cosine": 0.9}})


def entry(component: str, name: str, format: str) -> LayerPlan:
    return LayerPlan(component, Linear(name, 32, 32), format, "default", 2048)


PLAIN = {"text_encoder": [entry("text_encoder", "model.layers.0.mlp.up_proj", "bf16")], "transformer": []}
OF_FP32 = {"text_error": 1e-5, "prologue_error": 1e-5, "decode_error": 1e-5}


@pytest.mark.parametrize(
    ("figure", "error", "stage"),
    [
        ("text_error", 1.78, "text encoder"),
        ("text_error", 0.05, "text encoder"),
        ("prologue_error", 0.02, "prologue"),
        ("decode_error", 0.002, "decoder"),
        ("decode_error", float("nan"), "decoder"),
    ],
)
def test_an_error_that_rounding_does_not_explain_fails_whatever_the_gates(
    figure: str, error: float, stage: str
) -> None:
    bounds = {"onnxruntime": stage_bounds(OnnxRuntimeTarget(), "float32", PLAIN)}
    check_stages({"onnxruntime": OF_FP32}, bounds)
    with pytest.raises(
        GateError, match=rf"target onnxruntime: the {stage} is {error} from diffusers.*float32 explains"
    ):
        check_stages({"onnxruntime": {**OF_FP32, figure: error}}, bounds)


def test_what_rounding_explains_follows_dtypes_and_formats() -> None:
    target = OnnxRuntimeTarget()
    fp8 = {**PLAIN, "text_encoder": [entry("text_encoder", "model.layers.0.mlp.up_proj", "fp8")]}
    nvfp4 = [entry("transformer", name, "nvfp4") for name in ("transformer_blocks.0.attn.to_k", "proj_out")]
    prologue = [entry("transformer", "x_embedder", "nvfp4")]
    errors = [
        {figure: bound.error for figure, bound in stage_bounds(target, reference, plans).items()}
        for reference, plans in [
            ("float32", PLAIN),
            ("bfloat16", PLAIN),
            ("float32", fp8),
            ("float32", {**PLAIN, "transformer": nvfp4}),
            ("float32", {**PLAIN, "transformer": prologue}),
        ]
    ]
    assert [found["text_error"] for found in errors] == [1e-3, 0.15, 0.3, 1e-3, 1e-3]
    assert [found["prologue_error"] for found in errors] == [1e-3, 0.15, 1e-3, 1e-3, 0.6]
    assert [found["decode_error"] for found in errors] == [1e-3, 0.15, 1e-3, 1e-3, 1e-3]
    on_gpu = stage_bounds(OnnxRuntimeTarget(device="cuda", dtype="float16"), "float32", PLAIN)
    assert on_gpu["text_error"].error == 0.02


@pytest.mark.usefixtures("quick_bundle")
def test_no_bundle_is_written_of_a_stage_at_fault(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose reference read other weights; here rounding is to explain next to nothing."""
    compared = build_module.stage_bounds
    monkeypatch.setattr(
        build_module, "stage_bounds", lambda *of: {k: replace(b, error=1e-9) for k, b in compared(*of).items()}
    )
    with pytest.raises(GateError, match=r"the text encoder is .* from diffusers"):
        compile_into(workshop / "at-fault", *QUICK)
    assert not (workshop / "at-fault").exists()


def test_a_target_that_computes_nan_is_named() -> None:
    with pytest.raises(BuildError, match=r"target t: the velocities for 'a' hold NaN or infinity \(entry 1 of 2\)"):
        _check_finite("t", "velocities", "a", [np.zeros(2), np.array([0, np.nan])])


@pytest.mark.parametrize("field", ["calibration", "fidelity"])
def test_a_prompt_too_long_to_compile_is_named_not_cut(tmp_path: Path, field: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" + "a red circle " * 20 + "\n")
    with pytest.raises(RecipeError, match=rf"{field}\.prompts: the prompt 'a red circle a red .*text\.length is 32"):
        compile_into(tmp_path / "out", *QUICK, f"{field}.prompts={prompts}")


def test_a_folder_that_is_not_a_bundle_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "work.txt").write_text("keep me")
    with pytest.raises(RecipeError, match="exists and is not a bundle"):
        compile_into(out, *QUICK)
    assert (out / "work.txt").read_text() == "keep me"


def test_two_builds_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(BuildError, match="another fluxc build is making it"):
        compile_into(tmp_path / "out", *QUICK)


def test_a_component_in_several_files_computes_the_same(quick_bundle: Path, workshop: Path) -> None:
    """Graphs point into every file, the index is diffusers' own, and only the split component's files differ."""
    from diffusers import AutoencoderKLFlux2

    import fluxrt

    split = compile_into(workshop / "split", *QUICK, f"weights.shard_gib={1.2e6 / 2**30}")
    components = open_bundle(split).manifest.components
    assert {name for name, file in components.items() if file.endswith(".index.json")} == {"transformer", "vae"}
    files = sorted((split / "transformer").glob("*-of-*.safetensors"))
    assert len(files) > 1
    whole = load_file(quick_bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {n: t.view(torch.uint8).tolist() for n, t in parts.items() if t.ndim == 2} == {
        n: t.view(torch.uint8).tolist() for n, t in whole.items() if t.ndim == 2
    }
    images = [
        fluxrt.load(bundle, target="onnxruntime-nvfp4")
        .generate(fluxrt.Request("a small red ring", seed=3))
        .images[0]
        .tobytes()
        for bundle in (quick_bundle, split)
    ]
    assert images[0] == images[1]
    vaes = [AutoencoderKLFlux2.from_pretrained(bundle / "vae").state_dict() for bundle in (quick_bundle, split)]
    assert all(torch.equal(vaes[0][name], vaes[1][name]) for name in vaes[0])
    assert list(verify_bundle(split))
