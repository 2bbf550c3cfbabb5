"""The tensorrt_rtx target: plans built without a GPU, what the audit reads out of them, and the graphs they were built from."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from conftest import NANO, RecordingProgress, compile_into, exported
from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.build.job import check_targets
from fluxc.families.dev import DEV as DEV_FAMILY
from fluxc.fidelity.metrics import cosine, psnr, relative_error
from fluxc.formats.registry import multiplied_in
from fluxc.graph.bind import argument_names, bind
from fluxc.graph.compose import compose_steps
from fluxc.graph.export import trace_transformer
from fluxc.models.base import Linear
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import MISTRAL_SMALL, TEXT_ENCODERS
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.source import read_source
from fluxc.quantize.writer import planned_tensors
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import ComponentPrecision
from fluxc.recipe.targets import Allow, TensorRTRtxTarget
from fluxc.rehearsal.operators import BF16, OPERATORS, Player, read_tensor, unrounded
from fluxc.targets.base import TargetContext
from fluxc.targets.findings import Finding
from fluxc.targets.onnxruntime.lower import lower
from fluxc.targets.tensorrt.audit import Audit, Expected, audit
from fluxc.targets.tensorrt.build import build_engine, check_audits, check_group_scales, write_sources
from fluxc.targets.tensorrt.builder import PlanRequest, build_plan
from fluxc.targets.tensorrt.cut import Component, Cutter, without_prefix
from fluxc.targets.tensorrt.export_onnx import export_onnx
from fluxc.targets.tensorrt.lower import Lowered, fix_shapes, lower_tensorrt
from fluxc.targets.tensorrt.program import read_programs
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.errors import RequestError
from fluxrt.manifest import TensorRTTarget
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.schedule import flow_match_sigmas
from fluxrt.sharding import sizes_of
from predicted import check_prediction
from quick import QUICK, contents, results_of
from test_flux2_tables import DEV

trt = pytest.importorskip(
    "tensorrt_rtx", reason="the tests of this target need tensorrt-rtx-cu13, as `make test` installs it"
)

ROOT = Path(__file__).resolve().parent.parent
RTX = ROOT / "recipes" / "flux2-nano-rtx.yaml"
MIXED = (
    *QUICK,
    "precision.text_encoder={default: fp8}",
    'precision.transformer.rules=[{match: "*.ff_context.*", format: fp8}, {match: "*.add_[qkv]_proj", format: nvfp4-w4a16}, '
    "{match: single_transformer_blocks.*.to_out, format: nvfp4-w4a16}]",
)
SM120 = ("12.0",)


@pytest.fixture(scope="session")
def rtx_bundle(workshop: Path) -> Path:
    return compile_into(workshop / "rtx", *QUICK, recipe=RTX)


@pytest.fixture(scope="session")
def mixed_bundle(workshop: Path) -> Path:
    return compile_into(workshop / "rtx-mixed", *MIXED, recipe=RTX)


def engine_of(bundle: Bundle):
    return next(target.engine for target in bundle.manifest.targets if isinstance(target, TensorRTTarget))


@pytest.mark.parametrize("which", ["rtx_bundle", "mixed_bundle"])
def test_every_linear_runs_in_the_format_the_plan_names(which: str, request: pytest.FixtureRequest) -> None:
    """GEMMs counted in the plans, times the calls that run them, are the Linears of the precision plan, groups as one."""
    bundle = open_bundle(request.getfixturevalue(which))
    engine = engine_of(bundle)
    run: Counter[str] = Counter()
    for program in engine.programs.values():
        for call in program.calls:
            found = engine.audit[call.plan]
            assert found["faults"] == []
            assert found["fused_share"] == 1.0
            run.update(found["gemms"])
    planned = Counter(
        multiplied_in(format)
        for _, format in {(layer.group or layer.name, layer.format) for layer in bundle.manifest.precision}
    )
    decoder_linears = engine.audit["vae_decoder"]["gemms"]["bf16"]
    assert run == planned + Counter(bf16=decoder_linears)
    assert engine.compute_capabilities == ("12.0", "12.1")


def test_a_run_copies_block_scales_and_vectors_only(rtx_bundle: Path) -> None:
    """Twice the block scales of every GEMM, and the few hundred bytes of the norms: by hand from the shapes."""
    engine = engine_of(open_bundle(rtx_bundle))
    scales = (1152 * 128 + 128 * 512) // 16
    norms = 2 * 32 * 2
    assert engine.audit["single"]["copied_bytes"] == 2 * scales + norms


def test_two_builds_give_the_same_plans_to_the_byte(rtx_bundle: Path, tmp_path: Path) -> None:
    again = compile_into(tmp_path / "rtx", *QUICK, recipe=RTX)
    first, second = contents(rtx_bundle), contents(again)
    assert sum(name.endswith(".plan") for name in first) == len(engine_of(open_bundle(rtx_bundle)).plans) == 17
    assert [name for name in first if first[name] != second.get(name)] == []
    assert sorted(first) == sorted(second)


def test_nothing_is_built_again_when_nothing_changed(rtx_bundle: Path) -> None:
    progress = RecordingProgress()
    compile_into(rtx_bundle, *QUICK, recipe=RTX, progress=progress)
    assert progress.ran == ["hash checkpoint"]


def test_blocks_that_differ_in_precision_are_another_kind(workshop: Path) -> None:
    keep = 'precision.transformer.rules=[{match: "single_transformer_blocks.2.*", format: bf16}]'
    engine = engine_of(open_bundle(compile_into(workshop / "rtx-kinds", *QUICK, keep, recipe=RTX)))
    run = [call.plan for call in engine.programs["body"].calls]
    assert run == ["double"] * 2 + ["single"] * 2 + ["single-2"] + ["single"] * 3 + ["residual"]
    assert engine.audit["single-2"]["gemms"] == {"bf16": 2}


def test_baked_plans_hold_the_weights_and_one_gemm_a_group(workshop: Path) -> None:
    baked = "targets=[{kind: tensorrt_rtx, weights: baked}]"
    bundle = open_bundle(compile_into(workshop / "rtx-baked", *QUICK, baked, recipe=RTX))
    engine = engine_of(bundle)
    assert [call.plan for call in engine.programs["body"].calls] == ["blocks-0", "residual"]
    plan = engine.plans["blocks-0"]
    assert plan.weights == ()
    assert len(plan.expected["groups"]) == 4
    assert engine.audit["blocks-0"]["gemms"] == {"nvfp4": 2 * 12 + 6 * 2}
    weights = bundle.path("transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert bundle.path(str(plan.file)).stat().st_size > 0.7 * weights


def test_a_range_of_sizes_is_one_profile(workshop: Path) -> None:
    sizes = ("sizes=[[64, 64], [32, 96], [96, 96]]", "targets=[{kind: tensorrt_rtx, shapes: range}]")
    bundle = open_bundle(compile_into(workshop / "rtx-range", *QUICK, *sizes, recipe=RTX))
    engine = engine_of(bundle)
    tokens = [h * w // bundle.manifest.sampling.pixels_per_token**2 for h, w in ((64, 64), (32, 96), (96, 96))]
    assert engine.plans["single"].profiles == ({"batch": (1, 2, 2), "tokens": (min(tokens), tokens[0], max(tokens))},)
    assert bundle.manifest.targets[0].tokens == (min(tokens), max(tokens))


# The real shapes.


def test_devs_whole_transformer_is_a_few_small_plans(tmp_path: Path) -> None:
    """32 billion parameters, from shapes alone: 192 Linears as FP4, 56 attentions fused, under 20 MB."""
    plan = precision_plan(
        "transformer", Flux2Transformer.read(DEV).linears, ComponentPrecision(default="nvfp4", preset="modelopt-flux2")
    )
    source = {
        name: TensorRef(name, "BF16", shape, Path(), 0, 2 * math.prod(shape))
        for name, shape in Flux2Transformer.read(DEV).tensors.items()
    }
    pieces = exported("transformer", DEV, 512, dtype="bfloat16")
    target = TensorRTRtxTarget(compute_capabilities=("12.0", "12.1"))
    cutter = Cutter([sizes_of(1, (64, 64))], False, target.name, "engines/tensorrt_rtx")
    component = Component("transformer", planned_tensors(source, plan), plan, "")
    cutter.transformer(pieces, component, 512, None)
    write_sources(cutter.cut, tmp_path)
    engine = build_engine(target, cutter.cut, tmp_path)
    blocks = [name for name in engine.plans if not name.startswith("prologue_")]
    assert blocks == ["signal_signal", "signal_change", "double", "single", "residual", "epilogue"]
    calls = Counter(call.plan for call in engine.programs["body"].calls)
    assert calls == {"double": 8, "single": 48, "residual": 1}
    fp4 = sum(engine.audit[name]["gemms"].get("nvfp4", 0) * count for name, count in calls.items())
    # q, k, v of image and of text are one each: 12 Linears of a double block are 8 GEMMs.
    assert fp4 == 8 * 8 + 48 * 2
    assert sum(engine.audit[name]["attentions"] * count for name, count in calls.items()) == 56
    assert sum((tmp_path / str(entry.file)).stat().st_size for entry in engine.plans.values()) < 20e6
    block_scales = (36864 + 18432) * 6144 // 16 + 6144 * (6144 + 18432) // 16
    assert engine.audit["single"]["copied_bytes"] == pytest.approx(2 * block_scales, rel=1e-3)
    check_prediction(engine, tmp_path, DEV, component, 1)


def test_devs_text_encoder_is_a_few_small_plans(tmp_path: Path) -> None:
    """30 of Mistral's layers from shapes alone, in FP8, over 512 tokens that are padded on the left."""
    encoder, layers = TEXT_ENCODERS["dev"]
    plan = precision_plan("text_encoder", encoder.linears(layers), ComponentPrecision(default="fp8"))
    source = {
        name: TensorRef(name, "BF16", shape, Path(), 0, 2 * math.prod(shape))
        for name, shape in encoder.tensors(layers + 1).items()
    }
    pieces = exported("text_encoder", MISTRAL_SMALL, 512, family=DEV_FAMILY, dtype="bfloat16")
    target = TensorRTRtxTarget(compute_capabilities=("12.0", "12.1"))
    cutter = Cutter([{"branches": 1}], False, target.name, "engines/tensorrt_rtx")
    component = Component("text_encoder", planned_tensors(source, plan), plan, "")
    cutter.text_encoder(pieces, component, DEV_FAMILY.text_layers)
    write_sources(cutter.cut, tmp_path)
    engine = build_engine(target, cutter.cut, tmp_path)
    calls = Counter(call.plan for call in engine.programs["text_encoder"].calls)
    assert calls == {
        "text_stem_hidden": 1,
        "text_stem_attends": 1,
        "text_stem_seen": 1,
        "text_layer": 30,
        "text_join": 1,
    }
    # q, k, v are one GEMM, and so are gate and up.
    assert engine.audit["text_layer"]["gemms"] == {"fp8": 4}
    assert engine.audit["text_layer"]["attentions"] == 1
    assert not any(found["faults"] for found in engine.audit.values())
    assert sum((tmp_path / str(entry.file)).stat().st_size for entry in engine.plans.values()) < 10e6
    taken = cutter.cut.tensors["text_encoder"]
    assert {name for name in source if name not in taken} == {
        name for name in source if "layers.30." in name or name.endswith("model.norm.weight")
    }


