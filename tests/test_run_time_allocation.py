"""Plans that would allocate memory while they run: TensorRT-RTX makes them for large tensors, unless it is told not to."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fluxc.base.errors import BuildError
from fluxc.base.imports import closure
from fluxc.recipe.targets import Allow, TensorRTRtxTarget
from fluxc.targets.tensorrt import builder
from fluxc.targets.tensorrt.audit import Audit, Expected, audit
from fluxc.targets.tensorrt.build import check_audits
from fluxc.targets.tensorrt.builder import PlanRequest, build_plan
from fluxc.targets.tensorrt.program import read_programs

trt = pytest.importorskip("tensorrt_rtx", reason="the plans need tensorrt-rtx-cu13, as `make test` installs it")
SM120 = ("12.0",)
LARGEST = 65536


def model_of(nodes: list[onnx.NodeProto], names: str, *constants: TensorProto) -> onnx.ModelProto:
    """`nodes` over bf16 values [tokens, 64]: the inputs of `names`, one a letter, and the output "y"."""
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["tokens", 64]) for name in (*names, "y")]
    graph = helper.make_graph(nodes, "g", values[:-1], values[-1:], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def scores_of_every_token() -> onnx.ModelProto:
    """Attention taken apart, whose scores are 65536 times 65536 at most."""
    return model_of(
        [
            helper.make_node("Transpose", ["k"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["q", "turned"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
            helper.make_node("MatMul", ["shares", "v"], ["y"]),
        ],
        "qkv",
    )


def built(model: onnx.ModelProto) -> Audit:
    request = PlanRequest("attention", model, SM120, ({"tokens": (4096, LARGEST, LARGEST)},))
    plan = build_plan(trt, request)
    found = audit(plan, Expected({}, (), ()), SM120)
    assert all(program.capturable for program in read_programs(plan)) == (not found.faults)
    return found


def test_all_working_memory_of_a_plan_is_in_its_size() -> None:
    found = built(scores_of_every_token())
    assert found.faults == ()
    assert found.working_bytes >= 2 * LARGEST**2


def test_memory_allocated_while_a_plan_runs_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without the flag, which says that the plan is small and can be captured."""
    monkeypatch.setattr(builder, "USER_ALLOCATION", "no such flag")
    found = built(scores_of_every_token())
    assert found.working_bytes < 2 * LARGEST**2
    (fault,) = found.faults
    assert fault.kind == "allocation"
    everything = TensorRTRtxTarget(compute_capabilities=SM120, allow=(Allow("*"),))
    with pytest.raises(
        BuildError, match=r"plan attention: allocates its memory region .* while it runs.* REQUIRE_USER_ALL"
    ):
        check_audits(TensorRTRtxTarget(compute_capabilities=SM120), {"attention": found})
    with pytest.raises(BuildError, match="matches no fault"):
        check_audits(everything, {"attention": found})


def test_a_loop_is_built_although_no_cuda_graph_can_hold_it() -> None:
    """The flag does not refuse it, the audit does."""
    body = model_of(
        [helper.make_node("Add", ["q", "carried"], ["y"]), helper.make_node("Identity", ["on"], ["on_out"])], "q"
    )
    token = helper.make_tensor_value_info("carried", TensorProto.BFLOAT16, ["tokens", 64])
    condition = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("on", "on_out")]
    count = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    inner = helper.make_graph(
        body.graph.node, "body", [count, condition[0], token], [condition[1], body.graph.output[0]]
    )
    constants = [numpy_helper.from_array(np.array(4), "times"), numpy_helper.from_array(np.array(True), "start")]
    loop = model_of([helper.make_node("Loop", ["times", "start", "q"], ["y"], body=inner)], "q", *constants)
    assert [str(fault) for fault in built(loop).faults] == ["cannot be captured in a CUDA graph"]


def test_plans_are_built_again_when_the_builder_or_the_audit_changes() -> None:
    read = closure("fluxc.targets.tensorrt.stage")
    assert {"fluxc.targets.tensorrt.builder", "fluxc.targets.tensorrt.audit"} <= set(read)
