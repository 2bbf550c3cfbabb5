"""The `openvino` target: what ONNX Runtime computes, in fp32, bf16, int8; a graph that is executed otherwise is refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import fluxrt
from conftest import RECIPE, compile_into
from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.safetensors import read_header
from fluxc.build.job import open_job
from fluxc.fidelity.metrics import psnr, relative_error
from fluxc.recipe.load import load_recipe
from fluxc.targets.openvino.audit import Expected, audit_graph, compare, expected_of
from fluxc.targets.openvino.build import BuiltGraph, audit_graphs
from fluxrt.backends import openvino_cache
from fluxrt.backends.openvino import OpenVinoBackend
from fluxrt.backends.openvino_device import Settled, int8_fault, settle
from fluxrt.backends.openvino_graph import attentions_of, multiplies_angles, read_executed
from fluxrt.backends.openvino_target import load_library
from fluxrt.backends.openvino_weights import int8_rows, keep_compressed, weight_bytes
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.choose import obstacle, pick
from fluxrt.errors import BackendError
from fluxrt.machine import Machine
from fluxrt.manifest import Graph
from fluxrt.pipeline import Pipeline, starting_noise
from fluxrt.schedule import flow_match_sigmas
from quick import QUICK

PROMPT = "a large red circle at the left"
TARGETS = (
    "{kind: onnxruntime, compute: exact}, {kind: openvino}, "
    "{kind: openvino, compute: bf16}, {kind: openvino, compute: int8}, {kind: openvino, compute: int8-bf16}"
)
CORE = load_library().Core()
EXACT = Settled("CPU", "f32", False)


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory):
    """Compiled graphs are not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("caches")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Bundle:
    """flux2-nano with two branches, two sizes, two images at once, and a step cache of 4 in 10 steps."""
    changes = (
        "sizes=[[64, 64], [56, 48]]",
        "batches=[1, 2]",
        "sampling.steps=10",
        "calibration.steps=3",
        "step_cache={skip: 4, mode: dynamic, on_mismatch: allow, prompts: prompts/flux2-nano-calibration.txt, frontier: []}",
        "gates={step_cosine: 0.97}",
        f"targets=[{TARGETS}]",
    )
    return open_bundle(compile_into(workshop / "openvino", *QUICK, *changes))


def figures(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.root / "report" / "report.json").read_text())
    return found


def begun(bundle: Bundle, target: str, size: tuple[int, int], guidance: float = 1.5) -> tuple[Pipeline, list[float]]:
    """A pipeline at the start of an image, and its sigmas."""
    pipeline = Pipeline(bundle, target=target, threads=1)
    grid = pipeline.grid(size)
    noise = starting_noise(5, grid[0] * grid[1], bundle.manifest.sampling.latent_channels)
    pipeline.begin(noise[None], grid, guidance, pipeline.tokenize(pipeline.branches(PROMPT, guidance)))
    return pipeline, flow_match_sigmas(grid[0] * grid[1], 10)


@pytest.mark.parametrize(("size", "guidance"), [((64, 64), 1.5), ((56, 48), 1.5), ((56, 48), 1.0)])
def test_in_fp32_every_step_is_onnx_runtimes(bundle: Bundle, size: tuple[int, int], guidance: float) -> None:
    """Prologue, signal, body and epilogue on two branches and on one, each step from what the step before left."""
    (exact, sigmas), (other, _) = (
        begun(bundle, "openvino", size, guidance),
        begun(bundle, "onnxruntime-exact", size, guidance),
    )
    tokens = exact.grid(size)[0] * exact.grid(size)[1]
    for backend in (exact.backend, other.backend):
        backend.put("previous_signal", np.zeros((1, tokens, 128), np.float32))
    for sigma, following in itertools.pairwise(sigmas):
        for backend in (exact.backend, other.backend):
            backend.put("sigma", np.array(sigma, np.float32))
            backend.put("next_sigma", np.array(following, np.float32))
            backend.run(("prologue", "signal", "body"), {"signal": "previous_signal"})
            backend.run(("epilogue",), {"next_latents": "latents"})
        for name in ("hidden", "text_hidden", "modulation_img", "residual", "change", "latents"):
            assert relative_error(exact.backend.get(name), other.backend.get(name)) <= 1e-5, (sigma, name)


