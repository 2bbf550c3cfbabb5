"""`low_rank`: factors beside NVFP4 weights, from the fit to what targets compute, against numpy's SVD and modelopt's layer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from conftest import NANO, RECIPE, compile_into
from fluxc.base.errors import RecipeError
from fluxc.base.progress import StageProgress
from fluxc.base.safetensors import read_header
from fluxc.build.build import build
from fluxc.calibrate.calls import Calls
from fluxc.calibrate.file import read_calls
from fluxc.calibrate.moments import Moments, held_out
from fluxc.calibrate.sensitivity import Simulation
from fluxc.calibrate.solve import Problem, solve_component
from fluxc.calibrate.solve_needs import LEFT_BYTES, solving
from fluxc.checkpoint.quantized import quantized_layers
from fluxc.checkpoint.source import open_checkpoint
from fluxc.fidelity.gates import gated_snr
from fluxc.formats import nvfp4
from fluxc.formats.low_rank import A, B, fit
from fluxc.models.base import Linear
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import KLEIN_4B
from fluxc.predict.gpus import GPUS
from fluxc.predict.rates import ASSUMED, step_time
from fluxc.predict.work import work_of
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.quantize.solved import Solved
from fluxc.quantize.source import read_source
from fluxc.quantize.writer import planned_tensors, write_weights
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import ComponentPrecision, LowRank, Rule
from fluxc.report.structs import REPORT_JSON
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement
from fluxc.targets.sharding import Shards
from fluxrt.bundle import open_bundle
from quick import QUICK, results_of

RANK = 16
ALL = f'precision.transformer.low_rank=[{{match: "*", rank: {RANK}}}]'
GPTQ = "precision.transformer.rounding=gptq"
FILE = "transformer/diffusion_pytorch_model.safetensors"
BOTH = "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, activations: nvfp4}]"
FUSED = "transformer_blocks.1.attn.to_q"


@pytest.fixture(scope="module")
def ours(workshop: Path) -> Path:
    return compile_into(workshop / "low-rank", *QUICK, ALL, GPTQ)


@pytest.fixture(scope="module")
def to_nearest(workshop: Path) -> Path:
    return compile_into(workshop / "low-rank-nearest", *QUICK, ALL, BOTH)


@pytest.fixture(scope="module")
def calls(quick_bundle: Path, shared_cache: Path) -> Calls:
    (made,) = (path for path in results_of(shared_cache, quick_bundle) if path.name.startswith("calibration-"))
    return read_calls(made / "calibration.safetensors")["transformer"]


def report_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / REPORT_JSON).read_text())
    return found


def layers_of(bundle: Path) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in report_of(bundle)["layers"] if layer["format"] == "nvfp4"}


def errors(bundle: Path) -> dict[str, float]:
    return {name.removeprefix("onnxruntime-"): of["step_error"] for name, of in report_of(bundle)["targets"].items()}


# The fit.


def problem_of(rows: int, columns: int, tokens: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose singular values fall as trained ones do, and second moments of correlated inputs."""
    rng = np.random.default_rng(0)
    falling = 1 / np.sqrt(1 + np.arange(min(rows, columns)))
    left, right = (np.linalg.qr(rng.standard_normal((size, len(falling))))[0] for size in (rows, columns))
    mixing = rng.standard_normal((columns, columns)) / columns**0.5
    x = rng.standard_normal((tokens, columns)) * rng.uniform(0.1, 3, columns) @ mixing
    weight, moments = (left * falling) @ right.T, x.T @ x
    return torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(moments.astype(np.float32))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 64, 16), (640, 1152, 32), (128, 512, 128)])
