"""What is one value everywhere and should not be is refused by a build that sets no gate: ONNX Runtime's own trap, layers whose
weight a graph unfolds to zeros, stages. What has a reason to be constant passes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from conftest import compile_into, copy_checkpoint, seed_cache
from fluxc.base.errors import BuildError
from fluxc.fidelity.compare import compare_target
from fluxc.fidelity.constants import check_gemms, check_result
from fluxc.targets.base import TargetKind
from fluxc.targets.onnxruntime import forms, probe
from fluxc.targets.onnxruntime.kind import OnnxRuntime
from fluxc.targets.onnxruntime.probe import Variant
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.evidence import read_evidence
from fluxrt.manifest import Evidence, File
from fluxrt.unfold import unfold
from fluxrt.weights import StoredTensor
from quick import QUICK

LAYER = "single_transformer_blocks.3.attn.to_out"
TARGET = "onnxruntime-nvfp4"
"""Of the quick bundle: its graphs take weights as they are stored, beside the ones that take them unfolded."""


@pytest.mark.usefixtures("own_cache")
def test_onnx_runtimes_zeros_of_computed_scales_are_refused_without_a_gate(
    quick_bundle: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Linear of 36 as 8-bit MatMulNBits with accuracy_level 4 and the scales the graph computes."""
    seed_cache(shared_cache, quick_bundle, tmp_path)
    # The key of a target's stage holds source code, and what is changed here is in memory.
    for result in (tmp_path / ".fluxc").glob("target-*"):
        shutil.rmtree(result)

    def trapped(graph, layer, x, output):
        forms.nvfp4_8_bit(graph, layer, x, output)
        if layer.name == LAYER:
            (level,) = (one for one in graph._graph.node[-1].attribute if one.name == "accuracy_level")
            level.i = 4

    usual = forms.CPU["8-bit"]
    monkeypatch.setitem(forms.CPU, "8-bit", replace(usual, own={**usual.own, "nvfp4": trapped}))
    one_target = "targets=[{kind: onnxruntime, compute: exact}]"
    with pytest.raises(
        BuildError, match=rf"target onnxruntime-exact: {LAYER} \(MatMulNBits .*\) in graph body gives 0, every"
    ):
        compile_into(tmp_path / "zeros", *QUICK, one_target)
    assert not (tmp_path / "zeros").exists()
    assert {path.name for path in tmp_path.iterdir()} == {".fluxc"}
    made = {path.name for path in (tmp_path / ".fluxc").glob("fidelity-*")}
    assert made <= {path.name for path in shared_cache.glob("fidelity-*")}


def test_layers_stored_as_zeros_pass_in_every_format(tmp_path: Path) -> None:
    """diffusers has the same zeros, of the modulation in the prologue's results too."""
    source = copy_checkpoint(tmp_path / "zeros")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    zeros = {
        "nvfp4": "single_transformer_blocks.0.attn.to_out",
        "fp8": "transformer_blocks.0.ff.linear_out",
        "mxfp4": "transformer_blocks.1.ff.linear_out",
        "bf16": "double_stream_modulation_txt.linear",
    }
    for name in zeros.values():
        weights[f"{name}.weight"] = torch.zeros_like(weights[f"{name}.weight"])
    save_file(weights, file)
    rules = [f"{{match: {zeros[format]}, format: {format}}}" for format in ("fp8", "mxfp4")]
    changes = (f"precision.transformer.rules=[{', '.join(rules)}]", f"model.source={source}")
    manifest = open_bundle(compile_into(tmp_path / "out", *QUICK, *changes)).manifest
    assert {layer.name: layer.format for layer in manifest.precision if layer.name in zeros.values()} == {
        name: format for format, name in zeros.items()
    }
    assert all(figures["step_cosine"] > 0.9 for figures in manifest.fidelity.targets.values())


@pytest.mark.parametrize(
    ("graph", "layer"),
    [
        ("text_encoder", "model.layers.3.mlp.down_proj"),
        ("prologue", "x_embedder"),
        ("vae_decoder", "decoder.conv_in"),
    ],
)
def test_a_weight_that_a_graph_unfolds_to_zeros_is_found(quick_copy: Path, graph: str, layer: str) -> None:
    """The file holds others. A convolution gives its bias then; layers behind, whose input is constant, are not named."""
    bundle = changed(quick_copy, graph, lambda model: _zero(model, f"{layer}.weight/fp32"))
    with pytest.raises(BuildError, match=rf"target {TARGET}: {layer} \(\w+ \S+\) in graph {graph} gives") as told:
        _check(bundle)
    assert str(told.value).count(" in graph ") == 1


