"""The CPU target's ways of computing: int8 rows against integers and against exact products, the variants of its graphs and
which of them a machine takes, what is refused, and that a step allocates nothing."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import UNSET
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import fluxrt
from conftest import NANO, compile_into, exported
from fluxc.base.errors import GateError, RecipeError
from fluxc.fidelity.metrics import psnr
from fluxc.graph.bind import argument_names
from fluxc.graph.compose import compose_body
from fluxc.models.base import Linear
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.load import load_recipe
from fluxc.targets.onnxruntime.forms import UNFOLDED, in_int8
from fluxc.targets.onnxruntime.fuse import fused, parts_of
from fluxc.targets.onnxruntime.lower import lower_with
from fluxrt.backends import saturation
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend, open_session
from fluxrt.bundle import open_bundle
from fluxrt.manifest import OnnxRuntimeTarget
from fluxrt.memory import repeatable
from fluxrt.pipeline import starting_noise
from fluxrt.request import Request
from fluxrt.unfold import unfolded_bytes
from quick import QUICK

sys.path.insert(0, str(NANO.parent.parent / "benchmarks"))
import without_avx512

PROMPT = "a large red circle at the left on a white background"
RNG = np.random.default_rng(0)


def linear_graph(rows: int, columns: int) -> onnx.ModelProto:
    """The neutral graph y = Linear(x) of one layer."""
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Linear", ["x", "layer.weight"], ["y"], domain="fluxc")],
            "fluxc",
            [
                value("x", TensorProto.FLOAT, [1, "tokens", columns]),
                value("layer.weight", TensorProto.FLOAT, [rows, columns]),
            ],
            [value("y", TensorProto.FLOAT, [1, "tokens", rows])],
        )
    )


def plan(rows: int, columns: int) -> dict[str, LayerPlan]:
    return {"layer": LayerPlan("transformer", Linear("layer", rows, columns), "nvfp4", "default", 0)}


@pytest.mark.parametrize("signed", [True, False])
def test_int8_products_are_those_of_integers(signed: bool, tmp_path: Path) -> None:
    """Rows and tokens as large as int8 has them, where 16 bits of two products would saturate."""
    rows, columns, tokens = 48, 64, 7
    lowered = lower_with(
        in_int8(signed, True),
        linear_graph(rows, columns),
        {"x"},
        {"layer.weight": "U8", "layer.weight_scale": "F8_E4M3", "layer.weight_scale_2": "F32"},
        plan(rows, columns),
    )
    (tmp_path / "graph.onnx").write_bytes(lowered.model.SerializeToString())
    session = open_session(str(tmp_path / "graph.onnx"), 1, has_arena=False)
    codes = RNG.integers(-127, 128, (columns, rows)).astype(np.int8)
    codes[:, 0] = 127
    scale = RNG.uniform(0.5, 2, rows).astype(np.float32)
    x = RNG.integers(-127, 128, (1, tokens, columns)).astype(np.float32)
    x[0, 0] = 127
    x[0, 1] = 0
    # Every other token reaches 127, so that a value is its own code.
    x[0, 2:, 0] = 127
    weights = {
        "layer.weight/int8": codes if signed else (codes.astype(np.int16) + 128).astype(np.uint8),
        "layer.weight/row_scale": scale,
    }
    (found,) = session.run(None, {"x": x, **weights})
    exact = x[0].astype(np.int64) @ codes.astype(np.int64) * scale.astype(np.float64)
    np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-3)


def test_the_probe_is_what_onnx_makes_of_it() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["product"])],
        "fluxc",
        [value("a", TensorProto.UINT8, [1, 64]), value("b", TensorProto.INT8, [64, 16])],
        [value("product", TensorProto.INT32, [1, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=8)
    model.producer_name = ""
    assert onnx.load_from_string(base64.b64decode(saturation.PROBE)) == model
    right = ReferenceEvaluator(model).run(
        None, {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    )
    assert (right[0] == 64 * 255 * 127).all()


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return RNG.standard_normal((2, 32, 96)).astype(np.float32)


def latents_after(pipeline: fluxrt.Pipeline, text: np.ndarray, steps: int = 3) -> np.ndarray:
    grid = pipeline.grid((64, 64))
    pipeline.begin(starting_noise(0, 64, 32)[None], grid, 1.5, text)
    for number in range(steps):
        pipeline.step(0.8 - 0.1 * number, 0.7 - 0.1 * number)
    return pipeline.latents()


def test_a_cpu_whose_products_saturate_computes_the_same_to_the_bit(
    quick_bundle: Path, text: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes rows as uint8, and integers have no rounding."""
    assert not saturation.saturates()
    with fluxrt.load(quick_bundle, target="onnxruntime") as pipeline:
        expected = latents_after(pipeline, text)
        assert pipeline.notes == []
    monkeypatch.setattr("fluxrt.backends.onnxruntime.saturates", lambda: True)
    opened = []
    monkeypatch.setattr(
        OnnxRuntimeBackend,
        "_open",
        lambda self, graph, path, constants, usual=OnnxRuntimeBackend._open: (
            opened.append(Path(path).name) or usual(self, graph, path, constants)
        ),
    )
    with fluxrt.load(quick_bundle, target="onnxruntime") as pipeline:
        np.testing.assert_array_equal(latents_after(pipeline, text), expected)
        assert "body.unsigned.onnx" in opened
        assert any("VNNI" in note for note in pipeline.notes)