@pytest.mark.parametrize("weighed", ["moments", "diagonal"])
def test_factors_leave_as_little_as_a_singular_value_decomposition(
    rows: int, columns: int, rank: int, weighed: str
) -> None:
    """Eckart and Young: what is left of W S is the energy of its other singular values, with S S^T the moments."""
    weight, moments = problem_of(rows, columns)
    moments = moments if weighed == "moments" else moments.diagonal().contiguous()
    b, a = fit(weight, moments, rank)
    assert (b.dtype, a.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (tuple(b.shape), tuple(a.shape)) == ((rows, rank), (rank, columns))
    dense = moments.double().numpy() if moments.ndim == 2 else np.diag(moments.double().numpy())
    values, vectors = np.linalg.eigh(dense)
    root = vectors * np.sqrt(np.maximum(values, 0))
    singular = np.linalg.svd(weight.double().numpy() @ root, compute_uv=False)
    left = (weight.double() - b.double() @ a.double()).numpy() @ root
    least, energy = np.square(singular[rank:]).sum(), np.square(singular).sum()
    # bf16 keeps 2^-9 of each factor; the iteration is short where singular values are alike.
    assert np.square(left).sum() < 1.03 * least + 2e-5 * energy


def test_what_no_input_showed_is_kept_by_damping() -> None:
    """Inputs of one direction say nothing about the others, which the factors must not make anything of."""
    weight, _ = problem_of(64, 64)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    b, a = fit(weight, torch.outer(x, x), 16, damping=0.01)
    left = weight - b.float() @ a.float()
    assert (left @ x).norm() < 0.01 * (weight @ x).norm()
    assert left.norm() < 0.8 * weight.norm()


def test_a_rank_beyond_the_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 64 need at least as many rows and columns, got 48 x 128"):
        fit(torch.zeros(48, 128), torch.ones(128), 64)


def test_factors_do_not_depend_on_threads() -> None:
    weight, moments = problem_of(1100, 1100, 500)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 4):
            torch.set_num_threads(number)
            found.append(fit(weight, moments, 32, 0.01))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for pair in found[1:] for one, other in zip(pair, found[0], strict=True))


def test_noise_is_what_rounding_makes_wrong_of_every_channel() -> None:
    """Against NVFP4 values found by a search of the grid."""
    layer = torch.nn.Linear(32, 8)
    module = torch.nn.Sequential(layer)
    moments = Moments(module, ["0"], 1)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 32)
    module(x)
    scale = 8 * x.abs().amax() / (6 * 448)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = x.reshape(40, 2, 16)
    step = (blocks.abs().amax(-1, keepdim=True) / 6 / scale).to(torch.float8_e4m3fn).float() * scale
    nearest = grid[(blocks.abs()[..., None] / step[..., None] - grid).abs().argmin(-1)] * step * blocks.sign()
    expected = (nearest - blocks).square().sum(0).flatten()
    assert torch.allclose(moments.noise_of("0"), expected, rtol=1e-4)


# The plan.


def nano_layers() -> list[Linear]:
    return [entry.layer for entry in read_source(load_recipe(RECIPE)).plans["transformer"]]


def ranks(*entries: LowRank, rules: tuple[Rule, ...] = ()) -> dict[str, int]:
    precision = ComponentPrecision(default="nvfp4", rules=rules, low_rank=entries)
    return {entry.layer.name: entry.low_rank for entry in precision_plan("transformer", nano_layers(), precision)}


def test_the_first_pattern_that_matches_counts_for_a_whole_fusion_group() -> None:
    found = ranks(LowRank(FUSED, 16), LowRank("transformer_blocks.1.*", 32), rules=(Rule("*.ff.linear_out", "fp8"),))
    attention = {name.rpartition(".")[2]: rank for name, rank in found.items() if ".1.attn.to_" in name}
    assert attention | {"to_q": 16, "to_k": 16, "to_v": 16} == attention
    assert found["transformer_blocks.1.attn.add_q_proj"] == 32
    assert found["transformer_blocks.1.ff.linear_out"] == found["transformer_blocks.0.attn.to_q"] == 0


def test_a_layer_that_a_rule_gives_another_format_has_no_factors() -> None:
    """Not even counted: `fluxc tune` puts every format into the plan, and writes what it chose as rules."""
    rules = (Rule("transformer_blocks.1.ff.linear_out", "fp8"), Rule("transformer_blocks.0.ff.linear_out", "bf16"))
    assert set(ranks(LowRank("*.ff.linear_out", 16), rules=rules).values()) == {0}
    precision = ComponentPrecision(default="nvfp4", low_rank=(LowRank("*", 16),))
    entry = next(e for e in precision_plan("transformer", nano_layers(), precision) if e.layer.name == FUSED)
    in_formats = {name: replace(entry, format=name) for name in ("nvfp4", "nvfp4-w4a16", "fp8", "mxfp4", "bf16")}
    assert {name: e.rank for name, e in in_formats.items()} == {
        "nvfp4": 16,
        "nvfp4-w4a16": 16,
        "fp8": 0,
        "mxfp4": 0,
        "bf16": 0,
    }
    assert in_formats["nvfp4"].bytes_after - replace(entry, low_rank=0).bytes_after == 2 * 16 * (128 + 128)
    assert in_formats["fp8"].bytes_after == 128 * 128 + 8