@pytest.mark.parametrize("asked", [{}, {"step_cache": False}, {"size": (56, 48)}, {"guidance": 1.0}])
def test_in_fp32_images_are_onnx_runtimes_to_rounding(bundle: Bundle, asked: dict[str, Any]) -> None:
    request = fluxrt.Request([PROMPT, "a small white ring"], seed=3, **asked)
    made = {}
    for target in ("openvino", "onnxruntime-exact"):
        with fluxrt.load(bundle.root, target=target, threads=1) as pipeline:
            result = pipeline.generate(request)
            made[target] = ([np.asarray(image) / 255 for image in result.images], result.skipped)
            assert not pipeline.notes
    assert made["openvino"][1] == made["onnxruntime-exact"][1]
    assert any(made["openvino"][1]) == ("step_cache" not in asked)
    for ours, theirs in zip(made["openvino"][0], made["onnxruntime-exact"][0], strict=True):
        assert psnr(ours, theirs) > 60


def test_components_that_take_turns_make_the_same_images(bundle: Bundle) -> None:
    request = fluxrt.Request([PROMPT, PROMPT], seed=3, steps=3)
    images = []
    for memory in ("resident", "staged"):
        with fluxrt.load(bundle.root, target="openvino", threads=1, memory=memory) as pipeline:
            images.append([image.tobytes() for image in pipeline.generate(request).images])
            assert pipeline.backend.need({**pipeline.backend._sizes}).resident > 1 << 20
    assert images[0] == images[1]


def test_the_time_of_a_step_is_embedded_in_fp32(bundle: Bundle) -> None:
    """Its angles go up to 1000: in bf16 the embedding was 23 % off, and a velocity at klein 4B's widths 14 %."""
    (exact, _), (rounded, _) = (begun(bundle, name, (64, 64)) for name in ("openvino", "openvino-bf16"))
    for sigma in (1.0, 0.7431, 0.1):
        for backend in (exact.backend, rounded.backend):
            backend.put("sigma", np.array(sigma, np.float32))
            backend.put("next_sigma", np.array(0, np.float32))
            backend.run(("prologue",))
        for name in ("temb", "modulation_img", "modulation_single"):
            assert relative_error(rounded.backend.get(name), exact.backend.get(name)) <= 1e-5, (sigma, name)
    rounded.backend.run(("body",))
    assert rounded.notes == []
    computed = {name: settled.precision for name, settled in rounded.backend._computed.items()}
    assert (computed["prologue"], computed["body"]) == ("f32", "bf16")
    target = bundle.target("openvino-bf16")
    audited = {name: found["computed_in"] for name, found in target.audit.items()}
    assert {audited.pop("prologue"), *audited.values()} == {"fp32", "bf16"}
    assert set(audited.values()) == {"bf16"}


def test_angles_go_to_the_cpu_where_a_device_has_no_fp32(bundle: Bundle) -> None:
    graphs = bundle.target("openvino").graphs
    models = {name: CORE.read_model(str(bundle.path(graph.file))) for name, graph in graphs.items()}
    assert [name for name, model in models.items() if multiplies_angles(model)] == ["prologue"]
    with fluxrt.load(bundle.root, target="openvino-bf16") as pipeline:
        held = [
            pipeline.backend._precision_of(graphs[name].weights) for name in ("body", "text_encoder", "vae_decoder")
        ]
        assert held == ["bf16"] * 3 or pipeline.notes
    npu = Settled("NPU", "f16", False, has_fp32=False)
    for_angles = npu.for_graph(models["prologue"])
    assert (for_angles.device, for_angles.precision, for_angles.static) == ("CPU", "f32", False)
    assert npu.for_graph(models["body"]) == npu
    gpu = Settled("GPU", "f16", False)
    assert (gpu.for_graph(models["prologue"]).device, gpu.for_graph(models["prologue"]).precision) == ("GPU", "f32")
    assert EXACT.for_graph(models["prologue"]) == EXACT