def test_a_constant_input_explains_a_constant_result_and_the_stage_is_refused(
    quick_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros that no GEMM made; a kind that cannot look inside has this check alone."""
    monkeypatch.setattr(OnnxRuntimeBackend, "_unfolds_once", lambda self: frozenset())
    bundle = changed(
        quick_copy, "epilogue", lambda model: _zero(model, model.graph.node[_last_product(model)].input[0])
    )
    _check(bundle)
    recorded = read_evidence(bundle, evidence_of(bundle))
    with pytest.raises(
        BuildError, match=rf"the velocities for '{recorded[0].prompt}' are 0 everywhere, which diffusers' are not"
    ):
        compare_target(
            bundle,
            TARGET,
            recorded,
            [one.image for one in recorded],
            size=evidence_of(bundle).size,
            steps=evidence_of(bundle).steps,
            guidance=evidence_of(bundle).guidance,
            with_images=False,
            on_done=lambda: None,
        )


def test_a_kind_that_cannot_look_inside_is_not_asked_to(quick_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = changed(quick_copy, "prologue", lambda model: _zero(model, "x_embedder.weight/fp32"))
    monkeypatch.setattr(OnnxRuntime, "probes", TargetKind.probes)
    _check(bundle)


@pytest.mark.parametrize(("target", "form"), [("onnxruntime", "int8"), (TARGET, "float32")])
def test_zeros_that_the_runtime_makes_of_a_weight_are_found(
    quick_bundle: Path, target: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds others; of the same layer, stored as zeros, nothing is said."""
    name = f"{LAYER}.weight/{form}"

    def zeros(wanted, stored, threads=None, *, signed=True):
        arrays = unfold(wanted, stored, threads, signed=signed)
        return {one: array * 0 if one == name else array for one, array in arrays.items()}

    monkeypatch.setattr(probe, "unfold", zeros)
    with pytest.raises(BuildError, match=rf"target {target}: {LAYER} \(\w+ \S+\) in graph body gives -?0, everywhere"):
        _check(open_bundle(quick_bundle), target)


def test_a_result_may_be_constant_where_diffusers_is_and_one_number_always_may() -> None:
    zeros, ones, mixed = np.zeros((2, 3)), np.ones((2, 3)), np.arange(6.0).reshape(2, 3)
    check_result("t", "image", "a", [zeros, mixed, np.zeros(1)], [ones, mixed, np.ones(1)])
    with pytest.raises(BuildError, match="target t: the image for 'a' are 1 everywhere, which diffusers' are not"):
        check_result("t", "image", "a", [ones], [mixed])


@pytest.mark.parametrize(
    ("codes", "scale", "explains"),
    [
        ([1, 2, 0, 9] * 16, 0.5, False),
        ([0, 0x80] * 32, 0.5, True),
        ([7] * 64, 0.5, True),
        ([1, 2, 0, 9] * 16, 0.0, True),
    ],
    ids=["values", "zeros of both signs", "one value", "a scale of zero"],
)
def test_what_is_stored_explains_a_constant_only_where_it_is_one_value(
    tmp_path: Path, codes: list[int], scale: float, explains: bool
) -> None:
    """A scale of one number, which is one value of course, explains nothing."""
    stored = [
        ("w.weight", TensorProto.FLOAT8E4M3FN, [8, 8], bytes(codes)),
        ("w.weight_scale", TensorProto.FLOAT, [], None),
    ]
    position, tensors, content = 0, [], b"\0"
    for name, kind, shape, data in stored:
        data = np.float32(scale).tobytes() if data is None else data
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        # One byte later than the file begins, as a tensor may lie anywhere.
        for key, value in (("location", "weights"), ("offset", str(position + 1)), ("length", str(len(data)))):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
        content, position = content + data, position + len(data)
    (tmp_path / "weights").write_bytes(content)
    nodes = [
        helper.make_node("DequantizeLinear", ["w.weight", "w.weight_scale"], ["dense"]),
        helper.make_node("MatMul", ["x", "dense"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 8]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors))
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    places = {"w.weight": StoredTensor("F8_E4M3", tmp_path / "weights", 1, 64)}
    places["w.weight_scale"] = StoredTensor("F32", tmp_path / "weights", 65, 4)
    variant = Variant("g", tmp_path / "g.onnx", {}, places)
    (gemm,) = variant.gemms
    assert (gemm.layer, [value.name for value in gemm.operands]) == ("w", ["x"])
    assert variant.is_stored_as_one(gemm) is explains


def evidence_of(bundle: Bundle) -> Evidence:
    evidence = bundle.manifest.evidence
    assert evidence is not None
    return evidence


def _check(bundle: Bundle, target: str = TARGET) -> None:
    evidence = evidence_of(bundle)
    check_gemms(bundle, target, read_evidence(bundle, evidence)[0], evidence.size, evidence.guidance)


def changed(folder: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    """The bundle with the file of a graph changed, as if it had been built so."""
    bundle = open_bundle(folder)
    name = bundle.target(TARGET).graphs[graph].file
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    content = model.SerializeToString()
    (folder / name).write_bytes(content)
    files = bundle.manifest.files | {name: File(len(content), hashlib.sha256(content).hexdigest())}
    return Bundle(folder, msgspec.structs.replace(bundle.manifest, files=files))


def _zero(model: onnx.ModelProto, value: str) -> None:
    """Multiply `value` by zero for all that read it."""
    nodes = list(model.graph.node)
    (at,) = (number for number, node in enumerate(nodes) if value in node.output)
    for node in nodes:
        inputs = [f"{value}/zeroed" if name == value else name for name in node.input]
        node.input[:] = inputs
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]))
    ordered = [*nodes[: at + 1], helper.make_node("Mul", [value, "zero"], [f"{value}/zeroed"]), *nodes[at + 1 :]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _last_product(model: onnx.ModelProto) -> int:
    return [at for at, node in enumerate(model.graph.node) if node.op_type == "MatMul"][-1]