def test_int8_of_the_full_build_is_near_exact_and_held_to_its_gate(nano_bundle: Path) -> None:
    fidelity = json.loads((nano_bundle / "bundle.json").read_text())["fidelity"]["targets"]
    apart = fidelity["onnxruntime"]["against_exact"]
    assert apart["target"] == "onnxruntime-exact"
    assert 0.002 < apart["velocity_error"] <= 0.02
    assert apart["image_psnr_db_worst"] > 55
    assert (
        "against_exact" not in fidelity["onnxruntime-exact"] or fidelity["onnxruntime-exact"]["against_exact"] is None
    )
    page = (nano_bundle / "report" / "index.html").read_text()
    assert "Fewer bits, against exact computing" in page
    assert "compute_error" in page


def test_images_of_both_are_those_that_the_build_compared(nano_bundle: Path) -> None:
    images = [
        np.asarray(fluxrt.load(nano_bundle, target=name)(PROMPT, seed=7).images[0], np.float32) / 255
        for name in ("onnxruntime", "onnxruntime-exact")
    ]
    assert 45 < psnr(*images) < 100


def test_a_build_that_misses_its_gate_is_refused(tmp_path: Path) -> None:
    changes = ("targets=[{kind: onnxruntime}, {kind: onnxruntime, compute: exact}]", "gates={compute_error: 0.0001}")
    with pytest.raises(
        GateError, match=r"target onnxruntime: its velocities are 0\.\d+ from those of onnxruntime-exact"
    ):
        compile_into(tmp_path / "out", *QUICK, *changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("targets", "gates", "message"),
    [
        ("[{kind: onnxruntime}]", "{compute_error: 0.02}", "compared with onnxruntime-exact, which the recipe lacks"),
        (
            "[{kind: onnxruntime, compute: exact}]",
            "{compute_error: 0.02}",
            "no target of this recipe computes in fewer",
        ),
        ("[{kind: onnxruntime, compute: int8, activations: nvfp4}]", "{}", "activations: goes with compute: exact"),
        ("[{kind: onnxruntime, compute: int8, weights_in_memory: 4-bit}]", "{}", "goes with compute: exact"),
        ("[{kind: onnxruntime, device: cuda, compute: int8}]", "{}", "compute: goes with device: cpu"),
        ("[{kind: onnxruntime, compute: int4}]", "{}", "compute"),
    ],
)
def test_what_does_not_go_together_is_refused(targets: str, gates: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(NANO.parent.parent / "recipes" / "flux2-nano.yaml", (f"targets={targets}", f"gates={gates}"))


@pytest.mark.parametrize(
    ("free", "is_faster"),
    [(64 << 30, True), (1 << 20, False)],
)
def test_weights_are_unfolded_where_there_is_room(
    nano_bundle: Path, text: np.ndarray, free: int, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr("fluxrt.backends.onnxruntime.LITTLE", 0)
    monkeypatch.setattr("fluxrt.backends.onnxruntime.available_memory", lambda: free)
    monkeypatch.setattr(
        OnnxRuntimeBackend,
        "_open",
        lambda self, graph, path, constants, usual=OnnxRuntimeBackend._open: (
            opened.append(Path(path).name) or usual(self, graph, path, constants)
        ),
    )
    with fluxrt.load(nano_bundle, target="onnxruntime-exact") as pipeline:
        first = latents_after(pipeline, text)
    assert [name.partition(".")[0] for name in opened] == ["prologue", "body", "epilogue"]
    assert [".faster." in name for name in opened] == [is_faster] * 3
    monkeypatch.setattr("fluxrt.backends.onnxruntime.available_memory", lambda: 64 << 30)
    with fluxrt.load(nano_bundle, target="onnxruntime-exact") as pipeline:
        np.testing.assert_allclose(latents_after(pipeline, text), first, rtol=1e-4, atol=1e-5)


def test_the_transformer_alone_is_unfolded_where_there_is_room_for_no_more(
    nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxrt.backends.onnxruntime.LITTLE", 0)
    pipeline = fluxrt.load(nano_bundle, target="onnxruntime-exact")
    backend = pipeline.backend
    assert isinstance(backend, OnnxRuntimeBackend)
    graphs = backend._target.graphs
    pipeline._prepare(2, pipeline.grid((64, 64)), 1)
    extra = {name: backend._extra([name]) for name in graphs}
    whole = backend._needed(graphs, backend._sizes)
    assert extra["text_encoder"] > 0
    transformer = extra["prologue"] + extra["body"] + extra["epilogue"]
    for room, expected in (
        (whole + sum(extra.values()), {graph.weights for graph in graphs.values()}),
        (whole + transformer, {graphs["body"].weights}),
        (whole + transformer - 1, set()),
    ):
        backend._faster = None
        monkeypatch.setattr("fluxrt.backends.onnxruntime.available_memory", lambda room=room: int(room / 0.9) + 1)
        assert backend._unfolds_once() == expected
    with repeatable():
        backend._faster = None
        assert backend._unfolds_once() == set()
        monkeypatch.setattr("fluxrt.backends.onnxruntime.LITTLE", 1 << 30)
        backend._faster = None
        assert backend._unfolds_once() == {graph.weights for graph in graphs.values()}


def test_what_int8_rows_take_is_predicted(quick_bundle: Path) -> None:
    """Once they are there, they are no longer to come."""
    with fluxrt.load(quick_bundle, target="onnxruntime") as pipeline:
        backend = pipeline.backend
        assert isinstance(backend, OnnxRuntimeBackend)
        pipeline._prepare(2, pipeline.grid((64, 64)), 1)
        before = backend.need(backend._sizes)
        pipeline.generate(Request(PROMPT, steps=1))
        after = backend.need(backend._sizes)
        made = sum(unfolded_bytes(backend._target.graphs[name].unfolded) for name in backend._sessions)
        assert before is not None
        assert after is not None
        assert before.resident - after.resident == made > 1 << 20


def test_a_step_allocates_nothing(quick_bundle: Path, text: np.ndarray) -> None:
    """After the first two: results go into arrays that are there, and what a caller got is not written to."""
    with fluxrt.load(quick_bundle, target="onnxruntime") as pipeline:
        latents_after(pipeline, text)
        kept = pipeline.latents()
        copy = kept.copy()
        pipeline.step(0.5, 0.4)
        pipeline.step(0.4, 0.3)
        tracemalloc.start()
        pipeline.step(0.3, 0.2)
        pipeline.step(0.2, 0.1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        np.testing.assert_array_equal(kept, copy)
        assert peak < 64 << 10 < pipeline.backend.get("residual").nbytes * 4


def body() -> onnx.ModelProto:
    config = json.loads((NANO / "transformer" / "config.json").read_text()) | {"num_layers": 1, "num_single_layers": 1}
    return compose_body(exported("transformer", config, 32), 1, 1, 32)


def test_fused_graphs_compute_the_same_in_fewer_operators() -> None:
    """Rotary embedding, modulated normalization and attention; tests/test_parity.py holds them against diffusers."""
    model = body()
    after = fused(model)
    before_ops, ops = (Counter(node.op_type for node in graph.graph.node) for graph in (model, after))
    assert ops["RotaryEmbedding"] == 4
    assert ops["MultiHeadAttention"] == before_ops["Attention"] == 2
    assert ops["Attention"] == ops["Transpose"] == 0
    assert ops["Slice"] < before_ops["Slice"]
    assert ops["Mul"] + ops["Add"] <= before_ops["Mul"] + before_ops["Add"] - 16
    arguments = argument_names(model)
    weights = {
        value.name: RNG.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim]).astype(np.float32) / 16
        for value in model.graph.input
        if value.name not in arguments
    }
    lowered = [lower_with(UNFOLDED, graph, arguments, dict.fromkeys(weights, "F32"), {}) for graph in (model, after)]
    feeds = {name: array for name, array in weights.items() if array.ndim == 1}
    for graph in lowered:
        for value in graph.model.graph.input:
            if value.name in feeds:
                value.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, feeds[value.name].shape))
    for entry in lowered[0].unfolds:
        first, last = entry.part
        name = f"{entry.layer}.weight" + ("" if (first, last) == (0, entry.shape[0]) else f"[{first}:{last}]")
        feeds[f"{name}/float32"] = weights[f"{entry.layer}.weight"][first:last]
    assert len(lowered[0].unfolds) > len(weights) - len(feeds)
    sizes = {"batch": 2, "tokens": 64, "tokens + 32": 96}
    for value in model.graph.input:
        if value.name in arguments:
            shape = [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]
            feeds[value.name] = RNG.standard_normal(shape).astype(np.float32)
    width = feeds["rope_cos"].shape[1]
    angles = np.repeat(RNG.uniform(0, 6, (96, width // 2)), 2, axis=1)
    feeds["rope_cos"], feeds["rope_sin"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    results = []
    for graph in lowered:
        session = open_session("body.onnx", 1, has_arena=False, content=graph.model.SerializeToString())
        results.append(session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})[0])
    assert np.linalg.norm(results[0] - results[1]) <= 2e-6 * np.linalg.norm(results[0])


def test_parts_of_a_linear_cover_its_rows_once() -> None:
    model = body()
    weights = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    cuts = parts_of(model)
    assert len(cuts) >= 3
    for node in model.graph.node:
        if node.output[0] not in cuts:
            continue
        parts = sorted(cuts[node.output[0]].parts)
        assert [part.first for part in parts[1:]] == [part.last for part in parts[:-1]]
        assert (parts[0].first, parts[-1].last) == (0, weights[node.input[1]][0].dim_value)


def test_a_bundle_names_the_variants_of_its_graphs(nano_bundle: Path) -> None:
    bundle = open_bundle(nano_bundle)
    files = bundle.manifest.files
    for name, has_unsigned in (("onnxruntime", True), ("onnxruntime-exact", False), ("onnxruntime-nvfp4", False)):
        target = bundle.target(name)
        assert isinstance(target, OnnxRuntimeTarget)
        graph = target.graphs["body"]
        assert (graph.unsigned is not UNSET) == has_unsigned
        assert (graph.faster is not UNSET) != has_unsigned
        for variant in (graph, graph.unsigned_variant, graph.faster_variant):
            assert variant is None or variant.file in files


def test_fluxrt_says_when_it_unfolds(nano_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fluxrt")
    with fluxrt.load(nano_bundle, target="onnxruntime") as pipeline:
        pipeline.generate(Request(PROMPT, steps=1))
    assert any("body.onnx computes in int8" in record.message for record in caplog.records)


MASKED = """
import sys
import numpy as np
import fluxrt
import fluxrt.backends.onnxruntime as backend
from fluxrt.backends.saturation import saturates
from fluxrt.pipeline import starting_noise

bundle, out, way = sys.argv[1:]
assert saturates()
if way == "signed":
    backend.saturates = lambda: False
with fluxrt.load(bundle, target="onnxruntime", threads=1) as pipeline:
    text = np.random.default_rng(0).standard_normal((2, 32, 96)).astype(np.float32)
    pipeline.begin(starting_noise(0, 64, 32)[None], pipeline.grid((64, 64)), 1.5, text)
    for number in range(3):
        pipeline.step(0.8 - 0.1 * number, 0.7 - 0.1 * number)
    np.save(out, pipeline.latents())
    assert [note for note in pipeline.notes if "VNNI" in note] == ([] if way == "signed" else pipeline.notes)
"""


@pytest.mark.skipif(not without_avx512.can_mask(), reason="masking AVX-512 takes Linux on x86-64, gcc and objdump")
def test_without_avx512_and_vnni_signed_rows_saturate_and_unsigned_ones_do_not(
    quick_bundle: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's own kernels for AVX2, for which its library is told that this CPU has no more."""
    environment = without_avx512.environment(tmp_path)
    with fluxrt.load(quick_bundle, target="onnxruntime", threads=1) as pipeline:
        expected = latents_after(pipeline, np.random.default_rng(0).standard_normal((2, 32, 96)).astype(np.float32))
    off = {}
    for way in ("unsigned", "signed"):
        command = [sys.executable, "-c", MASKED, str(quick_bundle), str(tmp_path / f"{way}.npy"), way]
        subprocess.run(command, check=True, env=environment)
        found = np.load(tmp_path / f"{way}.npy")
        off[way] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    # Sums in another order change the codes of some inputs.
    assert off["unsigned"] < 0.005
    assert off["signed"] > 2 * off["unsigned"]