def test_bf16_and_int8_are_off_by_their_rounding_and_pass_the_gates(bundle: Bundle) -> None:
    report = figures(bundle)
    assert report["verdict"]["passed"]
    found = report["targets"]
    exact, other = found["openvino"], found["onnxruntime-exact"]
    assert abs(exact["step_error"] - other["step_error"]) <= 1e-4 * other["step_error"]
    latents = {}
    for target in ("openvino", "openvino-bf16", "openvino-int8", "openvino-int8-bf16"):
        pipeline, (sigma, following, *_) = begun(bundle, target, (64, 64))
        pipeline.step(sigma, following)
        latents[target] = pipeline.backend.get("residual")
    ranges = ("openvino-bf16", 1e-3, 0.05), ("openvino-int8", 3e-3, 0.15), ("openvino-int8-bf16", 4e-3, 0.15)
    for target, least, most in ranges:
        assert least < relative_error(latents[target], latents["openvino"]) < most, target
        assert found[target]["step_cosine"] > 0.99


def test_the_report_and_inspect_show_what_the_audit_found(bundle: Bundle) -> None:
    report = figures(bundle)
    graphs = {name: found["graphs"] for name, found in report["engines"].items()}
    assert graphs["openvino"]["body"]["products"] == {"f4e2m1": 36}
    assert graphs["openvino-int8"]["body"]["products"] == {"i8": 36}
    assert graphs["openvino-int8-bf16"]["body"]["products"] == {"i8": 36}
    assert graphs["openvino-int8-bf16"]["body"]["computed_in"] == graphs["openvino-bf16"]["body"]["computed_in"]
    assert graphs["openvino"]["prologue"]["products"] == {"bf16": 7}
    assert graphs["openvino"]["text_encoder"]["attentions"] == 27
    bf16 = settle(CORE, "CPU", "bf16")
    assert graphs["openvino-bf16"]["body"]["computed_in"] == ("fp32" if bf16.notes else "bf16")
    tiers = {tier["target"]: tier for tier in report["tiers"]}
    assert tiers["openvino"]["audited"] == "yes"
    assert tiers["onnxruntime-exact"]["audited"] == "does not apply"
    assert "36 f4e2m1" in (bundle.root / "report" / "index.html").read_text()
    command = [sys.executable, "-m", "fluxc", "inspect", str(bundle.root)]
    assert "36 f4e2m1" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "CPU, with OpenVINO" in (bundle.root / "README.md").read_text()


def test_the_targets_share_their_graphs_and_verify_replays_them(bundle: Bundle) -> None:
    files = [bundle.target(name).graphs["body"].file for name in ("openvino", "openvino-int8")]
    assert files == ["transformer/body.openvino.onnx"] * 2
    command = [
        sys.executable,
        "-m",
        "fluxrt",
        "verify",
        str(bundle.root),
        "--target",
        "openvino",
        "--target",
        "openvino-int8",
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_of_it_and_onnx_runtime_the_first_of_the_recipe_is_chosen(bundle: Bundle) -> None:
    assert pick(bundle).name == "onnxruntime-exact"
    other = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, targets=bundle.manifest.targets[::-1]))
    assert pick(other).name == "openvino-int8-bf16"


