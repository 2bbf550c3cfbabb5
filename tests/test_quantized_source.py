"""Checkpoints that modelopt quantized are sources: their layers go through unchanged; contradictions are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from conftest import RECIPE, ROOT, RecordingProgress, compile_into, copy_checkpoint, quantized_by_modelopt
from fluxc.base.errors import BuildError, CheckpointError, RecipeError
from fluxc.calibrate.simulated import Rounded, simulated
from fluxc.checkpoint.reference import Generation, generate, load_pipeline
from fluxc.checkpoint.source import open_checkpoint
from fluxc.formats import nvfp4
from fluxc.quantize.source import Source, read_source
from fluxc.recipe.load import load_recipe
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement
from fluxrt.bundle import open_bundle
from quick import QUICK
from test_nvfp4 import activation_model

TENSORS = "diffusion_pytorch_model.safetensors"
OUTSIDE = ("x_embedder", "context_embedder", "time_guidance_embed", "modulation", "norm_out", "proj_out")
LAYER = "transformer_blocks.1.attn.to_k"
FP8 = {"num_bits": (4, 3), "axis": None}
MODELOPT = "quantized in the checkpoint (modelopt)"


def export(folder: Path, *extra: dict[str, Any]) -> Path:
    """flux2-nano with its transformer quantized, calibrated on two prompts and exported by modelopt, on the CPU."""
    from modelopt.torch.export import export_hf_checkpoint

    outside = [{"quantizer_name": f"*{name}*", "enable": False} for name in OUTSIDE]
    pipeline = quantized_by_modelopt(*outside, *extra)
    copy_checkpoint(folder)
    shutil.rmtree(folder / "transformer")
    export_hf_checkpoint(pipeline.transformer, export_dir=folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("modelopt") / "nvfp4")


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def bundle(exported: Path, workshop: Path) -> tuple[Path, RecordingProgress]:
    progress = RecordingProgress()
    gates = "gates={layer_snr_db: 15, step_cosine: 0.98, image_psnr_db: 25}"
    return compile_into(
        workshop / "from-modelopt", f"model.source={exported}", *QUICK, gates, progress=progress
    ), progress


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "transformer" / TENSORS
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def opened(folder: Path, *changes: str) -> Source:
    return read_source(load_recipe(RECIPE, (f"model.source={folder}", *changes)))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_modelopts_tensors_go_through_byte_for_byte_without_calibration(
    exported: Path, bundle: tuple[Path, RecordingProgress]
) -> None:
    folder, progress = bundle
    assert "calibrate" not in progress.ran
    theirs, ours = (load_file(root / "transformer" / TENSORS) for root in (exported, folder))
    assert sorted(theirs) == sorted(ours)
    assert [name for name in theirs if raw(theirs[name]) != raw(ours[name])] == []
    assert sum(layer.rule == MODELOPT for layer in open_bundle(folder).manifest.precision) == 36


def test_the_bundle_says_what_is_not_known(bundle: tuple[Path, RecordingProgress]) -> None:
    folder, _ = bundle
    layers = json.loads((folder / "report" / "report.json").read_text())["layers"]
    assert sum(layer["quantized_in_checkpoint"] for layer in layers) == 36
    assert {layer["snr_db"] for layer in layers} == {None}
    assert "quantized in the checkpoint" in (folder / "report" / "index.html").read_text()
    said = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert (said["quant_algo"], said["producer"]) == ("NVFP4", {"name": "fluxc"})
    assert "proj_out" in said["ignore"]


def test_the_bundle_computes_what_diffusers_computes_with_modelopts_dequantized_weights(
    exported: Path, bundle: tuple[Path, RecordingProgress]
) -> None:
    """The reference's weights are those that modelopt itself gives back, and the graphs follow it to rounding errors."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensors = load_file(exported / "transformer" / TENSORS)
    model = load_pipeline(open_checkpoint(str(exported), None, ROOT), torch.float32).transformer
    weight, scale, double = (tensors[f"{LAYER}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
    by_modelopt = NVFP4QTensor(shape, torch.float32, weight).dequantize(
        dtype=torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16}
    )
    assert torch.equal(model.get_submodule(LAYER).weight, by_modelopt)
    figures = open_bundle(bundle[0]).manifest.fidelity.targets["onnxruntime-exact"]
    assert figures["step_cosine"] > 0.99999
    assert figures["image_psnr_db_worst"] > 50


def test_fp8_and_nvfp4_layers_mixed_go_through(tmp_path: Path, workshop: Path) -> None:
    parts = [{"quantizer_name": f"*ff_context.linear_out*{kind}_quantizer", "cfg": FP8} for kind in ("weight", "input")]
    source = export(tmp_path / "mixed", *parts)
    config = json.loads((source / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    out = compile_into(workshop / "from-mixed", f"model.source={source}", *QUICK)
    formats = {layer.name: layer.format for layer in open_bundle(out).manifest.precision}
    assert [formats[f"transformer_blocks.{n}.ff_context.linear_out"] for n in (0, 1)] == ["fp8", "fp8"]
    theirs, ours = (load_file(root / "transformer" / TENSORS) for root in (source, out))
    assert [name for name in theirs if raw(theirs[name]) != raw(ours[name])] == []
    assert open_bundle(out).manifest.fidelity.targets["onnxruntime-exact"]["step_cosine"] > 0.9999


def test_a_bundle_is_a_source_and_gives_the_same_weights(quick_bundle: Path, workshop: Path) -> None:
    again = compile_into(workshop / "again", f"model.source={quick_bundle}", *QUICK)
    for part in ("transformer", "text_encoder"):
        first, second = (load_file(next((root / part).glob("*.safetensors"))) for root in (quick_bundle, again))
        assert sorted(first) == sorted(second)
        assert [name for name in first if raw(first[name]) != raw(second[name])] == []


def test_a_quantized_text_encoder_is_a_source_too(workshop: Path) -> None:
    """Its config names what stays bf16: the layer that is stored and never run, and the head that is not stored."""
    fp8 = ("precision.text_encoder={default: fp8}", "precision.transformer={default: bf16}", *QUICK[:3], "gates={}")
    first = compile_into(workshop / "fp8-text", *fp8)
    said = json.loads((first / "text_encoder" / "config.json").read_text())["quantization_config"]
    assert said["quant_algo"] == "FP8"
    assert "lm_head" in said["ignore"]
    assert "model.layers.27.mlp.down_proj" in said["ignore"]
    assert not any(name.startswith("model.layers.26.") for name in said["ignore"])
    progress = RecordingProgress()
    changes = (f"model.source={first}", "precision.transformer={default: bf16}", *QUICK[:3], "gates={}")
    second = compile_into(workshop / "fp8-text-again", *changes, progress=progress)
    assert "calibrate" not in progress.ran + progress.found
    one, two = (load_file(root / "text_encoder" / "model.safetensors") for root in (first, second))
    assert {name: raw(tensor) for name, tensor in one.items()} == {name: raw(tensor) for name, tensor in two.items()}
    for bundle, least in ((first, 30.0), (second, 50.0)):
        figures = open_bundle(bundle).manifest.fidelity.targets["onnxruntime-exact"]
        assert figures["image_psnr_db"] > least


def test_awq_and_svdquant_tensors_are_computed_with(damaged: Path, workshop: Path) -> None:
    """As modelopt's SVDQuantLinear.forward: x p Q^T + (x p a^T) b^T. The factors here are random, and large."""
    generator = torch.Generator().manual_seed(0)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (LAYER, "single_transformer_blocks.2.attn.to_out"):
            rows, columns = tensors[f"{layer}.weight"].shape[0], 2 * tensors[f"{layer}.weight"].shape[1]
            tensors[f"{layer}.pre_quant_scale"] = torch.rand(columns, generator=generator) + 0.5
            tensors[f"{layer}.svdquant_lora_a"] = torch.randn(4, columns, generator=generator).bfloat16() / 16
            tensors[f"{layer}.svdquant_lora_b"] = torch.randn(rows, 4, generator=generator).bfloat16() / 4

    plain = load_pipeline(open_checkpoint(str(damaged), None, ROOT), torch.float32).transformer.get_submodule(LAYER)
    change(damaged, add)
    change_config(damaged, lambda c: c["quantization_config"].update(quant_algo="NVFP4_SVD"))
    tensors = load_file(damaged / "transformer" / TENSORS)
    folded = load_pipeline(open_checkpoint(str(damaged), None, ROOT), torch.float32).transformer.get_submodule(LAYER)
    x = torch.randn(5, 128, generator=generator)
    scaled = x * tensors[f"{LAYER}.pre_quant_scale"]
    factors = [tensors[f"{LAYER}.svdquant_lora_{side}"].float() for side in "ab"]
    expected = plain(scaled) + scaled @ factors[0].T @ factors[1].T
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)

    out = compile_into(workshop / "from-svdquant", f"model.source={damaged}", *QUICK)
    said = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert said["quantized_layers"][LAYER] == {"quant_algo": "NVFP4_SVD"}
    figures = open_bundle(out).manifest.fidelity.targets
    assert figures["onnxruntime-exact"]["step_cosine"] > 0.9999
    assert figures["onnxruntime-nvfp4"]["step_cosine"] > 0.9
    assert {
        entry.layer.group for entry in opened(damaged).plans["transformer"] if ".1.attn.to_" in entry.layer.name
    } == {None}


@pytest.mark.parametrize("parts", [(), ("pre_quant_scale",), ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")])
def test_inputs_are_simulated_under_the_scales_that_the_checkpoint_holds(damaged: Path, parts: tuple[str, ...]) -> None:
    """Q(x p) Q(w)^T + (x p a^T) b^T: rounded by ONNX's reference evaluator in the function that the CPU target uses."""
    generator = torch.Generator().manual_seed(1)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        rows, columns = tensors[f"{LAYER}.weight"].shape[0], 2 * tensors[f"{LAYER}.weight"].shape[1]
        made = {
            "pre_quant_scale": torch.rand(columns, generator=generator) + 0.5,
            "svdquant_lora_a": torch.randn(4, columns, generator=generator).bfloat16() / 16,
            "svdquant_lora_b": torch.randn(rows, 4, generator=generator).bfloat16() / 4,
        }
        tensors.update({f"{LAYER}.{name}": made[name] for name in parts})

    change(damaged, add)
    how = {"svdquant_lora_a": "NVFP4_SVD", "pre_quant_scale": "NVFP4_AWQ"}
    algorithm = next((how[name] for name in reversed(parts) if name in how), "NVFP4")
    change_config(damaged, lambda c: c["quantization_config"].update(quant_algo=algorithm))
    source = opened(damaged)
    rounded = Rounded(source.plans["transformer"], "max", True)
    assert {entry.layer.name for entry in rounded.layers} == {
        entry.layer.name for entry in rounded.plan if entry.quantized_in_source
    }
    tensors = load_file(damaged / "transformer" / TENSORS)
    stored = {name: tensors[f"{LAYER}.{name}"].float() for name in parts}
    plain = nvfp4.dequantize(*(tensors[f"{LAYER}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")))
    x = torch.randn(5, plain.shape[1], generator=generator)
    scaled = x * stored.get("pre_quant_scale", torch.ones(1))
    expected = rounded_by_onnx(scaled, tensors[f"{LAYER}.input_scale"]) @ plain.T
    if "svdquant_lora_a" in parts:
        expected = expected + scaled @ stored["svdquant_lora_a"].T @ stored["svdquant_lora_b"].T
    model = ReferenceModel(source.checkpoint, Placement("cpu", torch.float32, "component"))
    with model.component("transformer") as transformer:
        linear = transformer.module.get_submodule(LAYER)
        before = linear(x)
        with simulated(source.checkpoint, "transformer", transformer, {"transformer": rounded}):
            found = linear(x)
        assert torch.equal(linear(x), before)
    bias = 0 if linear.bias is None else linear.bias
    torch.testing.assert_close(found, expected + bias, rtol=1e-4, atol=1e-4)
    assert (before - found).abs().max() > 1e-3


def rounded_by_onnx(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """NVFP4FakeQuantize of `x`, whose columns are whole blocks."""
    feeds = {"x": x.numpy(), "input_scale": scale.float().reshape(()).numpy()}
    return torch.from_numpy(ReferenceEvaluator(activation_model()).run(None, feeds)[0])


def test_members_whose_scales_differ_leave_their_fusion_group(damaged: Path) -> None:
    change(damaged, lambda t: t[f"{LAYER}.input_scale"].mul_(2))
    plan = {entry.layer.name: entry for entry in opened(damaged).plans["transformer"]}
    for member in ("to_q", "to_k", "to_v"):
        entry = plan[f"transformer_blocks.1.attn.{member}"]
        assert entry.layer.group is None
        assert "its scales differ there" in entry.rule
    assert plan["transformer_blocks.0.attn.to_k"].layer.group


def test_default_does_not_quantize_what_the_checkpoint_left_alone_but_a_rule_does(exported: Path) -> None:
    plan = opened(exported, "precision.transformer={default: nvfp4}").plans["transformer"]
    left = [entry for entry in plan if not entry.quantized_in_source]
    assert {entry.format for entry in left} == {"bf16"}
    assert all("default does not apply" in entry.rule for entry in left)
    rules = "precision.transformer={default: bf16, rules: [{match: proj_out, format: fp8}]}"
    source = opened(exported, rules)
    assert {e.layer.name: e.format for e in source.plans["transformer"]}["proj_out"] == "fp8"
    assert source.quantizes


@pytest.mark.parametrize(
    "precision",
    [f"{{exclude: ['{LAYER}']}}", f"{{rules: [{{match: '{LAYER}', format: fp8}}]}}", "{preset: nvidia-blog}"],
)
def test_another_format_for_a_quantized_layer_is_refused(exported: Path, precision: str) -> None:
    with pytest.raises(RecipeError, match=r"is nvfp4 in the checkpoint, which is not undone"):
        opened(exported, f"precision.transformer={precision}")


def test_scalars_of_shape_one_are_scalars(damaged: Path) -> None:
    change(damaged, lambda t: t.update({f"{LAYER}.input_scale": t[f"{LAYER}.input_scale"].reshape(1)}))
    source = opened(damaged)
    assert source.quantized["transformer"][LAYER].tensors["input_scale"].shape == ()


def test_modelopts_other_config_file_will_do(damaged: Path) -> None:
    said: dict[str, Any] = {}
    change_config(damaged, lambda c: said.update(c.pop("quantization_config")))
    with pytest.raises(CheckpointError, match=r"neither config\.json nor hf_quant_config\.json"):
        opened(damaged)
    quantization = {"quant_algo": "NVFP4", "exclude_modules": said["ignore"]}
    (damaged / "transformer" / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    assert len(opened(damaged).quantized["transformer"]) == 36


SWIZZLED = {f"{LAYER}.weight_scale": torch.ones(128 * 8).to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.input_scale"), "nvfp4, but it has no input_scale"),
        (lambda t: t.pop(f"{LAYER}.weight_scale_2"), "nvfp4, but it has no weight_scale_2"),
        (lambda t: t.update(SWIZZLED), r"weight_scale is \[1024\], expected \[128, 8\]; a swizzled"),
        (lambda t: t[f"{LAYER}.weight_scale_2"].zero_(), r"weight_scale_2 is 0\.0"),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(128, 128).bfloat16()}),
            "not quantized, yet it has input_scale",
        ),
        (
            lambda t: t.update({f"{LAYER}.svdquant_lora_a": torch.zeros(4, 128)}),
            "one of svdquant_lora_a and svdquant_lora_b",
        ),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(128, 128, dtype=torch.int8)}), "its weight is I8"),
    ],
)
def test_incomplete_layers_are_refused_by_name(damaged: Path, edit: Callable[..., object], message: str) -> None:
    change(damaged, edit)
    with pytest.raises(CheckpointError, match=rf"layer {LAYER}: .*{message}"):
        opened(damaged)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q["ignore"].append("*.attn.to_k"), r"config says not quantized, but its weight is U8 \(nvfp4\)"),
        (lambda q: q["ignore"].remove("proj_out"), r"layer proj_out: its config says nvfp4, but its weight is BF16"),
        (lambda q: q.update(quant_algo="FP8"), r"config says fp8, but its weight is U8"),
        (lambda q: q.update(quant_algo="W4A8_AWQ"), "'W4A8_AWQ' .* is not one fluxc reads"),
        (lambda q: q.update(quant_method="bitsandbytes"), "quantized by 'bitsandbytes'"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    damaged: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_config(damaged, lambda config: edit(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=message):
        opened(damaged)


def test_calibration_by_layer_reads_dequantized_weights(exported: Path) -> None:
    checkpoint = open_checkpoint(str(exported), None, ROOT)
    generation = Generation((64, 64), 1, 1.5, 0, 32, (9, 18, 27))
    expected = generate(load_pipeline(checkpoint, torch.bfloat16), checkpoint, "a red circle", generation)
    for pieces in ("component", "layer"):
        model = ReferenceModel(checkpoint, Placement("cpu", torch.bfloat16, pieces))
        with model.component("text_encoder", generation.text_layers) as encoder:
            text, empty = model.encode(encoder, ["a red circle", ""], generation)
        with model.component("transformer") as transformer:
            (final,) = model.denoise(transformer, [text], empty, [generation])
        np.testing.assert_array_equal(model.decode(final), expected)


def test_modelopts_engine_needs_cuda_and_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BuildError, match=r"modelopt needs .*a CUDA GPU that torch sees\. Without them"):
        compile_into(tmp_path / "out", *QUICK, "calibration.engine=modelopt", "calibration.algorithm=svdquant")
    with pytest.raises(RecipeError, match=r"calibration\.algorithm: 'awq_lite' is modelopt's"):
        load_recipe(RECIPE, ("calibration.algorithm=awq_lite",))


def test_modelopts_engine_quantizes_what_the_plan_quantizes() -> None:
    """modelopt itself is asked which quantizers the config leaves on; its `max` needs no GPU."""
    import modelopt.torch.quantization as mtq

    from fluxc.calibrate.modelopt import quantize_config

    source = read_source(load_recipe(RECIPE, ("precision.transformer.rules=[{match: '*linear_out', format: fp8}]",)))
    plan = source.plans["transformer"]
    model = load_pipeline(source.checkpoint, torch.bfloat16).transformer
    mtq.quantize(model, quantize_config(plan, "max"), None)
    for entry in plan:
        module = model.get_submodule(entry.layer.name)
        for quantizer in (module.weight_quantizer, module.input_quantizer):
            bits = {"nvfp4": (2, 1), "fp8": (4, 3)}.get(entry.format)
            assert (tuple(quantizer.num_bits) if quantizer.is_enabled else None) == bits, entry.layer.name
    assert quantize_config(plan, "svdquant")["algorithm"] == {"method": "svdquant", "lowrank": 32}


def test_a_build_goes_on_from_modelopts_export(exported: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the GPU's part: the export is one made on the CPU. The reference stays the original checkpoint."""
    from fluxc.calibrate import modelopt

    asked = []

    def quantize(
        checkpoint: object, plan: list, algorithm: str, prompts: list[str], generation: Generation, out: Path
    ) -> None:
        asked.append((algorithm, len(prompts), {entry.layer.name for entry in plan if entry.format == "bf16"}))
        shutil.copytree(exported / "transformer", out)

    monkeypatch.setattr(modelopt, "check_available", lambda: None)
    monkeypatch.setattr(modelopt, "quantize_transformer", quantize)
    engine = ("calibration.engine=modelopt", "calibration.algorithm=awq_lite")
    out = compile_into(workshop / "by-modelopt", *QUICK, *engine)
    assert [(algorithm, prompts, len(kept)) for algorithm, prompts, kept in asked] == [("awq_lite", 2, 9)]
    theirs, ours = (load_file(root / "transformer" / TENSORS) for root in (exported, out))
    assert [name for name in theirs if raw(theirs[name]) != raw(ours[name])] == []
    figures = open_bundle(out).manifest.fidelity.targets["onnxruntime-exact"]
    assert 0.98 < figures["step_cosine"] < 0.9999
