"""Sharded TensorRT targets: real plans read back, their graphs through fakes of CUDA and TensorRT, one thread a rank.

Nothing here ran on a GPU; no collective of NCCL's was called.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import compile_into, exported
from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef
from fluxc.cli.describe_bundle import print_bundle
from fluxc.fidelity.metrics import psnr
from fluxc.graph.ulysses import shard
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.writer import planned_tensors
from fluxc.recipe.structs import ComponentPrecision
from fluxc.recipe.targets import TensorRTRtxTarget
from fluxc.rehearsal.gpu import RTX as FAKE_RTX
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxc.targets.tensorrt.audit import Expected, audit
from fluxc.targets.tensorrt.build import build_engine, write_sources
from fluxc.targets.tensorrt.cut import Component, Cutter
from fluxc.targets.tensorrt.export_onnx import export_onnx
from fluxc.targets.tensorrt.library import check_keeps_ranks
from fluxrt.backends.nccl import Communicator
from fluxrt.backends.registry import make_pipeline
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.choose import Machine, obstacle
from fluxrt.errors import BackendError, RequestError
from fluxrt.group import Group
from fluxrt.manifest import Engine
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.sharding import sizes_of
from predicted import check_prediction
from quick import QUICK
from ranks import on_every_rank
from test_flux2_tables import DEV, KLEIN_4B
from test_tensorrt import RTX

trt = pytest.importorskip("tensorrt_rtx", reason="the plans need tensorrt-rtx-cu13, as `make test` installs it")

PROMPT = "a small white ring at the top on a red background"
CAPSULE = SimpleNamespace(capsule=object(), close=lambda: None)


# Plans at real shapes.


@pytest.fixture(scope="module", params=[("klein-4B", KLEIN_4B, 20), ("dev", DEV, 48)], ids=lambda param: param[0])
def model(request: pytest.FixtureRequest) -> tuple[dict[str, Any], int, Component]:
    """Config, number of single-stream blocks, and the transformer as modelopt's preset plans it, from shapes alone."""
    _, config, singles = request.param
    settings = ComponentPrecision(default="nvfp4", preset="modelopt-flux2")
    plan = precision_plan("transformer", Flux2Transformer.read(config).linears, settings)
    source = {
        name: TensorRef(name, "BF16", shape, Path(), 0, 2 * math.prod(shape))
        for name, shape in Flux2Transformer.read(config).tensors.items()
    }
    return config, singles, Component("transformer", planned_tensors(source, plan), plan, "")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sharded_plans_hold_fp4_gemms_and_two_collectives_a_block(
    model: tuple[dict[str, Any], int, Component], ranks: int, tmp_path: Path
) -> None:
    config, singles, component = model
    pieces = exported("transformer", config, 512 // ranks, dtype="bfloat16", part=True)
    transformer = Flux2Transformer.read(config)
    pieces |= {name: shard(piece, transformer, ranks) for name, piece in pieces.items() if name.endswith("_block")}
    target = TensorRTRtxTarget(gpus=ranks)
    request = sizes_of(1, (64, 64)) | {"tokens": 4096 // ranks}
    cutter = Cutter([request], False, target.name, f"engines/{target.name}")
    cutter.transformer(pieces, component, 512 // ranks, None)
    write_sources(cutter.cut, tmp_path)
    engine = build_engine(target, cutter.cut, tmp_path)
    calls = Counter(call.plan for call in engine.programs["body"].calls)
    assert calls["single"] == singles
    for name in ("double", "single"):
        found = engine.audit[name]
        assert (found["collectives"], found["attentions"], found["faults"]) == (2, 1, ())
        assert found["gemms"] == {"nvfp4": 8 if name == "double" else 2}
        assert (tmp_path / str(engine.plans[name].file)).stat().st_size < 6e6
    assert sum(engine.audit[name]["collectives"] for name in engine.plans) == 4
    check_prediction(engine, tmp_path, config, component, ranks)
    check_tampering(engine, tmp_path)


def check_tampering(engine: Engine, folder: Path) -> None:
    """The audit sees a plan that forgot its ranks, and one that lost a collective or has another in its place."""
    plan = engine.plans["single"]
    data = (folder / str(plan.file)).read_bytes()
    expected = Expected(**{**plan.expected, "groups": tuple(map(tuple, plan.expected["groups"]))})
    assert audit(data, expected, engine.compute_capabilities).faults == ()
    ranks = b"world_size = %d" % expected.ranks
    for old, new, said in (
        (ranks, b"world_size = 1", "is for 1 ranks, not"),
        (b"comm_alltoall={", b"comm_allgathr={", "comm_allgathr in its place"),
        (b"comm_alltoall={", b"function     ={", "nothing in its place"),
    ):
        assert data.count(old) >= 1
        faults = audit(data.replace(old, new, 1), expected, engine.compute_capabilities).faults
        assert any(said in str(fault) for fault in faults), faults
    plain = Expected(**{**expected.__dict__, "collectives": ()})
    assert any("not asked for" in str(fault) for fault in audit(data, plain, engine.compute_capabilities).faults)


def test_a_tensorrt_that_loses_ranks_is_refused() -> None:
    for name, version, refused in (
        ("tensorrt", "11.0.1", True),
        ("tensorrt", "11.1.9", True),
        ("tensorrt", "11.2.0", False),
        ("tensorrt", "12.0", False),
        ("tensorrt_rtx", "1.7.1", False),
    ):
        module: Any = SimpleNamespace(__name__=name, __version__=version)
        if refused:
            with pytest.raises(BuildError, match=r"use 11\.2 or newer"):
                check_keeps_ranks(module)
        else:
            check_keeps_ranks(module)


# flux2-nano, generated through fakes.


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Bundle:
    targets = "targets=[{kind: tensorrt_rtx}, {kind: tensorrt_rtx, gpus: 2}, {kind: onnxruntime, activations: nvfp4}]"
    cache = "step_cache={skip: 4, mode: dynamic, traced: reference, prompts: prompts/flux2-nano-calibration.txt, frontier: []}"
    changes = ("sampling.steps=10", "calibration.steps=3")
    return open_bundle(compile_into(workshop / "rtx-ranks", *QUICK, *changes, cache, targets, recipe=RTX))


def generated(bundle: Bundle, ranks: int, **request: Any) -> list[tuple[np.ndarray, tuple[int, ...], FakeDriver]]:
    """Of every rank: the image's latents, the steps skipped, and its driver."""
    target = bundle.target("tensorrt_rtx" + (f"-{ranks}gpus" if ranks > 1 else ""))

    def work(group: Group | None) -> tuple[np.ndarray, tuple[int, ...], FakeDriver]:
        driver = FakeDriver()
        library = FakeLibrary(bundle, target, driver, None, group)
        backend = TensorRTBackend(bundle, target, driver, library, group, CAPSULE if group else None)
        pipeline = Pipeline(bundle, target=target.name, group=group, backend=backend)
        result = pipeline.generate(Request(PROMPT, seed=2, **request))
        return pipeline.latents(), result.skipped[0], driver

    return on_every_rank(ranks, work) if ranks > 1 else [work(None)]


@pytest.fixture(autouse=True)
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_ranks_on_fake_gpus_generate_what_one_generates(bundle: Bundle) -> None:
    """The graphs handed to TensorRT, rank by rank in ONNX's reference evaluator, captured and launched: one image, one set
    of decisions; bf16 rounds products at other places, so the image is near and not equal.

    The threshold lies in the middle of a range under which one rank decides the same.
    """
    ((whole, skipped, _),) = generated(bundle, 1, steps=10, threshold=0.225)
    found = generated(bundle, 2, steps=10, threshold=0.225)
    assert all(np.array_equal(latents, found[0][0]) for latents, _, _ in found)
    assert {steps for _, steps, _ in found} == {skipped}
    assert len(skipped) == 5
    cpu = Pipeline(bundle, target="onnxruntime-nvfp4")
    assert psnr(*(cpu.decode(latents, (8, 8))[0] for latents in (found[0][0], whole))) > 35
    for rank, (_, _, driver) in enumerate(found):
        # Rank 0 alone has the text encoder; every rank captured its steps and launched them.
        assert any(entry.startswith("run text_layer") for entry in driver.log) == (rank == 0)
        assert "launch" in driver.log


def test_a_refused_communicator_is_fatal(bundle: Bundle) -> None:
    target = bundle.target("tensorrt_rtx-2gpus")

    def work(group: Group) -> None:
        driver = FakeDriver()
        library = FakeLibrary(bundle, target, driver, None, group, refuses_communicator=True)
        backend = TensorRTBackend(bundle, target, driver, library, group, CAPSULE)
        backend.prepare(sizes_of(1, (8, 8)) | {"tokens": 32})
        backend.run(("body",))

    with pytest.raises(BackendError, match="TensorRT refused the communicator"):
        on_every_rank(2, work)


def test_a_machine_with_too_few_gpus_is_told(bundle: Bundle) -> None:
    target = bundle.target("tensorrt_rtx-2gpus")
    machine = Machine(FAKE_RTX, versions={"tensorrt_rtx": str(target.engine.version)}, gpus=1)
    assert "sharded for 2 GPUs, this machine shows 1" in str(obstacle(bundle, target, machine))


def test_gpus_without_a_way_between_them_are_told_before_anything_starts(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL goes through /dev/shm where there is no P2P, and a container has 64 MiB of it."""
    target = bundle.target("tensorrt_rtx-2gpus")
    monkeypatch.setitem(sys.modules, "nccl", ModuleType("nccl"))
    monkeypatch.setattr(sys.modules["nccl"], "__spec__", ModuleSpec("nccl", None), raising=False)
    machine = Machine(FAKE_RTX, versions={"tensorrt_rtx": str(target.engine.version)}, gpus=2, shared_memory=64 << 20)
    assert obstacle(bundle, target, machine) is None
    apart = replace(machine, apart=((0, 1),))
    said = "GPUs 0 and 1 do not reach each other's memory (no P2P), so NCCL needs /dev/shm, which has 64 MiB here; start the "
    assert said + "container with --shm-size=1g" in str(obstacle(bundle, target, apart))
    assert obstacle(bundle, target, replace(apart, shared_memory=1 << 30)) is None
    assert obstacle(bundle, target, replace(apart, gpus=3, apart=((0, 2), (1, 2)))) is None
    monkeypatch.setattr("fluxrt.machine.this_machine", lambda: apart)
    with pytest.raises(BackendError, match="no P2P"):
        make_pipeline(bundle, target, None, 2)


def test_inspect_counts_collectives_and_export_takes_another_target(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        RequestError, match="no TensorRT target 'tensorrt_rtx-2gpus' for one GPU in this bundle; it has: tens"
    ):
        export_onnx(bundle, "tensorrt_rtx-2gpus", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = bundle.target("tensorrt_rtx-2gpus").engine.audit
    assert {name: plan["collectives"] for name, plan in found.items() if plan["collectives"]} == {
        "double": 2,
        "single": 2,
    }
    print_bundle(bundle)
    assert "all-to-alls" in capsys.readouterr().out


def test_nccl_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nccl", None)
    with pytest.raises(BackendError, match=r"run `.* install 'nccl4py\[cu13\]"):
        on_every_rank(2, lambda group: Communicator(group))
