"""Holds a prediction against compiled plans: what they move, hold and launch, read out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.predict.scaling import Subject, rank_memory
from fluxc.predict.work import work_of
from fluxc.quantize.memory import weights_memory
from fluxc.targets.sharding import shards_of
from fluxc.targets.tensorrt.audit import GEMM_KINDS
from fluxc.targets.tensorrt.cut import Component
from fluxc.targets.tensorrt.program import Program, read_programs
from fluxrt.backends.buffers import plan_arena, plan_buffers
from fluxrt.manifest import Engine
from fluxrt.sharding import sizes_of
from fluxrt.weights import StoredTensor

STAGES = ("prologue", "body", "epilogue")


def check_prediction(engine: Engine, folder: Path, config: dict[str, Any], component: Component, ranks: int) -> None:
    """Within 15 %: memory traffic of a step, kernels, working memory and buffers of 1024x1024 with 512 text tokens; within
    1 %: the weights that a rank uploads."""
    plan = component.plan
    model = Flux2Transformer.read(config)
    work = work_of(model, plan, shards_of(ranks, (1024, 1024), 4096, model, 512, 1, 2), 1)
    programs = {}
    for name, entry in engine.plans.items():
        (programs[name],) = (p for p in read_programs((folder / str(entry.file)).read_bytes()) if not p.is_fragment)
    called = [programs[call.plan] for stage in STAGES for call in engine.programs[stage].calls]
    assert work.moved_bytes == pytest.approx(sum(map(moved, called)), rel=0.15)
    assert work.kernels == pytest.approx(sum(len(program.kernels) for program in called), rel=0.15)
    largest = max(found["working_bytes"] for found in engine.audit.values())
    held = weights_memory(model.tensors, plan).planned
    memory = rank_memory(Subject("", model, plan, (1024, 1024), 4096, 512, 1, 50, held), work)
    stored = {n: StoredTensor(ref.dtype, ref.file, ref.offset, ref.nbytes) for n, ref in component.weights.items()}
    uploaded = sum(plan_arena(engine.programs[stage], engine, stored).nbytes for stage in STAGES)
    assert memory.weights == pytest.approx(uploaded, rel=0.01)
    assert memory.working == pytest.approx(largest, rel=0.15)
    sizes = sizes_of(1, (64, 64)) | {"tokens": 4096 // ranks}
    buffers = sum(buffer.nbytes for buffer in plan_buffers(engine, sizes).values())
    assert memory.buffers == pytest.approx(buffers, rel=0.15)


def moved(program: Program) -> int:
    """Bytes that everything but GEMMs, attention and exchanges reads and writes."""
    return sum(
        program.tensors[name].nbytes
        for kernel in program.kernels
        if kernel.kind not in GEMM_KINDS and "mha" not in kernel.name and not kernel.kind.startswith("comm_")
        for name in (*kernel.inputs, *kernel.outputs)
        if name in program.tensors
    )
