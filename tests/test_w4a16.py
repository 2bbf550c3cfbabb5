"""`nvfp4-w4a16`: the weight of an NVFP4 layer, with inputs that nothing rounds; by layer, in one bundle with NVFP4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import RECIPE, compile_into
from fluxc.base.errors import RecipeError
from fluxc.base.progress import StageProgress
from fluxc.base.safetensors import TensorRef
from fluxc.build.build import build
from fluxc.checkpoint.quantized import format_of, quantized_layers
from fluxc.checkpoint.source import open_checkpoint
from fluxc.formats.registry import FORMATS, multiplied_in
from fluxc.predict.gpus import GPUS
from fluxc.predict.rates import ASSUMED, step_time
from fluxc.predict.work import work_of
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.source import read_source
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import ComponentPrecision, Rule
from fluxc.report.structs import REPORT_JSON
from fluxc.targets.sharding import Shards
from fluxc.targets.tensorrt.audit import Expected, Runs, compare
from fluxrt.bundle import open_bundle
from quick import QUICK

ATTENDING = 'rules=[{match: "*.to_qkv_mlp_proj", format: nvfp4-w4a16}, {match: "*.to_[qkv]", format: nvfp4-w4a16}]'
BOTH = "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, activations: nvfp4}]"
FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def all_of_it(workshop: Path) -> Path:
    return compile_into(workshop / "w4a16", *QUICK, BOTH, "precision.transformer.default=nvfp4-w4a16")


@pytest.fixture(scope="module")
def some_of_it(workshop: Path) -> Path:
    return compile_into(workshop / "w4a16-some", *QUICK, BOTH, f"precision.transformer.{ATTENDING}")


def errors(bundle: Path) -> dict[str, float]:
    targets = json.loads((bundle / REPORT_JSON).read_text())["targets"]
    return {name.removeprefix("onnxruntime-"): figures["step_error"] for name, figures in targets.items()}


def test_its_tensors_are_nvfp4s_without_an_input_scale(quick_bundle: Path, all_of_it: Path) -> None:
    nvfp4, ours = load_file(quick_bundle / FILE), load_file(all_of_it / FILE)
    assert {name for name in nvfp4 if not name.endswith(".input_scale")} == set(ours)
    assert all(
        torch.equal(tensor.view(torch.uint8), nvfp4[name].view(torch.uint8))
        for name, tensor in ours.items()
        if tensor.ndim
    )
    assert len(ours) < len(nvfp4)


def test_nothing_rounds_its_inputs(quick_bundle: Path, all_of_it: Path, some_of_it: Path) -> None:
    """Where all layers are so, rounding inputs changes no bit; where some are, the error lies between."""
    every = errors(all_of_it)
    assert every["nvfp4"] == every["exact"] == errors(quick_bundle)["exact"]
    assert every["exact"] < errors(some_of_it)["nvfp4"] < errors(quick_bundle)["nvfp4"]


def test_no_calibration_is_needed_for_it(tmp_path: Path) -> None:
    changes = (*QUICK, "calibration.engine=none", "precision.transformer.default=nvfp4-w4a16")
    build(load_recipe(RECIPE, changes), tmp_path / "bundle", StageProgress(), "weights")


def test_a_bundle_of_both_is_a_checkpoint(some_of_it: Path) -> None:
    """With ModelOpt's own words for both, read again layer by layer."""
    config = json.loads((some_of_it / "transformer" / "config.json").read_text())["quantization_config"]
    words = {"nvfp4": "NVFP4", "nvfp4-w4a16": "W4A16_NVFP4", "bf16": None}
    layers = {layer.name: words[layer.format] for layer in open_bundle(some_of_it).manifest.precision}
    said = {name: entry["quant_algo"] for name, entry in config["quantized_layers"].items()}
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert said == {name: word for name, word in layers.items() if word and name in said}
    assert set(said.values()) == {"NVFP4", "W4A16_NVFP4"}
    (group,) = [group for group in config["config_groups"].values() if "input_activations" not in group]
    assert group["weights"] == {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    found = quantized_layers(
        open_checkpoint(str(some_of_it), None, some_of_it).components["transformer"],
        [entry.layer for entry in read_source(load_recipe(RECIPE)).plans["transformer"]],
    )
    assert {name: layer.format for name, layer in found.items()} == {
        name: next(format for format, own in words.items() if own == word) for name, word in said.items()
    }


def test_modelopts_own_layers_are_recognised() -> None:
    from modelopt.torch.export.model_config import QUANTIZATION_W4A16_NVFP4

    assert FORMATS["nvfp4-w4a16"].algorithm == QUANTIZATION_W4A16_NVFP4.upper()
    stored = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"}
    for dtypes, name in ((stored, "nvfp4-w4a16"), (stored | {"input_scale": "F32"}, "nvfp4")):
        refs = {f"one.{part}": TensorRef(part, dtype, (), Path(), 0, 0) for part, dtype in dtypes.items()}
        found = format_of(refs, "one")
        assert found is not None
        assert found.name == name


def test_the_audit_holds_an_engine_to_it() -> None:
    expected = Expected({"one": "nvfp4-w4a16", "other": "nvfp4"}, (), ())
    for runs_as, faults in (
        ({"one": "bf16", "other": "nvfp4"}, []),
        ({"one": "nvfp4", "other": "nvfp4"}, ["planned nvfp4-w4a16, runs as nvfp4 (gemm)"]),
        ({"one": "bf16", "other": "bf16"}, ["planned nvfp4, runs as bf16 (gemm)"]),
    ):
        found = compare(expected, "kernel", lambda name, how=runs_as: Runs(name, how[name], "gemm"), lambda _: True)
        assert [finding.text for finding in found.faults] == faults


def test_a_gpu_multiplies_it_in_bf16() -> None:
    """It reads fewer bytes than bf16 and computes as much; a GPU without FP4 can run it."""
    from fluxc.models.flux2_transformer import Flux2Transformer
    from fluxc.models.published import KLEIN_4B

    model = Flux2Transformer.read(KLEIN_4B)
    shards = Shards(1, (1024, 1024), model.num_attention_heads, 512, 4096, 0, 0)
    times, flop = {}, {}
    for format in ("bf16", "nvfp4-w4a16", "nvfp4"):
        plan = precision_plan("transformer", model.linears, ComponentPrecision(default=format))
        work = work_of(model, plan, shards, 1)
        times[format], flop[format] = step_time(work, GPUS["b200"], ASSUMED), work.flop
    assert len(set(flop.values())) == 1
    assert times["nvfp4"].gemms < times["nvfp4-w4a16"].gemms == pytest.approx(times["bf16"].gemms, rel=0.01)
    assert times["nvfp4-w4a16"].memory > times["bf16"].memory
    assert multiplied_in("nvfp4-w4a16") == "bf16"


def test_visual_gen_refuses_it(tmp_path: Path) -> None:
    changes = (*QUICK, "precision.transformer.default=nvfp4-w4a16", "targets=[{kind: visual_gen}]")
    with pytest.raises(RecipeError, match="VisualGen does not take nvfp4-w4a16"):
        build(load_recipe(RECIPE, changes), tmp_path / "bundle", StageProgress())


def test_members_of_a_fusion_group_agree() -> None:
    layers = [entry.layer for entry in read_source(load_recipe(RECIPE)).plans["transformer"]]
    rules = (Rule("transformer_blocks.0.attn.to_q", "nvfp4-w4a16"),)
    plan = precision_plan("transformer", layers, ComponentPrecision(default="nvfp4", rules=rules))
    found = {entry.layer.name.rpartition(".")[2] for entry in plan if entry.format == "nvfp4-w4a16"}
    assert found == {"to_q", "to_k", "to_v"}
