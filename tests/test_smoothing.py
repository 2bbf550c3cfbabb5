"""`smoothing`: inputs times p, weights over p, from the fit to what targets compute, against torch, modelopt's layer and ONNX's
evaluator."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from conftest import NANO, RECIPE, compile_into
from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.progress import StageProgress
from fluxc.base.safetensors import read_header
from fluxc.build.build import build
from fluxc.calibrate import smoothing as smoothing_of_groups
from fluxc.calibrate.calls import Calls
from fluxc.calibrate.file import read_calibration, read_calls
from fluxc.calibrate.moments import Moments
from fluxc.calibrate.records import LayerInputs
from fluxc.calibrate.sensitivity import Simulation
from fluxc.calibrate.smoothing import Ranges
from fluxc.calibrate.solve import Problem, solve_component
from fluxc.calibrate.solve_needs import solving
from fluxc.checkpoint.quantized import quantized_layers
from fluxc.checkpoint.source import open_checkpoint
from fluxc.formats import nvfp4
from fluxc.formats.low_rank import A, B
from fluxc.formats.smoothing import LARGEST, PRE_QUANT_SCALE, fit, values_of
from fluxc.graph.bind import bind
from fluxc.models.base import Linear
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import KLEIN_4B
from fluxc.predict.work import work_of
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.quantize.solved import Solved
from fluxc.quantize.source import read_source
from fluxc.quantize.writer import planned_tensors, write_weights
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import Calibration, ComponentPrecision, LowRank, Rule
from fluxc.rehearsal.operators import read_tensor
from fluxc.report.structs import REPORT_JSON
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement
from fluxc.targets.onnxruntime.lower import lower
from fluxc.targets.sharding import Shards
from fluxc.targets.tensorrt.build import check_group_scales
from fluxc.targets.tensorrt.cut import Component
from fluxc.targets.tensorrt.lower import lower_tensorrt
from fluxrt.bundle import open_bundle
from quick import QUICK, results_of
from test_nvfp4 import activation_model

RANK = 16
ALL = f'precision.transformer.low_rank=[{{match: "*", rank: {RANK}}}]'
GPTQ = "precision.transformer.rounding=gptq"
AUTO = "precision.transformer.smoothing=auto"
BOTH = "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, activations: nvfp4}]"
ENGINES = ("targets=[{kind: tensorrt_rtx}]", "fidelity.level=none")
FILE = "transformer/diffusion_pytorch_model.safetensors"
GROUP = "transformer_blocks.1.attn.to_qkv"
FUSED = [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"]
ALONE = "single_transformer_blocks.3.attn.to_out"


@pytest.fixture(scope="module")
def ours(workshop: Path) -> Path:
    return compile_into(workshop / "smoothed", *QUICK, ALL, GPTQ, AUTO, BOTH)


@pytest.fixture(scope="module")
def calibration(quick_bundle: Path, shared_cache: Path) -> Path:
    (made,) = (path for path in results_of(shared_cache, quick_bundle) if path.name.startswith("calibration-"))
    return made / "calibration.safetensors"


@pytest.fixture(scope="module")
def calls(calibration: Path) -> Calls:
    return read_calls(calibration)["transformer"]


@pytest.fixture(scope="module")
def records(calibration: Path) -> dict[str, LayerInputs]:
    return read_calibration(calibration).records["transformer"]


def nano_layers() -> list[Linear]:
    return [entry.layer for entry in read_source(load_recipe(RECIPE)).plans["transformer"]]


def plan_of(*rules: Rule, rounding: Any = "gptq", low_rank: int = RANK) -> list[LayerPlan]:
    entries = (LowRank("*", low_rank),) if low_rank else ()
    precision = ComponentPrecision("nvfp4", rules=rules, low_rank=entries, rounding=rounding, smoothing="auto")
    return precision_plan("transformer", nano_layers(), precision)


def figures_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / REPORT_JSON).read_text())
    return found


def roundings_of(bundle: Path) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer["rounding"] for layer in figures_of(bundle)["layers"] if layer["rounding"]}


def rounded_by_onnx(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    feeds = {"x": x.numpy(), "input_scale": scale.float().reshape(()).numpy()}
    return torch.from_numpy(ReferenceEvaluator(activation_model()).run(None, feeds)[0])


def dequantized(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Q, by modelopt's own dequantizer."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight, scale, double = (stored[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    shape = torch.Size((len(weight), 2 * weight.shape[1]))
    found: torch.Tensor = NVFP4QTensor(shape, torch.float32, weight).dequantize(
        dtype=torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16}
    )
    return found


def computed(stored: dict[str, torch.Tensor], name: str, x: torch.Tensor, rounds: bool) -> torch.Tensor:
    """q(x p) Q^T + (x p a^T) b^T in fp64, from what a bundle stores."""
    behind = x * stored[f"{name}.{PRE_QUANT_SCALE}"].float()
    given = rounded_by_onnx(behind, stored[f"{name}.input_scale"]) if rounds else behind
    low = behind.double() @ stored[f"{name}.{A}"].double().T @ stored[f"{name}.{B}"].double().T
    return given.double() @ dequantized(stored, name).double().T + low


# The fit.


def test_inputs_and_weights_come_out_of_equal_size() -> None:
    rng = np.random.default_rng(0)
    inputs, weights = (np.exp(rng.normal(0, 1.5, 256)).astype(np.float32) for _ in range(2))
    p = torch.from_numpy(values_of(fit(inputs, weights)))
    assert torch.equal(p, p.bfloat16().float())
    ratio = (torch.from_numpy(inputs) * p) / (torch.from_numpy(weights) / p)
    assert float((ratio / ratio.log().mean().exp() - 1).abs().max()) < 2**-7
    assert float(p.log().mean().abs()) < 2**-8


def test_channels_that_say_nothing_stay_as_they_are() -> None:
    inputs, weights = np.array([0, 3, 1, 2], np.float32), np.array([1, 0, 4, 2], np.float32)
    # sqrt(4 / 1) and sqrt(2 / 2) over their geometric mean.
    assert values_of(fit(inputs, weights)).tolist() == pytest.approx([1, 1, 2**0.5, 0.5**0.5], rel=2**-8)
    for bad in (np.inf, np.nan):
        assert values_of(fit(np.array([1, bad], np.float32), np.array([2, 1], np.float32))).tolist() == [1, 1]
    nothing = np.zeros(4, np.float32)
    assert values_of(fit(nothing, nothing)).tolist() == [1] * 4
    extreme = values_of(fit(np.array([1e-30, 1e30], np.float32), np.ones(2, np.float32)))
    assert extreme.tolist() == [LARGEST, 1 / LARGEST]


# The plan.


def test_layers_that_are_solved_are_smoothed() -> None:
    """Those with factors; with gptq all in NVFP4, and one whose inputs are not rounded by a rule keeps its weight."""
    rules = (Rule("transformer_blocks.1.ff.linear_out", "fp8"), Rule(FUSED[1], "nvfp4-w4a16"))
    plan = {entry.layer.name: entry for entry in plan_of(*rules, low_rank=0)}
    assert not plan["transformer_blocks.1.ff.linear_out"].is_smoothed
    assert all(plan[name].is_smoothed and plan[name].format == "nvfp4-w4a16" for name in FUSED)
    assert plan[ALONE].rule == "default, smoothing"
    entry = plan[ALONE]
    assert entry.bytes_after - replace(entry, smoothing=False).bytes_after == 2 * entry.layer.in_features
    assert not replace(entry, format="mxfp4").is_smoothed
    precision = ComponentPrecision("nvfp4", low_rank=(LowRank(ALONE, RANK),), smoothing="auto")
    some = {entry.layer.name for entry in precision_plan("transformer", nano_layers(), precision) if entry.is_smoothed}
    assert some == {ALONE}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((), r"smoothing: goes with `low_rank` or `rounding: gptq`"),
        ((GPTQ, "calibration.amax=percentile"), r"smoothing: the range of smoothed inputs .* `calibration.amax: perc"),
        ((GPTQ, "targets=[{kind: onnxruntime}, {kind: openvino}]"), "no target of this recipe rounds inputs"),
        ((GPTQ, "calibration.engine=none"), "channels are smoothed against inputs that calibration saw"),
        ((GPTQ, "calibration.engine=modelopt"), "engine: modelopt quantizes these itself"),
        (
            (GPTQ, "precision.transformer.default=nvfp4-w4a16"),
            "none of the transformer's layers that are solved has rou",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_source(load_recipe(RECIPE, (AUTO, *changes)))


def test_visual_gen_refuses_it_by_name(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, (*QUICK, GPTQ, AUTO, "targets=[{kind: visual_gen}]"))
    with pytest.raises(
        RecipeError, match=r"pre_quant_scale .* has; leave precision\.transformer\.low_rank and smoothing"
    ):
        build(recipe, tmp_path / "bundle", StageProgress())


# What a build stores.


def test_tensors_are_modelopts_and_a_source_reads_them(ours: Path) -> None:
    component = open_checkpoint(str(ours), None, ours).components["transformer"]
    found = quantized_layers(component, Flux2Transformer.read(component.config).linears)
    assert {layer.tensors[PRE_QUANT_SCALE].dtype for layer in found.values()} == {"BF16"}
    assert all(layer.tensors[PRE_QUANT_SCALE].shape == layer.tensors[A].shape[1:] for layer in found.values())
    said = json.loads((ours / "transformer" / "config.json").read_text())["quantization_config"]
    assert said["quant_algo"] == "NVFP4_SVD"
    assert said["config_groups"]["group_0"]["pre_quant_scale"] is True
    entries = {entry.name: entry for entry in open_bundle(ours).manifest.precision}
    stored = read_header(ours / FILE)
    for name in (*FUSED, ALONE):
        assert entries[name].rule == f"default, low rank {RANK}, smoothing"
        parts = [ref for key, ref in stored.items() if key.rpartition(".")[0] == name]
        assert entries[name].bytes_after == sum(ref.nbytes for ref in parts)


def test_a_group_shares_its_smoothing_and_the_range_of_what_comes_out(
    ours: Path, records: dict[str, LayerInputs]
) -> None:
    stored = load_file(ours / FILE)
    for names in (FUSED, [ALONE]):
        p = stored[f"{names[0]}.{PRE_QUANT_SCALE}"]
        assert float((p.float() - 1).abs().max()) > 0.1
        assert all(torch.equal(stored[f"{name}.{PRE_QUANT_SCALE}"], p) for name in names)
        largest = (torch.from_numpy(records[names[0]].channel_amax) * p.float()).max()
        for name in names:
            assert float(stored[f"{name}.input_scale"]) == pytest.approx(float(largest) / 2688, rel=1e-6)


def test_the_parts_are_the_layer(ours: Path) -> None:
    """(Q + b a) p, by modelopt's dequantizer and by the source that reads a bundle, which reports count too."""
    from fluxc.checkpoint.dequantized import PlainTensors

    source, stored = load_file(NANO / FILE), load_file(ours / FILE)
    read = PlainTensors(open_checkpoint(str(ours), None, ours).components["transformer"], torch.float32)
    shown = {layer["name"]: layer for layer in figures_of(ours)["layers"]}
    for name in (*FUSED, ALONE):
        exact = source[f"{name}.weight"].double()
        product = stored[f"{name}.{B}"].double() @ stored[f"{name}.{A}"].double()
        plain = (dequantized(stored, name).double() + product) * stored[f"{name}.{PRE_QUANT_SCALE}"].double()
        assert torch.allclose(read[f"{name}.weight"].double(), plain, rtol=1e-5, atol=1e-6)
        ratio = 10 * torch.log10(exact.square().sum() / (exact - plain).square().sum())
        assert shown[name]["snr_db"] == pytest.approx(float(ratio), abs=0.01)
        assert shown[name]["output_snr_db"] > shown[name]["rounding"]["nearest_snr_db"]


