"""The audit by TensorRT's engine inspector, on JSON of the documented form: full TensorRT cannot be installed here.

TensorRT-RTX's plans are the witness: what their program says, put into the inspector's words, must be judged alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from fluxc.base.errors import BuildError
from fluxc.targets.tensorrt.audit import Expected, audit
from fluxc.targets.tensorrt.build import build_audited
from fluxc.targets.tensorrt.builder import PlanRequest
from fluxc.targets.tensorrt.inspector import audit_layers
from fluxc.targets.tensorrt.program import Program, read_programs
from fluxrt.bundle import open_bundle
from test_tensorrt import rtx_bundle, trt  # noqa: F401

GPUS = ("10.0",)
EXPECTED = Expected(
    gemms={"ff.linear_in": "nvfp4"},
    groups=(),
    attentions=("attn/attention",),
    matrices=("ff.linear_in.weight",),
    vectors=("ff.linear_in.weight_scale",),
)
TYPES = {"fp4_e2m1": "FP4", "fp8_e4m3": "FP8", "bf16": "BFloat16", "float": "Float", "half": "Half"}


def tensor(name: str, type: str, *dims: int, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": list(dims), key: type}


def layer(name: str, type: str, tactic: str, inputs: list[Any], outputs: list[Any], *nodes: str) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": type,
        "Inputs": inputs,
        "Outputs": outputs,
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def block(gemm: dict[str, Any], *more: dict[str, Any]) -> str:
    mha = layer(
        "_gemm_mha_v2_myl0_4",
        "kgen",
        "_gemm_mha_v2_0xa2",
        [tensor("q", "BFloat16", 1, 2, 64, 16)],
        [],
        "attn/attention",
    )
    return json.dumps({"Layers": [gemm, *more, mha], "Bindings": []})


def gemm(key: str = "Format/Datatype", suffix: str = "", weight: str = "FP4", given: str = "FP4") -> dict[str, Any]:
    operands = [
        tensor("__mye1", given, 128, 128, key=key),
        tensor("ff.linear_in.weight", weight, 768, 128, key=key),
        tensor("__mye2", "FP8", 128, 8, key=key),
    ]
    product = [tensor("__mye3", "BFloat16", 128, 768, key=key)]
    return layer(f"ff.linear_in_myl0_7{suffix}", "gemm", "a_tactic", operands, product, "ff.linear_in")


@pytest.mark.parametrize("key", ["Format/Datatype", "DataType"])
def test_an_fp4_gemm_is_recognised_in_the_words_of_tensorrt_10_and_11(key: str) -> None:
    found = audit_layers(block(gemm(key)), EXPECTED, GPUS)
    assert found.faults == ()
    assert (found.gemms, found.attentions, found.kernels, found.fused_share) == ({"nvfp4": 1}, 1, 2, 1.0)
    assert (found.read, found.compute_capabilities) == ("inspector", GPUS)


@pytest.mark.parametrize(
    ("said", "finds"),
    [
        (block(gemm(given="BFloat16", weight="BFloat16")), "ff.linear_in: planned nvfp4, runs as bf16"),
        (block(gemm(weight="BFloat16")), "ff.linear_in: planned nvfp4, runs as fp4 x bf16"),
        (block(gemm() | {"TacticName": "sm100_xmma_gemm_bf16bf16_bf16f32"}), "planned nvfp4, runs as fp4 x fp4"),
        (block(gemm() | {"Metadata": ""}), "ff.linear_in: no layer of the plan computes it"),
        (block(gemm() | {"LayerType": "kgen"}), "planned nvfp4, runs as bf16"),
        (json.dumps({"Layers": [gemm()]}), "attn/attention: attention is not one fused kernel"),
        (
            block(
                gemm(),
                layer(
                    "turn", "kgen", "", [tensor("ff.linear_in.weight", "FP4", 768, 128)], [tensor("t", "FP4", 128, 768)]
                ),
            ),
            "ff.linear_in: turn moves the whole weight",
        ),
        (
            block(
                gemm(),
                layer(
                    "widen",
                    "kgen",
                    "",
                    [
                        tensor("ff.linear_in.weight", "FP4", 768, 128),
                        tensor("ff.linear_in.weight_scale", "FP8", 768, 8),
                    ],
                    [tensor("w", "BFloat16", 768, 128)],
                ),
            ),
            "ff.linear_in: widen moves the whole weight",
        ),
    ],
)
def test_what_is_not_as_planned_is_found(said: str, finds: str) -> None:
    assert any(finds in str(fault) for fault in audit_layers(said, EXPECTED, GPUS).faults)


def test_weights_inside_the_plan_are_not_listed_and_need_not_be() -> None:
    baked = Expected(gemms=EXPECTED.gemms, groups=(), attentions=EXPECTED.attentions)
    alone = gemm() | {"Inputs": [tensor("__mye1", "FP4", 128, 128)]}
    assert audit_layers(block(alone), baked, GPUS).faults == ()
    assert audit_layers(block(alone), EXPECTED, GPUS).faults != ()


def test_every_profile_is_audited() -> None:
    bad = gemm(suffix=" [profile 1]", given="BFloat16", weight="BFloat16")
    mha = json.loads(block(bad))["Layers"][1]
    said = json.loads(block(gemm()))
    said["Layers"] += [bad, mha | {"Name": f"{mha['Name']} [profile 1]"}]
    found = audit_layers(json.dumps(said), EXPECTED, GPUS)
    assert [fault.kind for fault in found.faults] == ["format"]


def test_block_scales_that_are_copied_are_counted() -> None:
    scales = [tensor("ff.linear_in.weight_scale", "FP8", 768, 8)]
    copy = layer("swizzle", "kgen", "", scales, [tensor("s", "FP8", 768, 8)])
    found = audit_layers(block(gemm(), copy), EXPECTED, GPUS)
    assert (found.faults, found.copied_bytes) == ((), 768 * 8)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        '{"Layers": []}',
        '{"Layers": ["ff.linear_in_myl0_7"]}',
        block(gemm() | {"Outputs": [tensor("y", "TF9")]}),
    ],
)
def test_what_is_of_another_form_cannot_be_audited(said: str) -> None:
    with pytest.raises(BuildError, match=r"cannot be audited|names no layer"):
        audit_layers(said, EXPECTED, GPUS)


def in_the_inspectors_words(programs: list[Program]) -> str:
    """The programs of TensorRT-RTX, one a profile, as layers; weights inside the plan are left out, as the inspector does."""

    def tensors(program: Program, names: tuple[str, ...]) -> list[dict[str, Any]]:
        known = [(name, program.tensors[name]) for name in names if name in program.tensors]
        return [
            tensor(found.base.removesuffix(".1"), TYPES.get(found.type, found.type), *found.dims)
            for name, found in known
        ]

    kinds = {"fully_connected": "gemm", "function": "kgen"}
    layers = [
        layer(
            f"{k.name} [profile {number}]",
            kinds.get(k.kind, k.kind),
            "",
            tensors(program, k.inputs),
            tensors(program, k.outputs),
            *k.layers,
        )
        for number, program in enumerate(programs)
        for k in program.kernels
    ]
    return json.dumps({"Layers": layers})


def test_plans_of_tensorrt_rtx_are_judged_as_their_program_is(rtx_bundle: Path) -> None:  # noqa: F811
    bundle = open_bundle(rtx_bundle)
    engine = bundle.target("tensorrt_rtx").engine
    gemms = 0
    for name, entry in engine.plans.items():
        plan = bundle.path(entry.file).read_bytes()
        expected = msgspec.convert(entry.expected, Expected)
        read = audit(plan, expected, engine.compute_capabilities)
        programs = [program for program in read_programs(plan) if not program.is_fragment]
        inspected = audit_layers(in_the_inspectors_words(programs), expected, engine.compute_capabilities)
        assert (inspected.gemms, inspected.attentions, inspected.faults) == (read.gemms, read.attentions, ()), name
        assert inspected.copied_bytes == read.copied_bytes
        gemms += sum(read.gemms.values())
    assert gemms > 20


class Inspected:
    """TensorRT-RTX with plans that hold no text, and an engine inspector that says `said`; a GPU is not asked."""

    def __init__(self, said: str | None) -> None:
        self.__name__, self.__version__, self.said = "tensorrt", "11.4.0.1", said
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.ILogger = trt.ILogger

    def Runtime(self, logger: Any) -> Inspected:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        inspector = SimpleNamespace(get_engine_information=lambda format: self.said)
        return self.said and SimpleNamespace(
            create_engine_inspector=lambda: inspector,
            num_optimization_profiles=2,
            get_device_memory_size_for_profile_v2=lambda profile: 1000 + profile,
        )


def test_a_plan_without_text_is_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxc.targets.tensorrt.build.build_plan", lambda module, request: b"no text")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    request = PlanRequest("single", helper.make_model(onnx.helper.make_graph([], "g", [value], [value])), GPUS)
    found = build_audited(Inspected(block(gemm())), request, EXPECTED, tmp_path / "single.plan")
    assert (found.read, found.faults, found.working_bytes) == ("inspector", (), 1001)
    assert (tmp_path / "single.plan").read_bytes() == b"no text"
    with pytest.raises(
        BuildError, match=r"plan single: the plan holds no program .*; nor can it be inspected: .* not load"
    ):
        build_audited(Inspected(None), request, EXPECTED, tmp_path / "single.plan")