# The numbers.


@pytest.mark.parametrize("full", [True, False])
def test_the_graphs_compute_what_the_cpu_target_computes(rtx_bundle: Path, full: bool) -> None:
    """Every stage on the same input. In fp32 the graphs are the CPU's to rounding, but where a value lies between two FP4
    codes; in bf16 more of them fall the other way, and the velocity keeps its direction.

    Which values do depends on the order in which a CPU adds: one that falls the other way in a late step costs it 0.3 % of its
    direction on a CPU with AMX, and none does on one with AVX-512 alone. Half of six steps must be free of them in fp32.
    """
    bundle = open_bundle(rtx_bundle)
    cpu = Pipeline(bundle, target="onnxruntime-nvfp4")
    player = Player(bundle, bundle.target("tensorrt_rtx"), full)
    grid, guidance = cpu.grid(None), 1.5
    ids, mask = cpu.tokenize(["a large red circle at the left on a white background", ""])
    text = cpu.encode_text("a large red circle at the left on a white background", guidance)
    # The rotary tables are bf16 constants in either case.
    encoded = player.run("text_encoder", {"input_ids": ids, "attention_mask": mask})["encoded"]
    assert relative_error(encoded, text) < (2e-3 if full else 2e-2)
    latents = np.random.default_rng(0).standard_normal((1, grid[0] * grid[1], 32)).astype(np.float32)
    errors, cosines = [], []
    for sigma, next_sigma in itertools.pairwise(flow_match_sigmas(16, 6)):
        cpu.begin(latents, grid, guidance, text)
        cpu.step(sigma, next_sigma)
        player.run(
            "prologue",
            {
                "latents": latents,
                "text": text,
                "columns": np.array(grid[1]),
                "guidance": np.array(guidance, np.float32),
                "sigma": np.array(sigma, np.float32),
                "next_sigma": np.array(next_sigma, np.float32),
            },
        )
        player.run("body", {})
        ours = player.run("epilogue", {})["next_latents"] - latents
        expected = cpu.backend.get("latents") - latents
        errors.append(relative_error(ours, expected))
        cosines.append(cosine(ours, expected))
        latents = cpu.backend.get("latents")
    assert sorted(errors)[2] < (1e-4 if full else 0.1)
    assert min(cosines) > 0.99
    assert sorted(cosines)[2] > (1 - 1e-5 if full else 0.995)
    decoded = player.run("vae_decoder", {"latent_grid": latents.reshape(1, *grid, -1)})["image"]
    assert psnr(decoded[0], cpu.decode(latents, grid)[0]) > (100 if full else 50)


