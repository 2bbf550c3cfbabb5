"""Weights that a session packs: graphs whose inputs become constants against onnx, results against those of bound inputs to the
bit, and when nothing is packed."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import fluxrt
from fluxrt.backends import packed
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend, open_session
from fluxrt.backends.packed import with_constants
from fluxrt.bundle import open_bundle
from fluxrt.errors import BackendError
from fluxrt.manifest import OnnxRuntimeTarget
from fluxrt.memory import repeatable
from fluxrt.pipeline import starting_noise
from fluxrt.unfold import input_names, unfold
from fluxrt.weights import component_weights

RNG = np.random.default_rng(0)


def graph_and_rows(bundle: Path, graph: str) -> tuple[Path, dict[str, np.ndarray]]:
    opened = open_bundle(bundle)
    target = opened.target("onnxruntime")
    assert isinstance(target, OnnxRuntimeTarget)
    described = target.graphs[graph]
    rows = unfold(described.unfolded, component_weights(opened, described.weights))
    return opened.path(described.file), {name: array for name, array in rows.items() if array.dtype == np.int8}


def latents(bundle: Path, backend_of: list[OnnxRuntimeBackend] | None = None) -> np.ndarray:
    text = np.random.default_rng(1).standard_normal((2, 32, 96)).astype(np.float32)
    with fluxrt.load(bundle, target="onnxruntime") as pipeline:
        pipeline.begin(starting_noise(0, 64, 32)[None], pipeline.grid((64, 64)), 1.5, text)
        for number in range(3):
            pipeline.step(0.8 - 0.1 * number, 0.7 - 0.1 * number)
        assert isinstance(pipeline.backend, OnnxRuntimeBackend)
        held = {name for arrays in pipeline.backend._unfolded.values() for name in arrays}
        assert any(name.endswith("/int8") for name in held) == (backend_of is None)
        found: np.ndarray = pipeline.latents()
        return found


def test_inputs_become_constants_and_nothing_else_changes(quick_bundle: Path) -> None:
    """As onnx reads and checks it."""
    path, rows = graph_and_rows(quick_bundle, "body")
    assert len(rows) > 20
    before = onnx.load(path, load_external_data=False)
    after = onnx.load_from_string(with_constants(path.read_bytes(), rows))
    added = after.graph.initializer[len(before.graph.initializer) :]
    assert {tensor.name: tuple(tensor.dims) for tensor in added} == {name: a.shape for name, a in rows.items()}
    assert all(tensor.data_type == TensorProto.INT8 for tensor in added)
    assert all(tensor.data_location == TensorProto.EXTERNAL and tensor.external_data for tensor in added)
    assert {value.name for value in before.graph.input} - {value.name for value in after.graph.input} == set(rows)
    kept = [value for value in before.graph.input if value.name not in rows]
    del before.graph.input[:]
    before.graph.input.extend(kept)
    before.graph.initializer.extend(added)
    assert after == before


def test_fields_of_every_wire_type_are_kept() -> None:
    """Numbers of fixed size do not occur in graphs that fluxc writes; they may in attributes, and in what is not known yet."""
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info("a", TensorProto.INT8, [2])], [])
    unknown = bytes([*b"\xfd\x3e", *b"\x01\x02\x03\x04", *b"\xf9\x3e", *range(8)])
    model = helper.make_model(graph, producer_name="x" * 300).SerializeToString() + unknown
    assert with_constants(model, {}) == model
    changed = with_constants(model, {"a": np.ones(2, np.int8)})
    assert changed.endswith(unknown)
    assert [tensor.name for tensor in onnx.load_from_string(changed[: -len(unknown)]).graph.initializer] == ["a"]


def test_what_is_no_graph_is_refused(quick_bundle: Path) -> None:
    content = graph_and_rows(quick_bundle, "body")[0].read_bytes()
    for damaged in (content[:-1], content[:1], b"\x07" + content, b"\xff" * 4):
        with pytest.raises(ValueError, match=r"ends too early|no ONNX file"):
            with_constants(damaged, {"a": np.ones(2, np.int8)})


def test_a_session_holds_what_it_was_given(quick_bundle: Path) -> None:
    """Weights that are changed after it was made change nothing: they may be freed."""
    assert packed.copies()
    path, rows = graph_and_rows(quick_bundle, "body")
    session = open_session(str(path), 1, has_arena=False, constants=rows)
    bound = {port.name: port for port in session.get_inputs()}
    assert not rows.keys() & bound.keys()
    sizes = {"batch": 1, "tokens": 64, "tokens + 32": 96}
    feeds = {
        name: RNG.standard_normal([sizes.get(size, size) for size in port.shape]).astype(np.float32)
        for name, port in bound.items()
    }
    before = session.run(None, feeds)
    for array in rows.values():
        array[:] = 0
    for one, other in zip(before, session.run(None, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


def test_packed_weights_give_the_same_bits_as_bound_ones(quick_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = latents(quick_bundle, [])
    monkeypatch.setattr("fluxrt.backends.onnxruntime.copies", lambda: False)
    np.testing.assert_array_equal(latents(quick_bundle), expected)


def test_nothing_is_packed_where_memory_is_short(
    quick_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the rows that are there, the session takes them once more while it is made."""
    caplog.set_level(logging.INFO, "fluxrt")
    expected = latents(quick_bundle, [])
    assert "too little memory" not in caplog.text
    monkeypatch.setattr(OnnxRuntimeBackend, "_free_memory", lambda self: 1000)
    np.testing.assert_array_equal(latents(quick_bundle), expected)
    assert "body.onnx: too little memory is free to pack its int8 weights" in caplog.text


def test_a_build_packs_only_what_is_little(quick_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with repeatable():
        expected = latents(quick_bundle, [])
        monkeypatch.setattr("fluxrt.backends.onnxruntime.LITTLE", 1000)
        np.testing.assert_array_equal(latents(quick_bundle), expected)


def test_the_largest_graph_of_a_component_is_loaded_first(quick_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fluxrt")
    latents(quick_bundle, [])
    loaded = [record.args[0] for record in caplog.records if "and loaded in" in record.msg and record.args]
    assert next(name for name in loaded if name in ("body", "prologue", "epilogue")) == "body"
    assert len(loaded) == len(set(loaded))


def test_a_damaged_graph_is_refused_by_name(quick_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: usual(self)[:-1] if self.suffix == ".onnx" else usual(self))
    with pytest.raises(BackendError, match=r"body\.onnx.*cannot load it: it ends too early"):
        latents(quick_bundle, [])


def test_names_of_inputs_are_those_of_the_manifest(quick_bundle: Path) -> None:
    path, rows = graph_and_rows(quick_bundle, "body")
    target = open_bundle(quick_bundle).target("onnxruntime")
    assert isinstance(target, OnnxRuntimeTarget)
    wanted = {name for entry in target.graphs["body"].unfolded for name in input_names(entry)}
    assert rows.keys() <= wanted <= {value.name for value in onnx.load(path, load_external_data=False).graph.input}