def test_a_plan_says_the_rank_and_counts_its_bytes(ours: Path) -> None:
    entries = {entry.name: entry for entry in open_bundle(ours).manifest.precision}
    assert entries[FUSED].rule == f"default, low rank {RANK}"
    stored = read_header(ours / FILE)
    for entry in entries.values():
        if entry.component == "transformer":
            parts = [
                ref for name, ref in stored.items() if name.rpartition(".")[0] == entry.name and "bias" not in name
            ]
            assert entry.bytes_after == sum(ref.nbytes for ref in parts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ('low_rank=[{match: "*.to_qq", rank: 16}]',),
            r"low_rank\[0\]\.match: the pattern '\*\.to_qq' matches no layer; did",
        ),
        (
            ('low_rank=[{match: "proj_out", rank: 16}]',),
            r"'proj_out' matches no layer that this build quantizes to nvfp4",
        ),
        (('low_rank=[{match: "*", rank: 16}]', "default=fp8"), "matches no layer that this build quantizes to nvfp4"),
        (('low_rank=[{match: "*", rank: 24}]',), r"low_rank\[0\]\.rank: must be a multiple of 16, got 24"),
        (('low_rank=[{match: "*", rank: 8}]',), r"low_rank\[0\]\.rank: must be at least 16 and at most 512, got 8"),
        (('low_rank=[{match: "*", rank: 144}]',), r"rank 144 is more than transformer_blocks\.0\.attn\.to_q has"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_source(load_recipe(RECIPE, tuple(f"precision.transformer.{change}" for change in changes)))


@pytest.mark.parametrize(
    ("engine", "said"), [("none", "engine: none sees none"), ("modelopt", "engine: modelopt quantizes these itself")]
)
def test_factors_need_inputs_that_fluxc_saw(engine: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        load_recipe(RECIPE, (ALL, f"calibration.engine={engine}"))
    assert "precision.transformer.low_rank" in str(refused.value)


def test_a_calibration_file_without_calls_is_refused_at_once(
    quick_bundle: Path, shared_cache: Path, tmp_path: Path
) -> None:
    from fluxc.calibrate.file import read_calibration, write_calibration

    (made,) = (path for path in results_of(shared_cache, quick_bundle) if path.name.startswith("calibration-"))
    file = read_calibration(made / "calibration.safetensors")
    write_calibration(tmp_path / "old", file.origin, file.records)
    changes = (*QUICK, ALL, f"calibration.file={tmp_path / 'old'}")
    with pytest.raises(RecipeError, match=r"no calls of the transformer, which precision\.transformer\.low_rank"):
        build(load_recipe(RECIPE, changes), tmp_path / "b", StageProgress())


# What a build stores.


def test_tensors_are_modelopts_and_a_source_reads_them(ours: Path) -> None:
    checkpoint = open_checkpoint(str(ours), None, ours)
    component = checkpoint.components["transformer"]
    found = quantized_layers(component, Flux2Transformer.read(component.config).linears)
    assert len(found) == 36
    assert {layer.low_rank for layer in found.values()} == {RANK}
    assert {(layer.tensors[A].dtype, layer.tensors[B].dtype) for layer in found.values()} == {("BF16", "BF16")}
    said = json.loads((ours / "transformer" / "config.json").read_text())["quantization_config"]
    assert said["quant_algo"] == "NVFP4_SVD"
    assert said["config_groups"]["group_0"]["lora_rank"] == RANK
    assert said["config_groups"]["group_0"]["pre_quant_scale"] is False


def test_a_bundle_is_a_source_and_gives_the_same_weights(ours: Path, workshop: Path) -> None:
    again = compile_into(workshop / "low-rank-again", f"model.source={ours}", *QUICK, BOTH)
    first, second = (load_file(bundle / FILE) for bundle in (ours, again))
    assert first.keys() == second.keys()
    assert all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first if first[name].ndim
    )
    config = [json.loads((bundle / "transformer" / "config.json").read_text()) for bundle in (ours, again)]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]
    groups = {entry.group for entry in open_bundle(again).manifest.precision if entry.name == FUSED}
    assert groups == {"transformer_blocks.1.attn.to_qkv"}
    assert errors(again)["exact"] < 1e-4