def test_an_image_generated_by_the_graphs_is_the_cpu_targets(rtx_bundle: Path) -> None:
    bundle = open_bundle(rtx_bundle)
    cpu = Pipeline(bundle, target="onnxruntime-nvfp4")
    player = Player(bundle, bundle.target("tensorrt_rtx"))
    prompt, grid, guidance = "a small white ring at the top on a red background", cpu.grid(None), 1.5
    noise = np.random.default_rng(3).standard_normal((1, 1, grid[0] * grid[1], 32)).astype(np.float32)[0]
    expected = cpu.generate(Request(prompt, steps=12, latents=noise))
    ids, mask = cpu.tokenize([prompt, ""])
    text = player.run("text_encoder", {"input_ids": ids, "attention_mask": mask})["encoded"]
    scalars = {"text": text, "columns": np.array(grid[1]), "guidance": np.array(guidance, np.float32)}
    sigmas = flow_match_sigmas(grid[0] * grid[1], 12)
    latents = noise
    for sigma, next_sigma in itertools.pairwise(sigmas):
        times = {"sigma": np.array(sigma, np.float32), "next_sigma": np.array(next_sigma, np.float32)}
        player.run("prologue", scalars | times | {"latents": latents})
        player.run("body", {})
        latents = player.run("epilogue", {})["next_latents"]
    image = player.run("vae_decoder", {"latent_grid": latents.reshape(1, *grid, -1)})["image"][0]
    assert psnr(image, np.asarray(expected.images[0], np.float64) / 255) > 30


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4-w4a16", "fp8"])
def test_smoothing_and_low_rank_factors_are_computed_with(format: str, tmp_path: Path) -> None:
    """pre_quant_scale and SVDQuant's factors of one layer, random and large, against the CPU's lowering in ONNX Runtime."""
    import onnxruntime

    rng = np.random.default_rng(1)
    tensors = {
        "l.pre_quant_scale": torch.from_numpy(rng.uniform(0.5, 2, 32).astype(np.float32)).bfloat16(),
        "l.svdquant_lora_a": torch.from_numpy(rng.standard_normal((4, 32)).astype(np.float32)).bfloat16(),
        "l.svdquant_lora_b": torch.from_numpy(rng.standard_normal((48, 4)).astype(np.float32)).bfloat16(),
        "l.input_scale": torch.tensor(0.004),
    }
    if format == "nvfp4-w4a16":
        del tensors["l.input_scale"]
    if format != "fp8":
        tensors["l.weight"] = torch.from_numpy(rng.integers(0, 256, (48, 16), dtype=np.uint8))
        tensors["l.weight_scale"] = torch.from_numpy(rng.uniform(0.5, 4, (48, 2)).astype(np.float32)).to(
            torch.float8_e4m3fn
        )
        tensors["l.weight_scale_2"] = torch.tensor(0.03)
    else:
        tensors["l.weight"] = torch.from_numpy(rng.standard_normal((48, 32)).astype(np.float32)).to(torch.float8_e4m3fn)
        tensors["l.weight_scale"] = torch.tensor(0.03)
    save_file(tensors, tmp_path / "w.safetensors")
    refs = read_header(tmp_path / "w.safetensors")
    planned = precision_plan("transformer", [Linear("l", 48, 32)], ComponentPrecision(default=format))
    plan = {entry.layer.name: entry for entry in planned}
    x = rng.standard_normal((2, 5, 32)).astype(np.float32)

    def neutral(kind: int) -> onnx.ModelProto:
        values = [("x", ["b", "t", 32]), ("l.weight", [48, 32])]
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in values]
        node = helper.make_node("Linear", ["x", "l.weight"], ["y"], domain="fluxc")
        graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", kind, ["b", "t", 48])])
        return helper.make_model(graph)

    lowered = lower(neutral(TensorProto.FLOAT), {"x"}, {n: r.dtype for n, r in refs.items()}, plan, "nvfp4")
    bind(lowered, {"x"}, refs)
    (tmp_path / "cpu.onnx").write_bytes(lowered.SerializeToString())
    (expected,) = onnxruntime.InferenceSession(str(tmp_path / "cpu.onnx")).run(None, {"x": x})

    ours = lower_tensorrt(neutral(TensorProto.BFLOAT16), {"x"}, refs, plan)
    feeds = {port.name: read_tensor(tmp_path / "w.safetensors", port.tensors[0], port.dtype) for port in ours.weights}
    feeds = {name: value.astype(np.float32) if value.dtype == BF16 else value for name, value in feeds.items()}
    (actual,) = ReferenceEvaluator(unrounded(ours.model), new_ops=OPERATORS).run(None, {"x": x} | feeds)
    assert relative_error(actual, expected) < 1e-6
    assert ours.tensors == set(tensors)