def test_without_the_package_another_target_is_chosen_and_a_build_says_what_to_install(bundle: Bundle) -> None:
    hidden = (
        "import sys; sys.modules['openvino'] = None\n"
        "import fluxrt, pathlib\n"
        "from fluxrt.choose import obstacle, pick\nfrom fluxrt.bundle import open_bundle\nfrom fluxrt.machine import Machine\n"
        f"bundle = open_bundle({str(bundle.root)!r})\n"
        "print(pick(bundle).name)\nprint(obstacle(bundle, bundle.target('openvino'), Machine(None)))\n"
        "try:\n    fluxrt.load(bundle.root, target='openvino')\nexcept Exception as error:\n    print(error)\n"
        "from fluxc.targets.registry import KINDS\nfrom fluxc.recipe.targets import OpenVinoTarget\n"
        "try:\n    KINDS['openvino'].check_library(OpenVinoTarget())\nexcept Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=True)
    picked, lacking, load, build = done.stdout.strip().splitlines()
    assert picked == "onnxruntime-exact"
    for said in (lacking, load, build):
        assert "install 'openvino>=2026.4'" in said


def test_a_precision_without_kernels_falls_back_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    """The processor has bf16 and oneDNN is held to AVX2, where products of 4-bit weights in bf16 have no kernel."""
    out = tmp_path / "image.png"
    command = [
        sys.executable,
        "-m",
        "fluxrt",
        "generate",
        str(bundle.root),
        "--prompt",
        PROMPT,
        "--steps",
        "2",
        "--json",
    ]
    shown = {}
    for target in ("openvino", "openvino-bf16", "openvino-int8", "openvino-int8-bf16"):
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
        options = ["--target", target, "--out", str(out)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, env=environment)
        shown[target] = (json.loads(done.stdout)["notes"], out.read_bytes())
    assert shown["openvino"][0] == []
    both = [note for note in shown["openvino-int8-bf16"][0] if "bf16" in note]
    assert len(both) == 1
    assert both[0].startswith(
        ("int8-bf16 is not usable on CPU here", "CPU has no bf16 of its own, as compute: int8-bf16")
    )
    words = ("openvino-bf16", "bf16"), ("openvino-int8", "int8"), ("openvino-int8-bf16", "int8")
    for target, word in words:
        (note,) = (note for note in shown[target][0] if note.endswith("fp32 is used"))
        assert note.startswith((f"{word} is not usable on CPU here", f"CPU has no {word}"))
        assert shown[target][1] == shown["openvino"][1]


def test_fp16_is_not_taken_where_the_processor_lacks_it() -> None:
    settled = settle(CORE, "CPU", "fp16")
    able = "FP16" in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert settled.precision == ("f16" if able else "f32")
    assert able or "CPU has no fp16 of its own" in settled.notes[0]
    assert settle(CORE, "AUTO", "exact").device in ("CPU", "GPU")
    with pytest.raises(BackendError, match="finds no NPU here, only CPU"):
        settle(CORE, "NPU", "fp16")


def test_int8_rows_are_those_of_onnx(bundle: Bundle) -> None:
    """By QuantizeLinear of the reference evaluator, from NVFP4 values that ml_dtypes reads."""
    name, file = "transformer_blocks.0.attn.to_q", bundle.path("transformer/body.openvino.onnx")
    model = CORE.read_model(str(file))
    assert int8_rows(model, [name], CORE) == [name]
    (product,) = (node for node in model.get_ordered_ops() if node.get_friendly_name() == name)
    scaled = product.input_value(1).get_node()
    codes = scaled.input_value(0).get_node().input_value(0).get_node().data
    scales = scaled.input_value(1).get_node().data
    stored = read_header(file.with_name("diffusion_pytorch_model.safetensors"))

    def raw(part: str) -> np.ndarray:
        ref = stored[f"{name}.{part}"]
        return np.memmap(ref.file, np.uint8, "r", ref.offset, (ref.nbytes,)).reshape(*ref.shape[:1], -1)

    packed = raw("weight")
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    blocks = raw("weight_scale").view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    weight = values * np.repeat(blocks * raw("weight_scale_2").view(np.float32), 16, axis=1)
    rows = np.abs(weight).max(axis=1) / np.float32(127)
    node = helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0)
    values_of = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ws"]
    zero = helper.make_tensor("z", TensorProto.INT8, [len(rows)], [0] * len(rows))
    result = [helper.make_tensor_value_info("q", TensorProto.INT8, None)]
    evaluator = ReferenceEvaluator(helper.make_model(helper.make_graph([node], "rows", values_of, result, [zero])))
    np.testing.assert_array_equal(codes, evaluator.run(None, {"w": weight, "s": rows})[0])
    np.testing.assert_allclose(scales[:, 0], rows, rtol=1e-6)


def test_it_reports_to_nobody(bundle: Bundle, tmp_path: Path) -> None:
    """openvino's own import writes to ~/intel and sends an event."""
    told = (
        "import sys, socket\n"
        "def refuse(*_): raise SystemExit('a connection')\n"
        "socket.getaddrinfo = refuse\n"
        "import fluxrt\n"
        f"fluxrt.load({str(bundle.root)!r}, target='openvino')\n"
        "print('openvino' in sys.modules, 'openvino_telemetry' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True", "False"]
    assert not (tmp_path / "intel").exists()


# Graphs that are executed otherwise than planned.