def test_errors_count_the_factors(ours: Path) -> None:
    source, stored = load_file(NANO / FILE), load_file(ours / FILE)
    shown = layers_of(ours)
    for name in (FUSED, "single_transformer_blocks.3.attn.to_out"):
        exact = source[f"{name}.weight"].double()
        left = exact - effective(stored, name).double()
        assert shown[name]["snr_db"] == pytest.approx(
            float(10 * torch.log10(exact.square().sum() / left.square().sum())), abs=0.01
        )
        assert shown[name]["rounding"]["low_rank"] == RANK
        assert shown[name]["output_snr_db"] > shown[name]["rounding"]["nearest_snr_db"]
        assert gated_snr(shown[name]) == shown[name]["output_snr_db"]


def effective(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Q + b a, by modelopt's own dequantizer."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight, scale, double = (stored[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    plain: torch.Tensor = NVFP4QTensor(
        torch.Size((len(weight), 2 * weight.shape[1])), torch.float32, weight
    ).dequantize(dtype=torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    return plain + stored[f"{name}.{B}"].float() @ stored[f"{name}.{A}"].float()


def test_targets_are_nearer_than_without(ours: Path, to_nearest: Path, quick_bundle: Path) -> None:
    """Of the weights and, where inputs are rounded, of those too: what the factors take is multiplied unrounded."""
    plain, nearest, solved = errors(quick_bundle), errors(to_nearest), errors(ours)
    assert nearest["exact"] < 0.6 * plain["exact"]
    assert solved["exact"] < 0.4 * plain["exact"]
    assert solved["nvfp4"] < 0.6 * plain["nvfp4"]
    roundings = [layer["rounding"] for layer in layers_of(to_nearest).values()]
    assert {(of["rounding"], of["low_rank"], of["damping"], of["why"]) for of in roundings} == {
        ("nearest", RANK, None, "")
    }
    assert all(of["snr_db"] > of["nearest_snr_db"] for of in roundings)
    page = (to_nearest / "report" / "index.html").read_text()
    assert "36 have factors of low rank beside them" in page
    assert f"nearest, rank {RANK}: " in page


def test_a_fused_layer_computes_what_modelopts_own_does(ours: Path) -> None:
    """SVDQuantLinear.forward, given our tensors; where inputs are rounded its quantizer is ours, since its own needs CUDA.

    What `exclude: auto`, tune and the attribution compute with in torch is held against it.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.conversion import create_and_replace_svdquant_linear_on_the_fly

    stored = load_file(ours / FILE)
    name = FUSED
    model = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG) | {"algorithm": None}, None)
    create_and_replace_svdquant_linear_on_the_fly(model=model)
    layer: Any = model[0]
    assert type(layer).__mro__[1].__name__ == "SVDQuantLinear"
    layer.weight_quantizer.svdquant_lora_a = stored[f"{name}.{A}"].float()
    layer.weight_quantizer.svdquant_lora_b = stored[f"{name}.{B}"].float()
    product = stored[f"{name}.{B}"].float() @ stored[f"{name}.{A}"].float()
    layer.weight.data.copy_(effective(stored, name) - product)
    layer.weight_quantizer.disable()
    x = 3 * torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    folder = next(
        path for path in results_of(Path(os.environ["FLUXC_CACHE"]), ours) if path.name.startswith("rounding-")
    )
    component = open_checkpoint(str(NANO), None, NANO).components["transformer"]
    plan = precision_plan("transformer", nano_layers(), ComponentPrecision("nvfp4", low_rank=(LowRank("*", RANK),)))
    group = [entry for entry in plan if entry.layer.group == "transformer_blocks.1.attn.to_qkv"]
    placement = Placement("cpu", torch.float32, "component")
    with ReferenceModel(open_checkpoint(str(NANO), None, NANO), placement).component("transformer") as placed:
        for rounded in (False, True):
            if rounded:
                layer.input_quantizer.enable()
                layer.input_quantizer.forward = lambda x: nvfp4.fake_quantize(x, torch.tensor(12.0 / 2688))
            else:
                layer.input_quantizer.disable()
            amax = {(entry.layer.name, entry.format): 12.0 for entry in group}
            simulation = Simulation(component.tensors, amax, "max", rounded, Solved(folder))
            with simulation.of(placed, group), torch.no_grad():
                found = placed.module.get_submodule(name)(x)
            with torch.no_grad():
                expected = layer(x)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        exact = torch.nn.functional.linear(x, load_file(NANO / FILE)[f"{name}.weight"].float())
        assert torch.allclose(placed.module.get_submodule(name)(x), exact, atol=1e-4)


def test_other_rules_fit_nothing_again(ours: Path, shared_cache: Path) -> None:
    """In bf16, and in NVFP4 with inputs in 16 bits, whose weight and factors are those that were found."""
    rules = 'rules=[{match: "*.ff.linear_out", format: bf16}, {match: "*.to_qkv_mlp_proj", format: nvfp4-w4a16}]'
    before = {path.name for path in shared_cache.glob("rounding-*")}
    out = ours.with_name("low-rank-ruled")
    bundle = build(
        load_recipe(RECIPE, (*QUICK, ALL, GPTQ, BOTH, f"precision.transformer.{rules}")), out, StageProgress()
    )
    assert bundle is not None
    assert {path.name for path in shared_cache.glob("rounding-*")} == before
    ruled, solved = load_file(bundle / FILE), load_file(ours / FILE)
    name = "single_transformer_blocks.2.attn.to_qkv_mlp_proj"
    assert all(torch.equal(ruled[f"{name}.{part}"], solved[f"{name}.{part}"]) for part in ("weight", A, B))
    assert f"{name}.input_scale" not in ruled
    assert f"transformer_blocks.0.ff.linear_out.{A}" not in ruled
    said = json.loads((bundle / "transformer" / "config.json").read_text())["quantization_config"]
    assert said["quantized_layers"][name] == {"quant_algo": "W4A16_NVFP4"}
    assert said["quantized_layers"][FUSED] == {"quant_algo": "NVFP4_SVD"}
    component = open_checkpoint(str(bundle), None, bundle).components["transformer"]
    found = quantized_layers(component, Flux2Transformer.read(component.config).linears)
    assert (found[name].format, found[name].low_rank) == ("nvfp4-w4a16", RANK)


def test_the_text_encoder_has_factors_too(tmp_path: Path) -> None:
    low_rank = 'precision.text_encoder={default: nvfp4, low_rank: [{match: "*.mlp.*", rank: 32}]}'
    build(load_recipe(RECIPE, (*QUICK, low_rank)), tmp_path / "bundle", StageProgress(), "weights")
    root = Path(os.environ["FLUXC_CACHE"])
    newest = max(root.glob("rounding-text_encoder-*"), key=lambda path: path.stat().st_mtime)
    found = Solved(newest)
    assert found.roundings
    assert all(".mlp." in name and of.low_rank == 32 for name, of in found.roundings.items())


# Where factors are no better.


@pytest.fixture(scope="module")
def to_solve() -> list[LayerPlan]:
    precision = ComponentPrecision(default="nvfp4", low_rank=(LowRank("*", RANK),))
    names = ("transformer_blocks.1.attn.to_", "transformer_blocks.1.ff.linear_in")
    plan = precision_plan("transformer", nano_layers(), precision)
    return [entry for entry in plan if entry.layer.name.startswith(names)]


def solved(calls: Calls, plan: list[LayerPlan], folder: Path, hook: Any = None, rounding: Any = "gptq") -> Solved:
    component = open_checkpoint(str(NANO), None, NANO).components["transformer"]
    layers = Placement("cpu", torch.bfloat16, "layer")
    folder.mkdir()
    with ReferenceModel(open_checkpoint(str(NANO), None, NANO), layers).component("transformer") as placed:
        if hook:
            placed.module.get_submodule(plan[0].layer.name).register_forward_pre_hook(hook)
        solve_component(placed, Problem("transformer", plan, component.tensors, calls, "max", rounding), folder)
    return Solved(folder)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_inputs_unlike_those_it_was_fitted_on_leave_a_layer_no_worse(
    calls: Calls, to_solve: list[LayerPlan], tmp_path: Path, rounding: Any
) -> None:
    """Held-out inputs only of channels that are zero in all other calls."""
    plan = [entry for entry in to_solve if entry.layer.name.endswith("ff.linear_in")]
    numbers: list[int] = []

    def unlike(_: torch.nn.Module, x: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        numbers.append(len(numbers))
        apart = numbers[-1] in held_out(len(calls))
        keep = torch.arange(x[0].shape[-1]) % 16 < 2
        return (torch.where(keep == apart, x[0], 0),)

    found = solved(calls, plan, tmp_path / "unlike", unlike, rounding)
    (of,) = found.roundings.values()
    if of.low_rank or of.rounding == "gptq":
        assert of.snr_db is not None
        assert of.nearest_snr_db is not None
        assert of.snr_db > of.nearest_snr_db
    else:
        assert "no better than rounded to nearest" in of.why


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_group_whose_factors_are_no_better_does_without_them(
    calls: Calls, to_solve: list[LayerPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: Any
) -> None:
    """Factors of noise, for one of its layers: all three have none, and are what they are without `low_rank`."""
    from fluxc.calibrate import solve_group

    group = [entry for entry in to_solve if entry.layer.group]
    rows = group[1].layer.name
    made: list[str] = []
    honest = solve_group._Attempt.of

    def spoiled(attempt: Any, member: Any, rest: np.ndarray, gathered: Any) -> Any:
        made.append(member.name)
        parts, lost = honest(attempt, member, rest, gathered)
        return parts, lost if member.name != rows else 1e9

    monkeypatch.setattr(solve_group._Attempt, "of", spoiled)
    found = solved(calls, group, tmp_path / "spoiled", None, rounding)
    assert len(made) == (9 if rounding == "gptq" else 3)
    assert {(of.rounding, of.low_rank) for of in found.roundings.values()} == {(rounding, 0)}
    assert all("no better than rounded to nearest" in of.why for of in found.roundings.values())
    plain = solved(calls, [replace(entry, low_rank=0) for entry in group], tmp_path / "plain", None, "gptq")
    for name, layer in found.layers.items():
        assert layer.factors == {}
        assert np.array_equal(layer.rows(0, 128, 128)["weight"], plain.layers[name].rows(0, 128, 128)["weight"])
    assert bool(found.layers) == (rounding == "gptq")


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_inputs_that_say_nothing_fall_back_by_name(
    calls: Calls, to_solve: list[LayerPlan], tmp_path: Path, value: float
) -> None:
    plan = [entry for entry in to_solve if entry.layer.name.endswith("ff.linear_in")]
    found = solved(calls, plan, tmp_path / "same", lambda _, x: (torch.full_like(x[0], value),))
    ((name, of),) = found.roundings.items()
    assert (of.rounding, of.low_rank) == ("nearest", 0)
    assert "all zero, or not finite" in of.why
    assert found.layers == {}
    # The writer then stores what was planned: factors that add nothing, beside the weight rounded to nearest.
    tensors = {
        f"{name}.weight": open_checkpoint(str(NANO), None, NANO).components["transformer"].tensors[f"{name}.weight"]
    }
    for entries, file in ((plan, "with"), ([replace(plan[0], low_rank=0)], "without")):
        write_weights(tmp_path / f"{file}.safetensors", tensors, entries, {name: 1.0}, solved=found.layers)
        header = read_header(tmp_path / f"{file}.safetensors")
        planned = planned_tensors(tensors, entries)
        assert {n: (ref.dtype, ref.shape) for n, ref in header.items()} == {
            n: (r.dtype, r.shape) for n, r in planned.items()
        }
    ours, plain = (load_file(tmp_path / f"{file}.safetensors") for file in ("with", "without"))
    assert set(ours) - set(plain) == {f"{name}.{A}", f"{name}.{B}"}
    assert not any(ours[f"{name}.{part}"].any() for part in (A, B))
    assert all(torch.equal(ours[n].view(torch.uint8), plain[n].view(torch.uint8)) for n in plain if plain[n].ndim)


def test_one_call_is_enough_to_fit(calls: Calls, to_solve: list[LayerPlan], tmp_path: Path) -> None:
    """96 rows for layers of 128 inputs, and nothing held out."""
    found = solved(replace(calls, calls=calls.calls[:1]), to_solve, tmp_path / "one")
    assert {(of.low_rank, of.snr_db) for of in found.roundings.values()} == {(RANK, None)}
    source = load_file(NANO / FILE)
    for name, layer in found.layers.items():
        b, a = layer.low_rank() or (None, None)
        assert b is not None
        assert a is not None
        rows = len(b)
        parts = layer.rows(0, rows, rows)
        codes, scales = torch.from_numpy(parts["weight"].copy()), torch.from_numpy(parts["weight_scale"].copy())
        plain = nvfp4.dequantize(codes, scales.view(torch.float8_e4m3fn), torch.tensor(layer.scale))
        exact = source[f"{name}.weight"].float()
        assert (exact - plain - torch.from_numpy(b @ a)).norm() < 0.2 * exact.norm()


def test_members_of_a_group_have_factors_together(calls: Calls, to_solve: list[LayerPlan], tmp_path: Path) -> None:
    group = [entry for entry in to_solve if entry.layer.group]
    assert len(group) == 3
    found = solved(calls, group, tmp_path / "group")
    assert len({float(layer.scale) for layer in found.layers.values()}) == 1
    assert {of.low_rank for of in found.roundings.values()} == {RANK}


THREADS = """\
import sys
from pathlib import Path
from fluxc.base.threads import computing_with
with computing_with(int(sys.argv[2])):
    sys.path.insert(0, {tests!r})
    from conftest import RECIPE
    from test_low_rank import ALL, GPTQ, QUICK
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    build(load_recipe(RECIPE, (*QUICK, ALL, GPTQ)), Path(sys.argv[1]), StageProgress(), "weights")
"""


def test_the_bytes_do_not_depend_on_threads(ours: Path, shared_cache: Path, tmp_path: Path) -> None:
    from fluxc.base.cache import ENVIRONMENT
    from fluxc.base.threads import HOW_MANY, HOW_TO_WAIT

    (tmp_path / ".fluxc").mkdir()
    for known in results_of(shared_cache, ours):
        if known.name.startswith(("export-", "template-", "calibration-")):
            (tmp_path / ".fluxc" / known.name).symlink_to(known)
    kept = {name: value for name, value in os.environ.items() if name not in (*HOW_MANY, *HOW_TO_WAIT, ENVIRONMENT)}
    code = THREADS.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(tmp_path / "bundle"), "3"]
    subprocess.run(command, check=True, timeout=300, env=kept, capture_output=True)
    made = list((tmp_path / ".fluxc").glob("rounding-*/*.safetensors"))
    assert len(made) == 8
    for path in made:
        assert path.read_bytes() == (shared_cache / path.relative_to(tmp_path / ".fluxc")).read_bytes(), path


# Targets.


def test_openvino_and_tensorrt_rtx_are_built_and_audited(ours: Path, workshop: Path) -> None:
    """Engines need no GPU to be built: q, k and v are one GEMM in NVFP4, their first factors one in bf16."""
    pytest.importorskip("tensorrt_rtx")
    targets = "targets=[{kind: tensorrt_rtx}, {kind: openvino}, {kind: onnxruntime, compute: exact}]"
    report = report_of(compile_into(workshop / "low-rank-targets", *QUICK, ALL, GPTQ, targets))
    audits = report["engines"]["tensorrt_rtx"]["audit"]
    assert audits["double"]["gemms"] == {"nvfp4": 8, "bf16": 8 + 12}
    assert audits["single"]["gemms"] == {"nvfp4": 2, "bf16": 4}
    assert not any(audit["faults"] for audit in audits.values())
    found = {name: figures["step_error"] for name, figures in report["targets"].items()}
    assert found["openvino"] == pytest.approx(found["onnxruntime-exact"], rel=0.01)


def test_visual_gen_refuses_them_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"low-rank factors, as transformer_blocks\.0\.attn\.to_q has; leave precision"
    ):
        build(load_recipe(RECIPE, (*QUICK, ALL, "targets=[{kind: visual_gen}]")), tmp_path / "bundle", StageProgress())


def test_a_fusion_group_computes_on_tensorrt_what_its_layers_do_apart(tmp_path: Path) -> None:
    """ONNX's reference evaluator on the merged graph, against numpy on each layer's dequantized weight and factors."""
    from fluxc.rehearsal.operators import read_tensor
    from fluxc.targets.tensorrt.lower import lower_tensorrt
    from test_tensorrt import BF16, OPERATORS, ReferenceEvaluator, relative_error, unrounded

    rng, layers = (
        np.random.default_rng(0),
        [Linear("q", 32, 64, "qkv"), Linear("k", 32, 64, "qkv"), Linear("v", 48, 64, "qkv")],
    )
    tensors: dict[str, torch.Tensor] = {}
    x, expected = rng.standard_normal((2, 5, 64)).astype(np.float32), []
    for layer in layers:
        weight = torch.from_numpy(rng.standard_normal((layer.out_features, 64)).astype(np.float32))
        coded = nvfp4.quantize(weight, torch.tensor(0.002))
        factors = [
            torch.from_numpy(rng.standard_normal(s).astype(np.float32)).bfloat16()
            for s in ((16, 64), (layer.out_features, 16))
        ]
        parts = dict(zip(("weight", "weight_scale", "weight_scale_2"), coded, strict=True)) | dict(
            zip((A, B), factors, strict=True)
        )
        tensors |= {f"{layer.name}.{part}": value for part, value in parts.items()}
        dense = nvfp4.dequantize(*coded) + factors[1].float() @ factors[0].float()
        expected.append(x @ dense.numpy().T)
    save_file(tensors, tmp_path / "w.safetensors")
    refs = read_header(tmp_path / "w.safetensors")
    precision = ComponentPrecision(default="nvfp4-w4a16", low_rank=(LowRank("*", 16),))
    plan = {entry.layer.name: entry for entry in precision_plan("transformer", layers, precision)}
    kind = TensorProto.BFLOAT16
    values = [("x", ["b", "t", 64]), *((f"{layer.name}.weight", [layer.out_features, 64]) for layer in layers)]
    nodes = [
        helper.make_node("Linear", ["x", f"{layer.name}.weight"], [f"y_{layer.name}"], domain="fluxc")
        for layer in layers
    ]
    outputs = [
        helper.make_tensor_value_info(f"y_{layer.name}", kind, ["b", "t", layer.out_features]) for layer in layers
    ]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in values]
    neutral: onnx.ModelProto = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs))
    lowered = lower_tensorrt(neutral, {"x"}, refs, plan)
    assert sorted(lowered.gemms) == sorted(["qkv", f"qkv.{A}", *(f"{layer.name}.{B}" for layer in layers)])
    # A group has one tensor scale, which its first layer's speaks for.
    assert lowered.tensors == set(tensors) - {"k.weight_scale_2", "v.weight_scale_2"}
    feeds = {}
    for port in lowered.weights:
        read = [read_tensor(tmp_path / "w.safetensors", name, port.dtype) for name in port.tensors]
        value = np.concatenate(read) if read[0].ndim else read[0]
        feeds[port.name] = value.astype(np.float32) if value.dtype == BF16 else value
    found = ReferenceEvaluator(unrounded(lowered.model), new_ops=OPERATORS).run(None, {"x": x} | feeds)
    assert all(relative_error(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))


# What it costs.


def test_the_cost_is_counted() -> None:
    """FLOP, 2 rank (in + out) a token, and bytes; a layer's time grows by what they take."""
    model = Flux2Transformer.read(KLEIN_4B)
    shards = Shards(1, (1024, 1024), model.num_attention_heads, 512, 4096, 0, 0)
    flop, times = {}, {}
    for rank in (0, 32, 128):
        entries = (LowRank("single_transformer_blocks.*", rank),) if rank else ()
        plan = precision_plan("transformer", model.linears, ComponentPrecision(default="nvfp4", low_rank=entries))
        work = work_of(model, plan, shards, 1)
        flop[rank], times[rank] = work.flop, step_time(work, GPUS["b200"], ASSUMED)
    width, singles = model.width, model.num_single_layers
    sides = width + 3 * width + 2 * model.mlp_width + width + model.mlp_width + width
    for rank in (32, 128):
        assert flop[rank] - flop[0] == pytest.approx(singles * 4608 * 2 * rank * sides, rel=1e-9)
    assert times[0].gemms < times[32].gemms < times[128].gemms
    assert times[0].memory < times[32].memory


def test_memory_and_work_of_the_fit_are_counted_before() -> None:
    """klein 4B in less than 8 GB with what runs it; factors take what is left of a weight, twice."""
    model = Flux2Transformer.read(KLEIN_4B)

    def of(rank: int, rounding: Any) -> Any:
        entries = (LowRank("*.attn.*", rank), LowRank("*.ff*", rank)) if rank else ()
        precision = ComponentPrecision(default="nvfp4", preset="modelopt-flux2", low_rank=entries)
        return solving(precision_plan("transformer", model.linears, precision), rounding)

    plain, gptq, nearest = of(0, "gptq"), of(128, "gptq"), of(128, "nearest")
    largest = model.width * (3 * model.width + 2 * model.mlp_width)
    assert gptq.memory - plain.memory == 2 * LEFT_BYTES * largest
    assert gptq.memory < 5e9
    assert nearest.memory < gptq.memory
    assert nearest.products == nearest.factors == plain.low_rank == 0
    assert gptq.low_rank == nearest.low_rank > 0
    assert gptq.disk - plain.disk == sum(
        2 * 128 * (layer.in_features + layer.out_features)
        for layer in model.linears
        if layer.name.startswith(("transformer_blocks", "single_transformer_blocks"))
    )