def test_a_bundle_is_a_source_and_gives_the_same_weights(ours: Path, workshop: Path) -> None:
    again = compile_into(workshop / "smoothed-again", f"model.source={ours}", *QUICK, BOTH)
    first, second = (load_file(bundle / FILE) for bundle in (ours, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first if first[n].ndim)
    configs = [json.loads((bundle / "transformer" / "config.json").read_text()) for bundle in (ours, again)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    # Its members' p are equal, so they stay one group.
    groups = {entry.group for entry in open_bundle(again).manifest.precision if entry.name in FUSED}
    assert groups == {GROUP}
    figures = figures_of(again)["targets"]
    assert figures["onnxruntime-exact"]["step_error"] < 1e-4


def test_other_rules_solve_nothing_again(ours: Path, shared_cache: Path) -> None:
    """An FP8 layer has no smoothing, nor its range; one in NVFP4 with inputs in 16 bits keeps it."""
    rules = 'rules=[{match: "*.ff.linear_out", format: fp8}, {match: "*.to_qkv_mlp_proj", format: nvfp4-w4a16}]'
    before = {path.name for path in shared_cache.glob("rounding-*")}
    bundle = compile_into(
        ours.with_name("smoothed-ruled"), *QUICK, ALL, GPTQ, AUTO, BOTH, f"precision.transformer.{rules}"
    )
    assert {path.name for path in shared_cache.glob("rounding-*")} == before
    ruled, solved = load_file(bundle / FILE), load_file(ours / FILE)
    name, fp8 = "single_transformer_blocks.2.attn.to_qkv_mlp_proj", "transformer_blocks.0.ff.linear_out"
    for part in ("weight", A, B, PRE_QUANT_SCALE):
        assert torch.equal(ruled[f"{name}.{part}"], solved[f"{name}.{part}"])
    assert f"{name}.input_scale" not in ruled
    assert f"{fp8}.{PRE_QUANT_SCALE}" not in ruled
    shown = {layer["name"]: layer for layer in figures_of(bundle)["layers"]}
    assert shown[fp8]["snr_db"] > 25
    assert figures_of(bundle)["targets"]["onnxruntime-nvfp4"]["step_error"] < 0.1


# What is computed with it.


def test_a_layer_computes_what_modelopts_own_does(ours: Path, records: dict[str, LayerInputs]) -> None:
    """SVDQuantLinear.forward with our tensors and p; its input quantizer, which needs CUDA, is ONNX's evaluator.

    What `exclude: auto`, tune and the attribution compute with in torch is held against it.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.conversion import create_and_replace_svdquant_linear_on_the_fly

    stored, name = load_file(ours / FILE), FUSED[0]
    model = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG) | {"algorithm": None}, None)
    create_and_replace_svdquant_linear_on_the_fly(model=model)
    layer: Any = model[0]
    layer.weight_quantizer.svdquant_lora_a = stored[f"{name}.{A}"].float()
    layer.weight_quantizer.svdquant_lora_b = stored[f"{name}.{B}"].float()
    layer.input_quantizer.pre_quant_scale = stored[f"{name}.{PRE_QUANT_SCALE}"].float()
    layer.weight.data.copy_(dequantized(stored, name))
    layer.weight_quantizer.disable()
    x = torch.from_numpy(records[name].rows)
    folders = results_of(Path(os.environ["FLUXC_CACHE"]), ours)
    solved = Solved(next(path for path in folders if path.name.startswith("rounding-")))
    component = open_checkpoint(str(NANO), None, NANO).components["transformer"]
    group = [entry for entry in plan_of() if entry.layer.group == GROUP]
    scale = stored[f"{name}.input_scale"]
    amax = {(entry.layer.name, entry.format): 2688 * float(scale) for entry in group}
    placement = Placement("cpu", torch.float32, "component")
    with ReferenceModel(open_checkpoint(str(NANO), None, NANO), placement).component("transformer") as placed:
        for rounds in (False, True):
            layer.input_quantizer.enable() if rounds else layer.input_quantizer.disable()
            layer.input_quantizer.forward = lambda x, rounds=rounds: rounded_by_onnx(x, scale) if rounds else x
            simulation = Simulation(component.tensors, amax, "max", rounds, solved)
            with simulation.of(placed, group), torch.no_grad():
                found = placed.module.get_submodule(name)(x)
            with torch.no_grad():
                expected = layer(x)
            top = float(expected.abs().max())
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * top)
            assert torch.allclose(expected.double(), computed(stored, name, x, rounds), rtol=1e-4, atol=1e-4 * top)
        exact = torch.nn.functional.linear(x, load_file(NANO / FILE)[f"{name}.weight"].float())
        assert torch.allclose(placed.module.get_submodule(name)(x), exact, atol=1e-4)


def neutral(kind: int, layers: list[Linear]) -> onnx.ModelProto:
    values = [("x", ["b", "t", layers[0].in_features])]
    values += [(f"{layer.name}.weight", [layer.out_features, layer.in_features]) for layer in layers]
    nodes = [helper.make_node("Linear", ["x", f"{at.name}.weight"], [f"y_{at.name}"], domain="fluxc") for at in layers]
    outputs = [helper.make_tensor_value_info(f"y_{at.name}", kind, ["b", "t", at.out_features]) for at in layers]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in values]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs))


@pytest.mark.parametrize("activations", ["none", "nvfp4"])
def test_onnx_runtime_multiplies_and_rounds_once_for_a_group(
    ours: Path, records: dict[str, LayerInputs], activations: str, tmp_path: Path
) -> None:
    stored, refs = load_file(ours / FILE), read_header(ours / FILE)
    plan = {entry.layer.name: entry for entry in plan_of() if entry.layer.name in FUSED}
    layers = [entry.layer for entry in plan.values()]
    dtypes = {name: ref.dtype for name, ref in refs.items()}
    lowered = lower(neutral(TensorProto.FLOAT, layers), {"x"}, dtypes, plan, activations)
    assert [node.output[0].endswith("/smoothed") for node in lowered.graph.node].count(True) == 1
    assert sum(node.op_type == "NVFP4FakeQuantize" for node in lowered.graph.node) == (activations == "nvfp4")
    bind(lowered, {"x"}, refs)
    for external in (entry for tensor in lowered.graph.initializer for entry in tensor.external_data):
        if external.key == "location":
            external.value = "w.safetensors"
    (tmp_path / "w.safetensors").write_bytes((ours / FILE).read_bytes())
    (tmp_path / "g.onnx").write_bytes(lowered.SerializeToString())
    x = torch.from_numpy(records[FUSED[0]].rows)
    found = onnxruntime.InferenceSession(str(tmp_path / "g.onnx")).run(None, {"x": x[None].numpy()})
    for name, y in zip(FUSED, found, strict=True):
        expected = computed(stored, name, x, activations == "nvfp4").numpy()
        assert np.abs(y[0] - expected).max() < 2e-4 * np.abs(expected).max()


def test_tensorrt_computes_a_smoothed_group_as_one_gemm(ours: Path, records: dict[str, LayerInputs]) -> None:
    """ONNX's reference evaluator on the merged graph, with nothing rounded to bf16, against torch."""
    from test_tensorrt import BF16, OPERATORS, relative_error, unrounded

    stored, refs = load_file(ours / FILE), read_header(ours / FILE)
    plan = {entry.layer.name: entry for entry in plan_of() if entry.layer.name in FUSED}
    layers = [entry.layer for entry in plan.values()]
    lowered = lower_tensorrt(neutral(TensorProto.BFLOAT16, layers), {"x"}, refs, plan)
    assert sorted(lowered.gemms) == sorted([GROUP, f"{GROUP}.{A}", *(f"{name}.{B}" for name in FUSED)])
    assert f"{FUSED[0]}.{PRE_QUANT_SCALE}" in lowered.tensors
    assert f"{FUSED[1]}.{PRE_QUANT_SCALE}" not in lowered.tensors
    feeds = {}
    for port in lowered.weights:
        read = [read_tensor(ours / FILE, name, port.dtype) for name in port.tensors]
        value = np.concatenate(read) if read[0].ndim else read[0]
        feeds[port.name] = value.astype(np.float32) if value.dtype == BF16 else value
    x = torch.from_numpy(records[FUSED[0]].rows)
    found = ReferenceEvaluator(unrounded(lowered.model), new_ops=OPERATORS).run(None, {"x": x[None].numpy()} | feeds)
    for name, y in zip(FUSED, found, strict=True):
        assert relative_error(y[0], computed(stored, name, x, True).numpy()) < 1e-5


def test_a_group_of_different_smoothing_is_no_engine(ours: Path, tmp_path: Path) -> None:
    stored = load_file(ours / FILE)
    group = [entry for entry in plan_of() if entry.layer.name in FUSED]
    stored[f"{FUSED[1]}.{PRE_QUANT_SCALE}"] *= 2
    save_file(stored, tmp_path / "w.safetensors")
    component = Component("transformer", read_header(tmp_path / "w.safetensors"), group, "")
    with pytest.raises(BuildError, match="have different pre_quant_scale"):
        check_group_scales(component)


def test_openvino_and_tensorrt_rtx_are_built_and_audited(ours: Path, workshop: Path) -> None:
    """Engines need no GPU to be built: q, k and v are one GEMM in NVFP4, as they are without smoothing."""
    pytest.importorskip("tensorrt_rtx")
    targets = "targets=[{kind: tensorrt_rtx}, {kind: openvino}, {kind: onnxruntime, compute: exact}]"
    report = figures_of(compile_into(workshop / "smoothed-targets", *QUICK, ALL, GPTQ, AUTO, targets))
    audits = report["engines"]["tensorrt_rtx"]["audit"]
    assert audits["double"]["gemms"] == {"nvfp4": 8, "bf16": 8 + 12}
    assert audits["single"]["gemms"] == {"nvfp4": 2, "bf16": 4}
    assert not any(audit["faults"] for audit in audits.values())
    # As many kernels as without: the multiplication is part of one that is there anyway.
    unsmoothed = figures_of(compile_into(workshop / "unsmoothed-engines", *QUICK, ALL, GPTQ, *ENGINES))
    for name, audit in unsmoothed["engines"]["tensorrt_rtx"]["audit"].items():
        assert audits[name]["kernels"] == audit["kernels"]
    found = {name: figures["step_error"] for name, figures in report["targets"].items()}
    assert found["openvino"] == pytest.approx(found["onnxruntime-exact"], rel=0.01)


# What decides.


def solved(
    calls: Calls, plan: list[LayerPlan], folder: Path, ranges: Ranges | None, rounding: Any = "gptq", hook: Any = None
) -> Solved:
    component = open_checkpoint(str(NANO), None, NANO).components["transformer"]
    folder.mkdir()
    placement = Placement("cpu", torch.bfloat16, "layer")
    with ReferenceModel(open_checkpoint(str(NANO), None, NANO), placement).component("transformer") as placed:
        if hook:
            for entry in plan:
                placed.module.get_submodule(entry.layer.name).register_forward_pre_hook(hook)
        problem = Problem("transformer", plan, component.tensors, calls, "max", rounding, ranges)
        solve_component(placed, problem, folder)
    return Solved(folder)


@pytest.fixture(scope="module")
def to_solve() -> list[LayerPlan]:
    return [entry for entry in plan_of() if entry.layer.name in (*FUSED, "transformer_blocks.1.ff.linear_in")]


@pytest.fixture
def ranges(records: dict[str, LayerInputs]) -> Ranges:
    return Ranges(records, Calibration(prompts="", margin=1))


def test_both_are_judged_with_rounded_inputs(
    calls: Calls, to_solve: list[LayerPlan], ranges: Ranges, tmp_path: Path
) -> None:
    """The record's ratios, found again in torch from the parts and the inputs of the calls that were held out."""
    group = [entry for entry in to_solve if entry.layer.name in FUSED]
    smoothed = solved(calls, group, tmp_path / "with", ranges)
    plain = solved(calls, [replace(entry, smoothing=False) for entry in group], tmp_path / "without", None)
    with ReferenceModel(
        open_checkpoint(str(NANO), None, NANO), Placement("cpu", torch.bfloat16, "component")
    ).component("transformer") as placed:
        moments = Moments(placed.module, FUSED[:1], len(calls))
        placed.run([partial(placed.module, **calls[n], return_dict=False) for n in range(len(calls))])
    _, x = moments.take(FUSED[0])
    source, channels = load_file(NANO / FILE), torch.from_numpy(ranges.records[FUSED[0]].channel_amax)
    for name in FUSED:
        of = smoothed.roundings[name]
        assert of.smoothed
        exact = x.double() @ source[f"{name}.weight"].double().T
        for found, said in ((smoothed.layers[name], of.smoothed_snr_db), (plain.layers[name], of.unsmoothed_snr_db)):
            p = torch.ones(128) if found.smoothing is None else torch.from_numpy(found.smoothing)
            parts = found.rows(0, 128, 128)
            codes, scales = (torch.from_numpy(parts[part].copy()) for part in ("weight", "weight_scale"))
            q = nvfp4.dequantize(codes, scales.view(torch.float8_e4m3fn), torch.tensor(found.scale))
            b, a = (torch.from_numpy(factor).double() for factor in found.low_rank() or ())
            rounded = rounded_by_onnx(x * p, (channels * p).max() / 2688)
            wrong = exact - rounded.double() @ q.double().T - (x * p).double() @ a.T @ b.T
            ratio = 10 * torch.log10(exact.square().sum() / wrong.square().sum())
            assert said == pytest.approx(float(ratio), abs=0.02)
    ratios = [(of.smoothed_snr_db, of.unsmoothed_snr_db) for of in smoothed.roundings.values()]
    errors = np.mean([[10 ** (-(value or 0) / 10) for value in pair] for pair in ratios], axis=0)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_group_that_smoothing_makes_worse_does_without_it(
    calls: Calls,
    to_solve: list[LayerPlan],
    ranges: Ranges,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounding: Any,
) -> None:
    """A p that spoils everything: by name, and with the parts of a plan without smoothing."""
    random = np.exp2(np.random.default_rng(0).integers(-6, 7, 128)).astype(np.float32)
    spoiled = (random.view(np.uint32) >> 16).astype(np.uint16)
    monkeypatch.setattr(smoothing_of_groups, "fit", lambda *_: spoiled)
    found = solved(calls, to_solve, tmp_path / "spoiled", ranges, rounding)
    unsmoothed = [replace(entry, smoothing=False) for entry in to_solve]
    plain = solved(calls, unsmoothed, tmp_path / "plain", None, rounding)
    for name, of in found.roundings.items():
        assert (of.smoothed, of.low_rank) == (False, RANK)
        assert of.why.startswith("not smoothed: ")
        assert of.snr_db == plain.roundings[name].snr_db
    assert any("no less is lost" in of.why for of in found.roundings.values())
    for name, layer in found.layers.items():
        assert layer.smoothing is None
        rows = len(layer.factors[B])
        mine, theirs = layer.rows(0, rows, rows), plain.layers[name].rows(0, rows, rows)
        assert all(np.array_equal(mine[part], theirs[part]) for part in theirs)
        assert all(np.array_equal(layer.factors[part], plain.layers[name].factors[part]) for part in (A, B))
    # The plan stays true: the writer stores ones, and else what it stores without smoothing.
    component = open_checkpoint(str(NANO), None, NANO).components["transformer"]
    tensors = {f"{e.layer.name}.weight": component.tensors[f"{e.layer.name}.weight"] for e in to_solve}
    amax = dict.fromkeys(found.roundings, 1.0)
    for entries, layers, file in ((to_solve, found.layers, "with"), (unsmoothed, plain.layers, "without")):
        path = tmp_path / f"{file}.safetensors"
        write_weights(path, tensors, entries, amax, solved=layers)
        planned = planned_tensors(tensors, entries)
        assert {n: (r.dtype, r.shape) for n, r in read_header(path).items()} == {
            n: (r.dtype, r.shape) for n, r in planned.items()
        }
    mine, theirs = (load_file(tmp_path / f"{file}.safetensors") for file in ("with", "without"))
    assert set(mine) - set(theirs) == {f"{name}.{PRE_QUANT_SCALE}" for name in found.roundings}
    assert all(bool((mine[f"{name}.{PRE_QUANT_SCALE}"] == 1).all()) for name in found.roundings)
    assert all(torch.equal(mine[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in theirs if theirs[n].ndim)


def test_without_held_out_inputs_nothing_is_smoothed(
    calls: Calls, to_solve: list[LayerPlan], ranges: Ranges, tmp_path: Path
) -> None:
    found = solved(replace(calls, calls=calls.calls[:1]), to_solve, tmp_path / "one", ranges)
    assert {of.why for of in found.roundings.values()} == {"not smoothed: no inputs were held out to judge it by"}
    assert found.smoothing == {}
    assert {of.low_rank for of in found.roundings.values()} == {RANK}


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_inputs_that_say_nothing_fall_back_by_name(
    calls: Calls, to_solve: list[LayerPlan], ranges: Ranges, tmp_path: Path, value: float
) -> None:
    plan = [entry for entry in to_solve if entry.layer.group is None]
    found = solved(calls, plan, tmp_path / "same", ranges, "gptq", lambda _, x: (torch.full_like(x[0], value),))
    (of,) = found.roundings.values()
    assert (of.rounding, of.smoothed, of.low_rank) == ("nearest", False, 0)
    assert "all zero, or not finite" in of.why
    assert "not smoothed: " in of.why
    assert found.layers == {}


def test_weights_are_smoothed_without_factors_too(
    calls: Calls, to_solve: list[LayerPlan], ranges: Ranges, tmp_path: Path
) -> None:
    plan = [replace(entry, low_rank=0) for entry in to_solve]
    found = solved(calls, plan, tmp_path / "gptq", ranges)
    assert {(of.rounding, of.smoothed, of.low_rank) for of in found.roundings.values()} == {("gptq", True, 0)}
    for name, of in found.roundings.items():
        if name not in FUSED:
            assert (of.smoothed_snr_db or 0) > (of.unsmoothed_snr_db or 0)
    assert set(found.smoothing) == set(found.layers)


def test_what_is_solved_does_not_depend_on_threads(
    calls: Calls, to_solve: list[LayerPlan], ranges: Ranges, tmp_path: Path
) -> None:
    threads, made = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            solved(calls, to_solve, tmp_path / str(number), ranges)
            made.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1]


def test_a_build_says_which_layers_are_smoothed_and_none_loses(ours: Path) -> None:
    """By fusion group, the mean of the members' errors."""
    members: dict[str, list[dict[str, Any]]] = {}
    groups = {entry.name: entry.group or entry.name for entry in open_bundle(ours).manifest.precision}
    for name, of in roundings_of(ours).items():
        members.setdefault(groups[name], []).append(of)
    assert len(members) == 28
    for group in members.values():
        assert len({of["smoothed"] for of in group}) == 1
        with_it, without = (
            np.mean([10 ** (-of[f"{word}_snr_db"] / 10) for of in group]) for word in ("smoothed", "unsmoothed")
        )
        assert group[0]["smoothed"] == (with_it < without)
    assert sum(group[0]["smoothed"] for group in members.values()) > 20
    page = (ours / "report" / "index.html").read_text()
    assert "get smoothed inputs (smoothing)" in page
    assert f"gptq, rank {RANK}, smoothed: " in page
    ratios = [(of["smoothed_snr_db"], of["unsmoothed_snr_db"]) for of in roundings_of(ours).values()]
    assert np.mean([one - other for one, other in ratios]) > 0.3
    errors = {name: of["step_error"] for name, of in figures_of(ours)["targets"].items()}
    assert errors["onnxruntime-exact"] < 0.025
    assert errors["onnxruntime-nvfp4"] < 0.06


# What it costs.


def test_the_cost_is_counted() -> None:
    """p is read once for a fusion group, and stored for each layer; all that is solved is solved twice."""
    model, shards = Flux2Transformer.read(KLEIN_4B), Shards(1, (1024, 1024), 24, 512, 4096, 0, 0)
    works, needs = [], []
    for smoothing in ("none", "auto"):
        precision = ComponentPrecision("nvfp4", rounding="gptq", smoothing=smoothing)
        plan = precision_plan("transformer", model.linears, precision)
        works.append(work_of(model, plan, shards, 1))
        needs.append(solving(plan))
    groups = {layer.group or layer.name: layer.in_features for layer in model.linears}
    assert works[1].moved_bytes - works[0].moved_bytes == 2 * sum(groups.values())
    assert works[1].kernels == works[0].kernels
    assert works[1].flop == works[0].flop
    assert needs[1].disk - needs[0].disk == sum(2 * layer.in_features for layer in model.linears)
    assert (needs[1].products, needs[1].factors) == (2 * needs[0].products, 2 * needs[0].factors)
    assert needs[1].memory > needs[0].memory