def audited(bundle: Bundle, graph: str, change: Any = None) -> tuple[Path, onnx.ModelProto, Expected]:
    """A graph of the bundle, changed and written beside its weights, and what it was planned as."""
    described = bundle.target("openvino").graphs[graph]
    model = onnx.load(bundle.path(described.file), load_external_data=False)
    component = described.weights.partition("/")[0]
    formats = {layer.name: layer.format for layer in bundle.manifest.precision if layer.component == component}
    stored = {name: ref.dtype for name, ref in read_header(bundle.path(described.weights)).items()}
    expected = expected_of(model, formats, stored)
    if change:
        change(model.graph)
    file = bundle.path(described.weights).with_name("changed.onnx")
    file.write_bytes(model.SerializeToString())
    return file, model, expected


def decompress(graph: onnx.GraphProto) -> None:
    """Something is added to a dequantized weight, so that it is no longer what is stored."""
    name = "single_transformer_blocks.1.attn.to_out"
    turned = next(node for node in graph.node if node.output[0] == f"{name}.weight/transposed")
    graph.initializer.append(helper.make_tensor("little", TensorProto.FLOAT, [1], [1e-6]))
    at = list(graph.node).index(turned)
    graph.node.insert(at, helper.make_node("Add", [turned.input[0], "little"], ["moved"]))
    turned.input[0] = "moved"


def take_attention_apart(graph: onnx.GraphProto) -> None:
    """The first attention in three steps, and its weights as a result of the graph."""
    node = next(node for node in graph.node if node.op_type == "Attention")
    at, (q, k, v), out = list(graph.node).index(node), list(node.input)[:3], node.output[0]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    scale = attributes.get("scale", 32**-0.5)
    graph.initializer.append(helper.make_tensor("softmax_scale", TensorProto.FLOAT, [], [scale]))
    graph.node.remove(node)
    steps = [
        helper.make_node("Transpose", [k], ["turned_k"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [q, "turned_k"], ["scores"]),
        helper.make_node("Mul", ["scores", "softmax_scale"], ["scaled_scores"]),
        helper.make_node("Softmax", ["scaled_scores"], ["attention_weights"], axis=-1),
        helper.make_node("MatMul", ["attention_weights", v], [out]),
    ]
    for offset, step in enumerate(steps):
        graph.node.insert(at + offset, step)
    graph.output.append(helper.make_tensor_value_info("attention_weights", TensorProto.FLOAT, None))


def test_a_weight_that_is_unfolded_is_refused_by_name(bundle: Bundle) -> None:
    file, model, expected = audited(bundle, "body", decompress)
    (finding,) = audit_graph(CORE, file, expected, EXACT).faults
    assert (finding.kind, finding.layers) == ("weight", ("single_transformer_blocks.1.attn.to_out",))
    assert str(finding).endswith("stored as nvfp4 and held as fp32, not as f4e2m1")
    entry = Graph(f"transformer/{file.name}", "", (), ())
    with pytest.raises(
        BuildError, match=r"body: single_transformer_blocks\.1\.attn\.to_out: its weight is stored as nvfp4"
    ):
        audit_graphs(bundle.root, {"body": BuiltGraph(model, entry, expected)}, "exact")


def test_an_attention_that_is_taken_apart_is_refused_by_name(bundle: Bundle) -> None:
    file, _, expected = audited(bundle, "body", take_attention_apart)
    faults = audit_graph(CORE, file, expected, EXACT).faults
    assert {fault.kind for fault in faults} == {"attention"}
    assert expected.attentions[0] in faults[0].layers


def test_other_layers_and_precisions_are_refused_by_name(bundle: Bundle) -> None:
    file, _, expected = audited(bundle, "body")
    assert audit_graph(CORE, file, expected, EXACT).faults == ()
    model = CORE.read_model(str(file))
    keep_compressed(model)
    executed = read_executed(CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))
    found = compare(executed, expected, attentions_of(model), Settled("CPU", "bf16", False)).faults
    assert {str(fault) for fault in found if fault.layers == ("transformer_blocks.0.attn.to_q",)} == {
        "transformer_blocks.0.attn.to_q: computed in fp32, not in bf16"
    }
    other, _, _ = audited(bundle, "prologue")
    lacking = audit_graph(CORE, other, Expected(expected.layers, ()), EXACT).faults
    assert sum(fault.kind == "missing" for fault in lacking) == 36


def test_inputs_that_int8_does_not_round_are_found() -> None:
    able = not settle(CORE, "CPU", "int8").notes
    assert (int8_fault(CORE, "CPU", 384) is None) == able
    assert "not rounded to int8" in (int8_fault(CORE, "CPU", 64) or "")