# What must not pass.


@pytest.fixture(scope="module")
def double_block(rtx_bundle: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """Builds the double block of flux2-nano, bound or baked, after `change` did something to its graph."""
    config = json.loads((NANO / "transformer" / "config.json").read_text())
    (exported,) = {
        path.parent for result in results_of(shared_cache, rtx_bundle) for path in result.glob("double_block.onnx")
    }
    steps = compose_steps({path.stem: onnx.load(path) for path in exported.glob("*.onnx")}, 32)
    bundle = open_bundle(rtx_bundle)
    prefix = "transformer_blocks.0."
    refs = read_header(bundle.path("transformer/diffusion_pytorch_model.safetensors"))
    stored = {name.removeprefix(prefix): ref for name, ref in refs.items() if name.startswith(prefix)}
    plan = without_prefix(
        precision_plan(
            "transformer",
            Flux2Transformer.read(config).linears,
            ComponentPrecision(default="nvfp4", preset="modelopt-flux2"),
        ),
        prefix,
    )
    neutral = steps["double_block"]
    expected_groups = (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    )

    def build(change, baked: bool):
        lowered = lower_tensorrt(neutral, argument_names(neutral), stored, plan, baked)
        fix_shapes(lowered.model, {"batch": 1, "tokens": 128})
        if baked:
            bind(
                lowered.model,
                argument_names(neutral),
                {name: dataclasses.replace(ref, name=name) for name, ref in stored.items()},
            )
            onnx.external_data_helper.load_external_data_for_model(
                lowered.model, str(refs["x_embedder.weight"].file.parent)
            )
        if change:
            change(lowered)
        attentions = tuple(node.name for node in lowered.model.graph.node if node.op_type == "Attention") or ("v125",)
        matrices = tuple(
            p.name for p in lowered.weights if p.name.endswith(("weight", "weight+2")) and "norm" not in p.name
        )
        vectors = tuple(p.name for p in lowered.weights if p.name not in matrices)
        expected = Expected(lowered.gemms, expected_groups if baked else (), attentions, matrices, vectors)
        plan_bytes = build_plan(trt, PlanRequest("double", lowered.model, SM120))
        return audit(plan_bytes, expected, SM120)

    return build


def producer(lowered: Lowered, output: str) -> onnx.NodeProto:
    return next(node for node in lowered.model.graph.node if output in node.output)


def initializer(lowered: Lowered, name: str) -> TensorProto:
    return next(tensor for tensor in lowered.model.graph.initializer if tensor.name == name)


def without_rounded_inputs(lowered: Lowered) -> None:
    """W4A16: the product reads the input as it was before it was quantized."""
    gemm = next(node for node in lowered.model.graph.node if node.name == "ff.linear_in")
    gemm.input[0] = "ff.linear_in/rows"


def with_a_scale_a_row(lowered: Lowered) -> None:
    """weight_scale_2 of `ff.linear_out` as a vector over the outputs."""
    scale = initializer(lowered, "ff.linear_out.weight_scale_2")
    rows = np.full(128, numpy_helper.to_array(scale), np.float32)
    scale.CopyFrom(numpy_helper.from_array(rows, scale.name))
    node = producer(lowered, "ff.linear_out/weight/scales")
    node.attribute.append(helper.make_attribute("axis", 0))


def with_fp32_block_scales(lowered: Lowered) -> None:
    """One level of scales, in fp32."""
    node = producer(lowered, "ff.linear_out/weight/scales")
    scales = numpy_helper.to_array(initializer(lowered, "ff.linear_out.weight_scale")).astype(np.float32)
    lowered.model.graph.initializer.append(numpy_helper.from_array(scales * np.float32(0.01), "flat"))
    producer(lowered, "ff.linear_out/weight").input[1] = "flat"
    lowered.model.graph.node.remove(node)


def with_another_scale_for_k(lowered: Lowered) -> None:
    scale = initializer(lowered, "attn.to_k.weight_scale_2")
    scale.CopyFrom(numpy_helper.from_array(np.float32(numpy_helper.to_array(scale) * 1.5), scale.name))


def with_attention_taken_apart(lowered: Lowered) -> None:
    """Attention as MatMul, Softmax, MatMul in fp32."""
    graph = lowered.model.graph
    at = next(i for i, node in enumerate(graph.node) if node.op_type == "Attention")
    node = graph.node[at]
    q, k, v = node.input[:3]
    full = [helper.make_node("Cast", [x], [f"{x}/full"], to=TensorProto.FLOAT) for x in (q, k, v)]
    graph.initializer.append(numpy_helper.from_array(np.float32(32**-0.5), "softmax_scale"))
    parts = [
        *full,
        helper.make_node("Transpose", [f"{k}/full"], ["k/turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [f"{q}/full", "k/turned"], ["scores"]),
        helper.make_node("Mul", ["scores", "softmax_scale"], ["scaled_scores"]),
        helper.make_node("Softmax", ["scaled_scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", f"{v}/full"], ["attended"]),
        helper.make_node("Cast", ["attended"], list(node.output), to=TensorProto.BFLOAT16, name=node.name),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*rest[:at], *parts, *rest[at + 1 :]])


def with_a_batched_product(lowered: Lowered) -> None:
    """Transpose and MatMul on [1, rows, in] in place of Gemm(transB=1) on [rows, in], weights bound."""
    graph = lowered.model.graph
    gemm = next(node for node in graph.node if node.name == "ff.linear_in")
    graph.initializer.append(numpy_helper.from_array(np.array([1, 128, 128]), "batched"))
    graph.initializer.append(numpy_helper.from_array(np.array([128, 768]), "flat"))
    product = [
        helper.make_node("Reshape", [gemm.input[0], "batched"], ["x3"]),
        helper.make_node("Transpose", [gemm.input[1]], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x3", "turned"], ["y3"], name="ff.linear_in"),
        helper.make_node("Reshape", ["y3", "flat"], list(gemm.output)),
    ]
    nodes = list(graph.node)
    at = nodes.index(gemm)
    del graph.node[:]
    graph.node.extend([*nodes[:at], *product, *nodes[at + 1 :]])


@pytest.mark.parametrize("baked", [False, True])
def test_the_block_as_lowered_passes_the_audit(double_block, baked: bool) -> None:
    found = double_block(None, baked)
    assert found.faults == ()
    assert found.fused_share == 1.0


@pytest.mark.parametrize(
    ("change", "baked", "says"),
    [
        (without_rounded_inputs, False, "ff.linear_in: planned nvfp4, runs as bf16"),
        (without_rounded_inputs, True, "ff.linear_in: planned nvfp4, runs as bf16"),
        (with_a_scale_a_row, True, "ff.linear_out: planned nvfp4, runs as bf16"),
        (with_fp32_block_scales, True, "ff.linear_out: planned nvfp4, runs as bf16"),
        (with_another_scale_for_k, True, "attn.to_q, attn.to_k, attn.to_v: "),
        (with_attention_taken_apart, False, "attention is not one fused kernel"),
        (with_a_batched_product, False, "ff.linear_in: __myl_Tran moves the whole weight"),
    ],
)
def test_the_audit_catches_what_tensorrt_does_without_a_word(double_block, change, baked: bool, says: str) -> None:
    """Every one of these graphs builds; TensorRT says nothing."""
    found = double_block(change, baked)
    assert any(says in str(fault) for fault in found.faults), found.faults


# Hand-offs.


def test_exported_graphs_build_as_trtexec_would_build_them(rtx_bundle: Path, tmp_path: Path) -> None:
    """From the file, weights and all; every Linear of the body is an FP4 GEMM, and the shapes printed are accepted."""
    commands = export_onnx(open_bundle(rtx_bundle), None, tmp_path / "out")
    assert len(commands) == 5
    for command in commands:
        stage = command.split("--onnx=")[1].split(".onnx")[0]
        path = tmp_path / "out" / f"{stage}.onnx"
        model = onnx.load(path, load_external_data=False)
        gemms = {node.name: "nvfp4" for node in model.graph.node if node.op_type == "Gemm"} if stage == "body" else {}
        attentions = tuple(node.name for node in model.graph.node if node.op_type == "Attention")
        profile = {symbol: (size, size, size) for symbol, size in sizes_of(2, (8, 8)).items()}
        dynamic = any(d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim)
        assert ("--optShapes" in command) == dynamic
        plan = build_plan(trt, PlanRequest(stage, model, SM120, (profile,) if dynamic else (), path))
        expected = Expected(gemms, (), attentions)
        assert audit(plan, expected, SM120).faults == ()
        assert len(gemms) in (0, 2 * 8 + 6 * 2)


def test_an_export_never_mixes_with_what_is_there(rtx_bundle: Path, nano_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"exists; give a folder"):
        export_onnx(open_bundle(rtx_bundle), None, tmp_path)
    with pytest.raises(RequestError, match=r"no TensorRT target .* it has: none"):
        export_onnx(open_bundle(nano_bundle), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Bad input.


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            "[{kind: tensorrt_rtx, compute_capabilities: ['8.9']}]",
            r"8\.9 \(RTX 40, L40\) do not compute in nvfp4.* 12\.0",
        ),
        ("[{kind: tensorrt, compute_capabilities: ['9.0']}]", r"9\.0 \(H100, H200\) do not compute in nvfp4.* fp8 and"),
        (
            "[{kind: tensorrt_rtx, compute_capabilities: ['10.0']}]",
            r"for compute capability '10\.0' \(kind: tensorrt does\)",
        ),
        ("[{kind: tensorrt, compute_capabilities: ['10.0', '10.3']}]", "builds for one kind of GPU"),
        (
            "[{kind: tensorrt_rtx, activations: nvfp4}]",
            r"targets\[0\]\.activations: a target of kind tensorrt_rtx has no such",
        ),
        ("[{kind: onnxruntime, weights: baked}]", r"targets\[0\]\.weights: a target of kind onnxruntime has no such"),
        ("[{kind: tensorrt_rtx, memory_gib: 0.5}]", r"memory_gib: must be more than 1"),
        ("[{kind: tensorrt_rtx}, {kind: tensorrt_rtx}]", "'tensorrt_rtx' appears twice"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_runs(targets: str, says: str) -> None:
    def read() -> None:
        loaded = load_recipe(RTX, (*QUICK, f"targets={targets}"))
        check_targets(TargetContext(loaded.recipe, read_source(loaded)))

    with pytest.raises(RecipeError, match=says):
        read()


def test_a_missing_library_is_an_error_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    progress = RecordingProgress()
    with pytest.raises(
        BuildError, match=r"tensorrt-rtx-cu13 is not installed .* run `.* install 'tensorrt-rtx-cu13==1\.7"
    ):
        compile_into(tmp_path / "out", *QUICK, recipe=RTX, progress=progress)
    assert progress.ran == []


@pytest.fixture(scope="module")
def gpu_step() -> ModuleType:
    """benchmarks/gpu_step.py, which imports what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("gpu_step")


@pytest.fixture(scope="module")
def tiny_pieces(gpu_step: ModuleType) -> dict[str, bytes]:
    pieces = trace_transformer(gpu_step.TINY, 32, False, torch.bfloat16)
    return {name: piece.SerializeToString() for name, piece in pieces.items()}


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt-baked"])
def test_the_benchmark_of_a_step_runs_on_the_fakes(
    name: str,
    gpu_step: ModuleType,
    tiny_pieces: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What --dry-run does: plans of the benchmark's own shapes, built, audited, and run through fluxrt's backend."""
    pieces = {piece: onnx.load_from_string(raw) for piece, raw in tiny_pieces.items()}
    monkeypatch.setattr("fluxc.graph.export.trace_transformer", lambda *given: pieces)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    running = gpu_step.tensorrt_step(gpu_step.TINY, 64, 32, tmp_path / "scratch", name, dry_run=True)
    for _ in range(3):
        running.step()
        running.wait()
    free, total = running.memory()
    assert 0 < total - free < 1 << 30
    assert (running.format, running.notes) == ("NVFP4", [])


def test_both_packages_ask_for_the_same_library() -> None:
    """Plans load in the version that built them, so what one extra builds with is what the other installs to run them."""
    root = Path(__file__).parent.parent
    extras = [
        tomllib.loads((root / folder / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for folder in ("", "runtime")
    ]
    for extra in ("tensorrt-rtx", "tensorrt"):
        compiler, runtime = ({name for name in found[extra] if name.startswith("tensorrt")} for found in extras)
        assert compiler == runtime
    version = ".".join(trt.__version__.split(".")[:3])
    assert f"tensorrt-rtx-cu13=={version}.*" in extras[1]["tensorrt-rtx"]


def test_gates_that_nothing_would_be_held_to_are_refused() -> None:
    loaded = load_recipe(RTX, ("targets=[{kind: tensorrt_rtx}]",))
    with pytest.raises(RecipeError, match=r"gates\.step_cosine: no target of this recipe runs on the machine"):
        check_targets(TargetContext(loaded.recipe, read_source(loaded)))


def test_fp8_is_possible_where_fp4_is_not(workshop: Path) -> None:
    """SM89: the same recipe in FP8 and bf16."""
    changes = (
        "precision.transformer={default: fp8, preset: modelopt-flux2}",
        "targets=[{kind: tensorrt_rtx, compute_capabilities: ['8.9']}]",
    )
    engine = engine_of(open_bundle(compile_into(workshop / "rtx-sm89", *QUICK, *changes, recipe=RTX)))
    assert engine.audit["single"]["gemms"] == {"fp8": 2}
    assert engine.audit["single"]["compute_capabilities"] == ["8.9"]


def test_a_group_with_two_scales_is_refused(rtx_bundle: Path, tmp_path: Path) -> None:
    """As a damaged or foreign weights file would have it: k's tensor scale is not q's."""
    bundle = open_bundle(rtx_bundle)
    file = tmp_path / "weights.safetensors"
    tensors = load_file(bundle.path("transformer/diffusion_pytorch_model.safetensors"))
    tensors["transformer_blocks.1.attn.to_k.weight_scale_2"] *= 1.25
    save_file(tensors, file)
    plan = read_source(load_recipe(RTX, QUICK)).plans["transformer"]
    with pytest.raises(
        BuildError, match=r"transformer_blocks\.1\.attn\.to_qkv: its members .* have different weight_scale_2"
    ):
        check_group_scales(Component("transformer", read_header(file), plan, ""))


def test_a_fault_is_allowed_by_name_and_by_nothing_else() -> None:
    found = Audit(
        {}, 0, 1, 0.5, 0, SM120, (Finding("format", ("ff.linear_in",), "planned nvfp4, runs as bf16 (function)"),)
    )
    target = TensorRTRtxTarget(compute_capabilities=SM120)
    with pytest.raises(BuildError, match=r"plan double: ff\.linear_in: planned nvfp4, runs as bf16"):
        check_audits(target, {"double": found})
    check_audits(msgspec.structs.replace(target, allow=(Allow("ff.*"),)), {"double": found})
    with pytest.raises(BuildError, match=r"allow 'attn\.\*' matches no fault"):
        check_audits(msgspec.structs.replace(target, allow=(Allow("ff.*"), Allow("attn.*"))), {"double": found})


def test_a_plan_for_other_gpus_than_asked_is_a_fault(rtx_bundle: Path) -> None:
    bundle = open_bundle(rtx_bundle)
    plan = engine_of(bundle).plans["single"]
    expected = msgspec.convert(plan.expected, Expected)
    data = bundle.path(str(plan.file)).read_bytes()
    assert audit(data, expected, ("12.0", "12.1")).faults == ()
    assert [str(fault) for fault in audit(data, expected, SM120).faults] == ["runs on 12.0, 12.1, asked for 12.0"]


def test_what_is_no_plan_cannot_be_audited() -> None:
    with pytest.raises(BuildError, match="holds no program that can be read"):
        read_programs(b"not a plan")


def test_nothing_lets_a_plan_pass_that_is_not_the_one_asked_for() -> None:
    """A pattern that matches every layer says nothing of GPUs, ranks and collectives."""
    target = TensorRTRtxTarget(compute_capabilities=SM120, allow=(Allow("*"),))
    layer = Finding("format", ("ff.linear_in",), "planned nvfp4, runs as bf16 (function)")
    for finding in (
        Finding("ranks", (), "the plan is for 1 ranks, not 2: its collectives would do nothing, or hang"),
        Finding("gpus", (), "runs on 12.1, asked for 12.0"),
        Finding("collective", ("attn/ulysses",), "planned as an all-to-all, the plan has nothing in its place"),
    ):
        with pytest.raises(BuildError, match=re.escape(finding.text)):
            check_audits(target, {"double": Audit({}, 0, 1, 0.5, 0, SM120, (layer, finding))})


def test_allow_may_name_a_kind_of_finding() -> None:
    found = Audit({}, 0, 1, 0.5, 0, SM120, (Finding("attention", ("attn",), "attention is not one fused kernel"),))
    target = TensorRTRtxTarget(compute_capabilities=SM120)
    check_audits(msgspec.structs.replace(target, allow=(Allow("*", "attention"),)), {"double": found})
    with pytest.raises(BuildError, match="matches no fault"):
        check_audits(msgspec.structs.replace(target, allow=(Allow("*", "format"),)), {"double": found})