def test_other_formats_are_executed_as_planned(workshop: Path) -> None:
    """MXFP4 keeps its 4 bits, FP8 is unfolded, and both become int8 where rows are wide enough."""
    changes = (
        "precision.transformer.default=mxfp4",
        "precision.text_encoder.default=fp8",
        "targets=[{kind: onnxruntime, compute: exact}, {kind: openvino}, {kind: openvino, compute: int8}, "
        "{kind: openvino, device: GPU, compute: fp16}, {kind: openvino, device: NPU, compute: fp16}]",
    )
    bundle = open_bundle(compile_into(workshop / "openvino-formats", *QUICK, *changes))
    exact, int8 = bundle.target("openvino").audit, bundle.target("openvino-int8").audit
    assert exact["body"]["products"] == {"f4e2m1": 36}
    assert int8["body"]["products"] == {"i8": 36}
    assert exact["text_encoder"]["products"] == {"f8e4m3 unfolded to fp32": 189}
    found = figures(bundle)["targets"]
    for figure in ("text_error", "step_error"):
        assert found["openvino"][figure] == pytest.approx(found["onnxruntime-exact"][figure], rel=1e-3)
    assert found["openvino-int8"]["step_cosine"] > 0.98
    for device in ("GPU", "NPU"):
        target = bundle.target(f"openvino-{device}-fp16")
        assert target.audit["body"]["products"] == {"f4e2m1": 36}
        if device not in CORE.available_devices:
            assert obstacle(bundle, target, Machine(None)).startswith(f"OpenVINO finds no {device} here, only CPU")


# The cache of compiled graphs.


def test_a_compiled_graph_that_was_damaged_is_made_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def image() -> bytes:
        with fluxrt.load(bundle.root, target="openvino", threads=1) as pipeline:
            return pipeline.generate(fluxrt.Request(PROMPT, seed=1, steps=2)).images[0].tobytes()

    first, blobs = image(), sorted((tmp_path / "fluxc" / "openvino").rglob("*.blob"))
    assert image() == first
    assert blobs
    for blob in blobs:
        data = bytearray(blob.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 2000] = os.urandom(2000)
        blob.chmod(0o644)
        blob.write_bytes(data)
        assert not openvino_cache.is_sealed(blob.parent)
    assert image() == first
    assert all(openvino_cache.is_sealed(blob.parent) for blob in blobs)


def test_large_weights_are_not_written_again(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(openvino_cache, "CACHED", 1 << 10)
    backend = OpenVinoBackend(bundle, bundle.target("openvino"), 1)
    backend._request("body")
    assert list(tmp_path.iterdir()) == []
    assert weight_bytes(CORE.read_model(str(bundle.path("transformer/body.openvino.onnx")))) > 1 << 20


def test_a_cache_that_cannot_be_written_is_a_note(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fluxc").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = OpenVinoBackend(bundle, bundle.target("openvino"), 1)
    backend._request("epilogue")
    assert "cannot be kept" in backend.notes[0]


# What is refused.


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{kind: openvino, device: TPU}", "'TPU' is not possible"),
        ("{kind: openvino, compute: int4}", "'int4' is not possible"),
        ("{kind: openvino, gpus: 2}", "targets[0].gpus"),
        ("{kind: openvino, activations: nvfp4}", "targets[0].activations"),
        ("{kind: openvino, device: NPU}", "an NPU computes in fp16, not in exact; set compute: fp16"),
        ("{kind: openvino, device: NPU, compute: int8}", "an NPU computes in fp16, not in int8"),
    ],
)
def test_options_that_cannot_be_are_refused(target: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(RECIPE, (f"targets=[{target}]",))
    assert said in str(raised.value)


def test_an_npu_has_no_range_of_sizes(tmp_path: Path) -> None:
    sizes = "sizes={min: [32, 48], max: [128, 96], default: [64, 64]}"
    targets = "targets=[{kind: onnxruntime}, {kind: openvino, device: NPU, compute: fp16}]"
    with pytest.raises(RecipeError, match=r"targets\[1\]\.device: an NPU compiles its graphs for one size at a time"):
        open_job(load_recipe(RECIPE, (*QUICK, sizes, targets)), tmp_path)
